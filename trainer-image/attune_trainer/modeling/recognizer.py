"""Greedy transcription of batches of audio, padded as the model wants it."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from attune.contract.training import Padding
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from attune_trainer.modeling.artifact import Artifact, read_artifact
from attune_trainer.modeling.buckets import choose_bucket, fit_buckets
from attune_trainer.modeling.whisper import SAMPLE_RATE, Whisper, load_whisper
from attune_trainer.store import digest_directory

Audio = npt.NDArray[np.float32]

# A loop is cut off where no speaker could go on: 25 tokens a second is fast speech spelled by single characters.
TOKENS_PER_SECOND: Final = 25
TOKENS_AT_LEAST: Final = 16
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

    def __init__(self, whisper: Whisper, artifact: Artifact, *, folder: Path | None = None) -> None:
        """Binds a loaded model to its padding.

        Args:
            whisper: the loaded model.
            artifact: how it wants its audio.
            folder: where its files are; needed for model_digest only.
        """
        self._whisper = whisper
        self._folder = folder
        self.artifact = artifact
        self.window_seconds = whisper.window_seconds
        self.buckets = (
            fit_buckets(artifact.buckets, self.window_seconds)
            if artifact.padding is Padding.BUCKETS
            else (self.window_seconds,)
        )
        self._suppressed = torch.tensor(whisper.suppressed(), dtype=torch.long, device=self.device)
        first = [token for token in whisper.generation.begin_suppress_tokens or () if 0 <= token < self._vocabulary]
        self._suppressed_first = torch.tensor(first, dtype=torch.long, device=self.device)

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
        return tuple(sorted(self._whisper.languages())) or (self.artifact.language or "en",)

    @cached_property
    def model_digest(self) -> str:
        """The digest of the model's folder: sha256:<64 hexadecimal digits>."""
        if self._folder is None:
            raise ValueError("this model was not loaded from a folder, so it has no digest")
        return digest_directory(self._folder)

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        device: torch.device = self._whisper.model.device
        return device

    @property
    def _vocabulary(self) -> int:
        return int(self._whisper.config.vocab_size)

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
            self._decode(self._whisper.features([silence], bucket), [1.0], None, limit=2)

    def transcribe(
        self, audio: Sequence[Audio], max_batch: int = DEFAULT_MAX_BATCH, language: str | None = None
    ) -> list[str]:
        """Transcribes clips, in the order given.

        Clips of like length share a batch. A clip longer than the window is cut at quiet places and its parts are
        transcribed on their own. A transcript has at most 16 + 25 tokens a second, so decoding always ends.

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
            features = self._whisper.features([pieces[index].samples for index in batch], bucket)
            tokens = self._decode(features, [pieces[index].seconds for index in batch], language)
            for index, ids in zip(batch, tokens, strict=True):
                texts[index] = self._whisper.tokenizer.decode(ids, skip_special_tokens=True).strip()
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

    def _token_limit(self, seconds: float, prompt: int) -> int:
        room = int(self._whisper.config.max_target_positions) - prompt
        return max(1, min(room, TOKENS_AT_LEAST + math.ceil(TOKENS_PER_SECOND * seconds)))

    @torch.inference_mode()
    def _decode(
        self, features: Tensor, seconds: Sequence[float], language: str | None, limit: int | None = None
    ) -> list[list[int]]:
        """Decodes a batch greedily; rows that have ended leave the batch once they are the half of it."""
        model = self._whisper.model
        encoded = model.model.encoder(features.to(self.device, model.dtype)).last_hidden_state
        step = self._prompts(encoded, language)
        limits = [
            min(self._token_limit(length, step.shape[1]), limit or self._whisper.config.max_target_positions)
            for length in seconds
        ]
        tokens: list[list[int]] = [[] for _ in seconds]
        rows = list(range(len(tokens)))  # which clip each row of the batch still belongs to
        ended = [False] * len(tokens)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for position in range(max(limits)):
            hidden = model.model.decoder(
                input_ids=step, encoder_hidden_states=encoded, past_key_values=cache, use_cache=True
            ).last_hidden_state
            logits = model.proj_out(hidden[:, -1])
            logits[:, self._suppressed] = -torch.inf
            if position == 0:
                logits[:, self._suppressed_first] = -torch.inf
            chosen = logits.argmax(dim=-1)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if ended[row]:
                    continue
                if token != self._whisper.end:
                    tokens[row].append(token)
                ended[row] = token == self._whisper.end or len(tokens[row]) >= limits[row]
            if all(ended):
                break
            going = [index for index, row in enumerate(rows) if not ended[row]]
            if 2 * len(going) <= len(rows):
                keep = torch.tensor(going, device=self.device)
                cache.batch_select_indices(keep)
                encoded, chosen = encoded[keep], chosen[keep]
                rows = [rows[index] for index in going]
            step = chosen[:, None]
        return tokens

    def _prompts(self, encoded: Tensor, language: str | None) -> Tensor:
        """Gives the decoder's first tokens for each clip, shape (clips, tokens)."""
        known = self._whisper.languages()
        clips = encoded.shape[0]
        wanted = language or self.artifact.language
        if not known:
            prompt = self._whisper.prompt()
            return torch.tensor([prompt] * clips, device=self.device)
        if wanted is not None and wanted not in known:
            warnings.warn(f"the model does not know the language {wanted}; it is detected instead", stacklevel=3)
        if wanted in known:
            return torch.tensor([self._whisper.prompt(known[wanted])] * clips, device=self.device)
        return torch.tensor(
            [self._whisper.prompt(token) for token in self._detect_languages(encoded, sorted(known.values()))],
            device=self.device,
        )

    def _detect_languages(self, encoded: Tensor, candidates: Sequence[int]) -> list[int]:
        """Gives each clip's likeliest language token, as the first thing that the decoder says."""
        model = self._whisper.model
        start = torch.full((encoded.shape[0], 1), self._whisper.config.decoder_start_token_id, device=self.device)
        hidden = model.model.decoder(input_ids=start, encoder_hidden_states=encoded, use_cache=False).last_hidden_state
        ids = torch.tensor(candidates, device=self.device)
        best = model.proj_out(hidden[:, -1])[:, ids].argmax(dim=-1)
        return [int(token) for token in ids[best]]


def load_recognizer(path: Path, device: str | None = None) -> Recognizer:
    """Loads a recogniser from a model folder, with the padding that its attune.json asks for.

    Weights are fp32 on a CPU and bf16 on a GPU that computes in it.

    Args:
        path: folder with config.json, *.safetensors, tokenizer.json; without attune.json the model counts as
            pretrained and its audio is padded to the full window.
        device: "cpu", "cuda", "cuda:1"; None takes a GPU where there is one.

    Raises:
        UnsupportedModel: for an architecture that this image does not know.
        InvalidInput: for a folder in which something is missing or does not fit together.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bf16 = chosen.type == "cuda" and torch.cuda.is_bf16_supported()
    whisper = load_whisper(path, chosen, torch.bfloat16 if bf16 else torch.float32)
    return Recognizer(whisper, read_artifact(path), folder=path)
