"""Greedy transcription of batches of audio, padded as the model wants it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch
from attune.contract.training import Padding

from attune_trainer.modeling.artifact import Artifact, read_artifact
from attune_trainer.modeling.buckets import BUCKETS, choose_bucket, fit_buckets
from attune_trainer.modeling.families import load_model
from attune_trainer.modeling.speech_model import SAMPLE_RATE, Audio, SpeechModel
from attune_trainer.store import digest_directory

DEFAULT_MAX_BATCH: Final = 16
# Tensors of more than 32 MB go back to the system at once and are cleared anew when it gives them out, which takes
# a CPU a fifth of its time: a batch's are kept below that. A GPU's memory is kept by torch.
_CPU_BATCH_SECONDS: Final = 120.0
_CUT_SEARCH_SECONDS: Final = 5.0
_CUT_FRAME: Final = 320  # samples: 20 ms


@dataclass(frozen=True)
class _Piece:
    """A stretch of one clip, at most a window long."""

    clip: int
    samples: Audio

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def split_windows(audio: Audio, window_seconds: float) -> list[Audio]:
    """Cuts audio that is longer than the model's window at quiet places, so that few words are cut in two.

    Each cut is at the quietest 20 ms within the last 5 s (or half, where that is less) of a window; pieces do not
    overlap. Audio of at most one window stays whole.
    """
    window = int(window_seconds * SAMPLE_RATE)
    pieces = []
    while len(audio) > window:
        search = min(int(_CUT_SEARCH_SECONDS * SAMPLE_RATE), window // 2) // _CUT_FRAME * _CUT_FRAME
        frames = audio[window - search : window].reshape(-1, _CUT_FRAME)
        quietest = int(np.argmin(np.square(frames).sum(axis=1)))
        cut = window - search + quietest * _CUT_FRAME + _CUT_FRAME // 2
        pieces.append(audio[:cut])
        audio = audio[cut:]
    return [*pieces, audio]


class Recognizer:
    """A speech recogniser as it is served: a network, its padding, and greedy decoding that always ends."""

    def __init__(self, model: SpeechModel, artifact: Artifact, *, folder: Path | None = None) -> None:
        """Binds a loaded model to its padding.

        Args:
            model: the loaded model.
            artifact: how it wants its audio.
            folder: where its files are; needed for model_digest only.
        """
        self._model = model
        self._folder = folder
        self.artifact = artifact
        self.window_seconds = model.window_seconds
        self.buckets = _choose_buckets(model, artifact)

    @property
    def padding(self) -> Padding:
        """How audio is padded before the encoder."""
        return self.artifact.padding

    @property
    def model_id(self) -> str | None:
        """The name that the model was given when it was tuned."""
        return self.artifact.model_id

    @property
    def languages(self) -> tuple[str, ...]:
        """The ISO 639-1 codes that it may be told, sorted; of a model that is told none, its own, else English."""
        return tuple(sorted(self._model.languages())) or (self.artifact.language or "en",)

    @cached_property
    def model_digest(self) -> str:
        """The digest of the model's folder: sha256:<64 hexadecimal digits>."""
        if self._folder is None:
            raise ValueError("this model was not loaded from a folder, so it has no digest")
        return digest_directory(self._folder)

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        device: torch.device = self._model.model.device
        return device

    def padded_seconds(self, seconds: float) -> float:
        """Gives what a clip's length becomes: its bucket, after as many whole windows as are cut off before.

        With a window of 30 s and padding to it: 3 -> 30, 30 -> 30, 31 -> 60.
        """
        whole = max(0, math.ceil(seconds / self.window_seconds) - 1) * self.window_seconds
        return whole + choose_bucket(seconds - whole, self.buckets)

    def warm_up(self) -> None:
        """Runs the shortest and the longest padding once, so that the first request meets warm allocators."""
        silence = np.zeros(SAMPLE_RATE, dtype=np.float32)
        for bucket in {self.buckets[0], self.buckets[-1]}:
            self._transcribe([silence], bucket, None, limit=2)

    def transcribe(
        self, audio: Sequence[Audio], max_batch: int = DEFAULT_MAX_BATCH, language: str | None = None
    ) -> list[str]:
        """Transcribes clips, in the order given.

        Clips of like length share a batch. A clip longer than the window is cut at quiet places and its parts are
        transcribed on their own. Decoding always ends: a transcript has at most 16 + 25 tokens a second.

        Args:
            audio: mono samples at 16 kHz, any length; an empty clip gives an empty transcript.
            max_batch: clips that are decoded together, at most.
            language: ISO 639-1 code; None takes the model's own, and lets a multilingual model without one detect it.

        Raises:
            ValueError: when max_batch is less than 1.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, is {max_batch}")
        pieces = [
            _Piece(index, part)
            for index, clip in enumerate(audio)
            for part in split_windows(np.asarray(clip, dtype=np.float32), self.window_seconds)
            if len(part)
        ]
        texts: list[str] = [""] * len(pieces)
        for bucket, batch in self._batches(pieces, max_batch):
            heard = self._transcribe([pieces[index].samples for index in batch], bucket, language)
            for index, text in zip(batch, heard, strict=True):
                texts[index] = text
        parts: list[list[str]] = [[] for _ in audio]
        for piece, text in zip(pieces, texts, strict=True):
            if text:
                parts[piece.clip].append(text)
        return [" ".join(words) for words in parts]

    def _batches(self, pieces: Sequence[_Piece], max_batch: int) -> list[tuple[float, list[int]]]:
        """Groups pieces of one bucket, ordered by duration: those of like duration also end together."""
        by_bucket: dict[float, list[int]] = {}
        for index in sorted(range(len(pieces)), key=lambda index: (pieces[index].seconds, index)):
            by_bucket.setdefault(choose_bucket(pieces[index].seconds, self.buckets), []).append(index)
        limits = {
            bucket: max(1, min(max_batch, int(_CPU_BATCH_SECONDS / bucket))) if self.device.type == "cpu" else max_batch
            for bucket in by_bucket
        }
        return [
            (bucket, members[start : start + limits[bucket]])
            for bucket, members in by_bucket.items()
            for start in range(0, len(members), limits[bucket])
        ]

    def _transcribe(
        self, audio: Sequence[Audio], bucket: float, language: str | None, limit: int | None = None
    ) -> list[str]:
        """Transcribes one batch, padded to a bucket."""
        features = self._model.features(audio, bucket)
        lengths = self._model.lengths(audio, bucket)
        return self._model.decode(features, lengths, language or self.artifact.language, limit)


def _choose_buckets(model: SpeechModel, artifact: Artifact) -> tuple[float, ...]:
    """Gives the durations to pad to; a model that does not hear padding gets as little of it as there can be."""
    if artifact.padding is Padding.BUCKETS:
        return fit_buckets(artifact.buckets, model.window_seconds)
    return (model.window_seconds,) if model.hears_padding else fit_buckets(BUCKETS, model.window_seconds)


def load_recognizer(path: Path, device: str | None = None) -> Recognizer:
    """Loads a recogniser from a model folder, with the padding that its attune.json asks for.

    Weights are fp32 on a CPU and bf16 on a GPU that computes in it.

    Args:
        path: folder as save_pretrained writes it; without attune.json the model counts as pretrained, and its audio is
            padded to the full window where it hears padding.
        device: "cpu", "cuda", "cuda:1"; None takes a GPU where there is one.

    Raises:
        UnsupportedModel: for an architecture that this image does not know.
        InvalidInput: for a folder in which something is missing or does not fit together.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bf16 = chosen.type == "cuda" and torch.cuda.is_bf16_supported()
    model = load_model(path, chosen, torch.bfloat16 if bf16 else torch.float32)
    return Recognizer(model, read_artifact(path), folder=path)
