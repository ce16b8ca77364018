"""Moonshine (arXiv 2410.15608): an encoder over samples whose work grows with the clip, and a decoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, MoonshineForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder

from attune_trainer.modeling.convolutions import convolved_length, kernels_of, shortest_input
from attune_trainer.modeling.seq2seq import Seq2Seq
from attune_trainer.modeling.speech_model import (
    SAMPLE_RATE,
    Audio,
    check_sampling_rate,
    load_network,
    load_tokenizer,
)


class MaskedMoonshineEncoder(MoonshineEncoder):  # type: ignore[misc]
    """Moonshine's encoder, for which padding is nothing: the original normalises over it, too."""

    def forward(self, input_values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes samples of shape (clips, samples), of which each clip has its own length, shape (clips,).

        Gives hidden states of shape (clips, positions, units), and a mask of shape (clips, positions). A clip that
        fills its row gives what the original encoder gives.
        """
        kernels = kernels_of((self.conv1, self.conv2, self.conv3))
        lengths = lengths.clamp(min=shortest_input(kernels))
        hidden = nn.functional.tanh(self.conv1(input_values[:, None]))
        hidden = normalise_heard(self.groupnorm, hidden, convolved_length(lengths, kernels[:1]))
        hidden = nn.functional.gelu(self.conv2(hidden))
        hidden = nn.functional.gelu(self.conv3(hidden))
        frames = convolved_length(lengths, kernels)
        hidden = hidden.permute(0, 2, 1)
        heard = torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=heard)
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotations = self.rotary_emb(hidden, position_ids=places)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=places, position_embeddings=rotations)
        return self.layer_norm(hidden), heard


def normalise_heard(norm: nn.GroupNorm, hidden: Tensor, frames: Tensor) -> Tensor:
    """Normalises over all channels and the frames that are no padding, as `norm` does over all frames.

    Args:
        norm: of one group.
        hidden: shape (clips, channels, frames).
        frames: that are no padding, shape (clips,).
    """
    heard = (torch.arange(hidden.shape[2], device=hidden.device) < frames[:, None])[:, None]
    wide = hidden.float()
    count = (frames * hidden.shape[1])[:, None, None]
    mean = (wide * heard).sum(dim=(1, 2), keepdim=True) / count
    centred = wide - mean
    variance = (centred.square() * heard).sum(dim=(1, 2), keepdim=True) / count
    normalised = (centred * torch.rsqrt(variance + norm.eps)).to(hidden.dtype)
    return normalised * norm.weight[:, None] + norm.bias[:, None]


class Moonshine(Seq2Seq):
    """A loaded Moonshine."""

    reads_samples: ClassVar[bool] = True

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Loads a Moonshine from a folder of safetensors."""
        network, tokenizer, extractor = load_network(
            MoonshineForConditionalGeneration,
            folder,
            dtype,
            lambda _: (load_tokenizer(folder), _load_extractor(folder)),
            files="tokenizer.json, preprocessor_config.json and generation_config.json",
        )
        network.model.encoder.__class__ = MaskedMoonshineEncoder
        return cls(model=network.to(device).eval(), tokenizer=tokenizer, extractor=extractor)

    @property
    def positions(self) -> int:
        """How many tokens the decoder has places for."""
        return int(self.config.max_position_embeddings)

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of the layers that adapters can go on, the same in every block."""
        return ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")

    def prompt_of(self, language: str | None) -> list[int]:
        """Gives the token that every transcript starts with; each Moonshine knows one language."""
        del language
        return [int(self.config.decoder_start_token_id)]

    def suppressed(self) -> list[int]:
        """Lists ids that no transcript contains: every special token but the end."""
        return sorted(token for token in self.special_tokens() - {self.end} if token < self.vocabulary)

    def features(self, audio: Sequence[Audio], seconds: float) -> Tensor:
        """Gives samples of shape (clips, samples), each clip padded with silence."""
        # The mask: where it normalises clips, silence behind them is not to count.
        samples = round(seconds * SAMPLE_RATE)
        return self.extract(audio, samples, "input_values", return_attention_mask=True)

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gives what the encoder hears, and where that is no padding."""
        encoded: tuple[Tensor, Tensor] = self.model.model.encoder(features, lengths)
        return encoded


def _load_extractor(folder: Path) -> Any:
    extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    check_sampling_rate(extractor)
    return extractor
