"""Whisper whose encoder takes audio shorter than its window, and what it is prompted with."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from attune_trainer.modeling.seq2seq import Seq2Seq
from attune_trainer.modeling.speech_model import (
    SAMPLE_RATE,
    Audio,
    check_mels,
    check_sampling_rate,
    load_network,
    load_tokenizer,
)

__all__ = ["LINEAR_LAYERS", "SAMPLE_RATE", "SlicedWhisperEncoder", "Whisper", "load_whisper"]

# The linear layers of every block in encoder and decoder.
LINEAR_LAYERS: Final = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class SlicedWhisperEncoder(WhisperEncoder):  # type: ignore[misc]
    """Whisper's encoder, cut to the length of its input: positions beyond it are neither computed nor attended to."""

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Encodes log-mel features of shape (batch, mels, frames), frames even and at most the window's.

        The result's last_hidden_state has shape (batch, frames / 2, d_model). A whole window gives what the original
        encoder gives. There is no mask: Whisper hears padding as silence.
        """
        del attention_mask, kwargs
        hidden = nn.functional.gelu(self.conv1(input_features))
        hidden = nn.functional.gelu(self.conv2(hidden)).permute(0, 2, 1)
        positions = hidden.shape[1]
        if positions > self.max_source_positions:
            raise ValueError(f"{positions} encoder positions, but the model has {self.max_source_positions}")
        hidden = hidden + self.embed_positions.weight[:positions]
        hidden = nn.functional.dropout(hidden, p=self.dropout, training=self.training)
        for layer in self.layers:
            hidden = layer(hidden, None)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden))


class Whisper(Seq2Seq):
    """A loaded Whisper."""

    hears_padding: ClassVar[bool] = True

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Loads a Whisper from a folder of safetensors."""
        network, tokenizer, extractor = load_network(
            WhisperForConditionalGeneration,
            folder,
            dtype,
            lambda config: (load_tokenizer(folder), _load_extractor(folder, config)),
            files="tokenizer.json and generation_config.json",
        )
        # The encoders differ in their forward alone; the outer class stays transformers' own, whose name is saved.
        network.model.encoder.__class__ = SlicedWhisperEncoder
        # Sinusoids, which are no weights: short clips would bend only the first of them.
        network.model.encoder.embed_positions.requires_grad_(False)  # noqa: FBT003 (torch's own)
        return cls(model=network.to(device).eval(), tokenizer=tokenizer, extractor=extractor)

    @property
    def window_seconds(self) -> float:
        """The longest audio that one pass takes: 30 for OpenAI's models."""
        return float(2 * self.config.max_source_positions * self.extractor.hop_length / SAMPLE_RATE)

    @property
    def positions(self) -> int:
        """How many tokens the decoder has places for."""
        return int(self.config.max_target_positions)

    @property
    def is_multilingual(self) -> bool:
        """Whether the decoder is told a language and a task."""
        stated = getattr(self.generation, "is_multilingual", None)
        return bool(getattr(self.generation, "lang_to_id", None)) if stated is None else bool(stated)

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of the layers that adapters can go on, the same in every block."""
        return LINEAR_LAYERS

    def languages(self) -> dict[str, int]:
        """Gives the token id of each language by its ISO code; nothing where the model knows only one."""
        if not self.is_multilingual:
            return {}
        known: dict[str, int] = getattr(self.generation, "lang_to_id", None) or {}
        return {name.strip("<|>"): token for name, token in known.items()}

    def prompt(self, language: int | None = None) -> list[int]:
        """Gives the token ids that every transcript starts with: start, language and task if any, no timestamps.

        Args:
            language: token id of the language; needed for multilingual models only.
        """
        tokens = [int(self.config.decoder_start_token_id)]
        if self.is_multilingual:
            if language is None:
                raise ValueError("a multilingual Whisper is prompted with a language")
            task = (getattr(self.generation, "task_to_id", None) or {}).get("transcribe")
            tokens += [language] if task is None else [language, int(task)]
        no_timestamps = getattr(self.generation, "no_timestamps_token_id", None)
        return tokens if no_timestamps is None else [*tokens, int(no_timestamps)]

    def prompt_of(self, language: str | None) -> list[int]:
        """Gives the prompt for a language by its ISO code."""
        return self.prompt(None if language is None else self.languages().get(language))

    def prompts(self, encoded: Tensor, language: str | None) -> Tensor:
        """Gives the decoder's first tokens for each clip, shape (clips, tokens); a language may have to be detected."""
        known = self.languages()
        if not known:
            return super().prompts(encoded, None)
        if language is not None and language not in known:
            warnings.warn(f"the model does not know the language {language}; it is detected instead", stacklevel=6)
        if language in known:
            return super().prompts(encoded, language)
        detected = self._detect_languages(encoded, sorted(known.values()))
        return torch.tensor([self.prompt(token) for token in detected], device=encoded.device)

    def suppressed(self) -> list[int]:
        """Lists ids that no transcript contains: what the model suppresses, and every special token but the end."""
        listed = {int(token) for token in self.generation.suppress_tokens or () if int(token) >= 0}
        timestamps = range(
            getattr(self.generation, "no_timestamps_token_id", None) or self.vocabulary,
            self.vocabulary,
        )
        named = listed | self.special_tokens() | set(timestamps)
        return sorted(token for token in named - {self.end} if token < self.vocabulary)

    def features(self, audio: Sequence[Audio], seconds: float) -> Tensor:
        """Turns clips into log-mel features of shape (clips, mels, 100 x seconds), each padded with silence.

        Args:
            audio: samples at 16 kHz; what exceeds `seconds` is cut off.
            seconds: duration to pad to.
        """
        # An even number of frames, because the encoder's second convolution halves them.
        samples = round(seconds * SAMPLE_RATE / (2 * self.extractor.hop_length)) * 2 * self.extractor.hop_length
        return self.extract(audio, samples, "input_features")

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gives what the encoder hears; there is no mask, because Whisper hears padding as silence."""
        del lengths
        return self.model.model.encoder(features).last_hidden_state, None

    def _detect_languages(self, encoded: Tensor, candidates: Sequence[int]) -> list[int]:
        """Gives each clip's likeliest language token, as the first thing that the decoder says."""
        start = torch.full((encoded.shape[0], 1), self.config.decoder_start_token_id, device=encoded.device)
        hidden = self.model.model.decoder(
            input_ids=start, encoder_hidden_states=encoded, use_cache=False
        ).last_hidden_state
        ids = torch.tensor(candidates, device=encoded.device)
        best = self.model.proj_out(hidden[:, -1])[:, ids].argmax(dim=-1)
        return [int(token) for token in ids[best]]


def load_whisper(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Whisper:
    """Loads a Whisper, and no model of another family.

    Raises:
        InvalidInput: for a folder in which something is missing or does not fit together.
    """
    return Whisper.load(folder, device, dtype)


def _load_extractor(folder: Path, config: Any) -> WhisperFeatureExtractor:
    """Reads preprocessor_config.json, or derives it from the network's shape where it is missing."""
    if not (folder / "preprocessor_config.json").is_file():
        window = config.max_source_positions * 2 * 160 // SAMPLE_RATE
        return WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=window)
    extractor = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    check_mels(extractor.feature_size, config.num_mel_bins)
    check_sampling_rate(extractor)
    return extractor
