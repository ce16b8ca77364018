"""Whisper whose encoder takes audio shorter than its window, and what it is prompted with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.logging import disable_progress_bar

from attune_trainer.failures import InvalidInput, RecipeFailure, UnsupportedModel, is_out_of_memory

# Bars drawn over themselves are noise in a Job's log.
disable_progress_bar()

SAMPLE_RATE: Final = 16000  # Hz
ARCHITECTURES: Final = ("WhisperForConditionalGeneration",)
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


@dataclass(frozen=True)
class Whisper:
    """A loaded Whisper with everything that belongs to it.

    Attributes:
        model: the network, in evaluation mode.
        tokenizer: text to token ids and back.
        extractor: samples to log-mel features.
    """

    model: WhisperForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    extractor: WhisperFeatureExtractor

    @property
    def config(self) -> WhisperConfig:
        """The network's shape."""
        return self.model.config

    @property
    def generation(self) -> GenerationConfig:
        """Token ids that steer decoding."""
        return self.model.generation_config

    @property
    def window_seconds(self) -> float:
        """The longest audio that one pass takes: 30 for OpenAI's models."""
        return float(2 * self.config.max_source_positions * self.extractor.hop_length / SAMPLE_RATE)

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

    def suppressed(self) -> list[int]:
        """Lists ids that no transcript contains: what the model suppresses, and every special token but the end."""
        listed = {int(token) for token in self.generation.suppress_tokens or () if int(token) >= 0}
        special = {token for token in self.tokenizer.all_special_ids if token is not None}
        special |= {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        special |= set(
            range(
                getattr(self.generation, "no_timestamps_token_id", None) or self.config.vocab_size,
                self.config.vocab_size,
            )
        )
        return sorted(token for token in (listed | special) - {self.end} if token < self.config.vocab_size)

    @property
    def end(self) -> int:
        """The token id that closes a transcript."""
        return int(self.config.eos_token_id)

    def set_dropout(self, share: float) -> None:
        """Sets the dropout of hidden states, attention weights and feed-forward activations, for training alone.

        The configuration, which is saved with a tuned model, keeps the base's.
        """
        for module in self.model.modules():
            for name in ("dropout", "activation_dropout"):
                if isinstance(getattr(module, name, None), (int, float)):
                    setattr(module, name, share)

    def features(self, audio: Sequence[npt.NDArray[np.float32]], seconds: float) -> Tensor:
        """Turns clips into log-mel features of shape (clips, mels, 100 x seconds), each padded with silence.

        Args:
            audio: samples at 16 kHz; what exceeds `seconds` is cut off.
            seconds: duration to pad to.
        """
        # An even number of frames, because the encoder's second convolution halves them.
        samples = round(seconds * SAMPLE_RATE / (2 * self.extractor.hop_length)) * 2 * self.extractor.hop_length
        batch = self.extractor(
            list(audio),
            padding="max_length",
            max_length=samples,
            truncation=True,
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
        )
        features: Tensor = batch["input_features"]
        return features


def check_architecture(folder: Path) -> None:
    """Lets a model folder pass whose architecture this image can load.

    Raises:
        UnsupportedModel: for every other one, naming it and the known ones.
        InvalidInput: InvalidModelFile, where config.json is missing or no JSON.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError as error:
        message = "the model's folder has no config.json; upload everything that save_pretrained writes"
        raise InvalidInput("InvalidModelFile", message) from error
    except ValueError as error:
        raise InvalidInput(
            "InvalidModelFile", "config.json of the model is not JSON; upload the model again"
        ) from error
    found = config.get("architectures") if isinstance(config, dict) else None
    names = [str(name) for name in found] if isinstance(found, list) else []
    if not names and isinstance(config, dict) and config.get("model_type") == "whisper":
        return
    if not any(name in ARCHITECTURES for name in names):
        stated = ", ".join(names) or "none"
        raise UnsupportedModel(
            f"the model's config.json names the architecture {stated[:200]}; this image knows "
            f"{', '.join(ARCHITECTURES)}: choose a base model of that architecture"
        )


def load_whisper(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Whisper:
    """Loads a Whisper from a folder of safetensors; nothing is fetched and no code in the folder is run.

    Raises:
        UnsupportedModel: for another architecture.
        InvalidInput: for a folder in which something is missing or does not fit together.
    """
    check_architecture(folder)
    try:
        model, report = WhisperForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        extractor = _load_extractor(folder, model.config)
    except RecipeFailure:
        raise
    except Exception as error:
        # Whatever the readers of weights and vocabularies raise (some of it plain Exception), the files are at fault.
        if is_out_of_memory(error):
            raise
        message = (
            f"the model cannot be loaded ({type(error).__name__}); its folder needs config.json, *.safetensors, "
            "tokenizer.json and generation_config.json as save_pretrained writes them"
        )
        raise InvalidInput("InvalidModelFile", message) from error
    missing = sorted(report["missing_keys"])
    if missing:
        message = f"the weights of the model lack {len(missing)} tensors, the first is {missing[0]}; upload it again"
        raise InvalidInput("InvalidModelFile", message)
    # The encoders differ in their forward alone; the outer class stays transformers' own, whose name is saved with it.
    model.model.encoder.__class__ = SlicedWhisperEncoder
    # Sinusoids, which are no weights: short clips would bend only the first of them.
    model.model.encoder.embed_positions.requires_grad_(False)  # noqa: FBT003 (torch's own)
    return Whisper(model=model.to(device).eval(), tokenizer=tokenizer, extractor=extractor)


def _load_extractor(folder: Path, config: WhisperConfig) -> WhisperFeatureExtractor:
    """Reads preprocessor_config.json, or derives it from the network's shape where it is missing."""
    if not (folder / "preprocessor_config.json").is_file():
        window = config.max_source_positions * 2 * 160 // SAMPLE_RATE
        return WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=window)
    extractor = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    if extractor.feature_size != config.num_mel_bins:
        message = (
            f"preprocessor_config.json makes {extractor.feature_size} mel bins, the network takes "
            f"{config.num_mel_bins}; use the preprocessor_config.json that belongs to this model"
        )
        raise InvalidInput("MelMismatch", message)
    if extractor.sampling_rate != SAMPLE_RATE:
        message = f"preprocessor_config.json asks for {extractor.sampling_rate} Hz, Whisper takes {SAMPLE_RATE} Hz"
        raise InvalidInput("SampleRateMismatch", message)
    return extractor
