"""Adapters beside weights that are rounded to 4 bits (QLoRA, arXiv 2305.14314)."""

from pathlib import Path
from typing import Any, Final

import torch
from attune.contract.training import Lora
from peft import PeftModel
from torch import Tensor, nn

from attune_trainer.failures import InvalidInput, is_out_of_memory
from attune_trainer.modeling.artifact import Artifact
from attune_trainer.modeling.families import load_model
from attune_trainer.modeling.speech_model import SpeechModel
from attune_trainer.training.adapters import Adapters, linear_layers
from attune_trainer.training.export import clean_generation

# Sixteen levels spaced as a normal distribution's quantiles; the scales of blocks are themselves rounded to 8 bits.
_ROUNDING: Final = {"quant_type": "nf4", "compress_statistics": True}
_PROBE: Final = 64


class QuantisedAdapters(Adapters):
    """Adapters beside linear layers of 4 bits.

    What is exported computes what was trained: the adapters are merged into the rounded weights, not into those that
    the base model had before they were rounded.
    """

    def __init__(self, lora: Lora, device: torch.device) -> None:
        """Makes sure that the device computes with 4-bit weights.

        Raises:
            InvalidInput: QLoraUnsupported.
        """
        super().__init__(lora)
        self._library = _load_library(device)

    def attach(self, speech_model: SpeechModel) -> PeftModel:
        """Rounds the linear layers, and puts adapters on those that are asked for."""
        for name, layer in list(linear_layers(speech_model)):
            speech_model.model.set_submodule(name, self._quantise(layer))
        speech_model.model.is_loaded_in_4bit = True  # by this peft knows what its adapters stand beside
        return super().attach(speech_model)

    def export(
        self, model: PeftModel, speech_model: SpeechModel, folder: Path, *, base: Path, artifact: Artifact
    ) -> None:
        """Writes adapter/ and merged/, by way of a network of full precision with the rounded weights."""
        rounded = load_model(base, speech_model.model.device)
        clean_generation(rounded)
        for _, layer in linear_layers(rounded):
            layer.weight.data = self._round(layer.weight.data)
        plain = super().attach(rounded)
        self.load(plain, self.state(model))
        super().export(plain, rounded, folder, base=base, artifact=artifact)

    def _quantise(self, layer: nn.Linear) -> nn.Module:
        quantised: nn.Module = self._library.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.float32,  # autocast chooses a shorter one where it is wanted
            device="meta",
            **_ROUNDING,
        )
        quantised.weight = self._library.nn.Params4bit(layer.weight.data, requires_grad=False, **_ROUNDING)
        quantised.bias = layer.bias
        return quantised.to(layer.weight.device)

    def _round(self, weight: Tensor) -> Tensor:
        functional = self._library.functional
        rounded: Tensor = functional.dequantize_4bit(*functional.quantize_4bit(weight, **_ROUNDING))
        return rounded.to(weight.dtype)


def _load_library(device: torch.device) -> Any:
    """Imports bitsandbytes and rounds something with it: a package without kernels for the device imports well."""
    try:
        import bitsandbytes  # noqa: PLC0415 (no other method needs it)

        probe = torch.ones(_PROBE, _PROBE, device=device)
        bitsandbytes.functional.dequantize_4bit(*bitsandbytes.functional.quantize_4bit(probe, **_ROUNDING))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        message = (
            f"spec.method is QLora, but this image cannot compute with 4-bit weights on a device of type {device.type} "
            f"({type(error).__name__}): use an image with bitsandbytes and a GPU that it supports, or method Lora"
        )
        raise InvalidInput("QLoraUnsupported", message) from error
    return bitsandbytes
