"""Ways to adapt a base model: what each has to do, and which one a run asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from attune.contract.training import Method
from safetensors.torch import load_file, save_file
from torch import Tensor

from attune_trainer.modeling.artifact import Artifact
from attune_trainer.modeling.speech_model import SpeechModel
from attune_trainer.training.adapters import Adapters
from attune_trainer.training.full import AllWeights
from attune_trainer.training.quantised import QuantisedAdapters
from attune_trainer.training.settings import TrainingSettings


class TrainingMethod(Protocol):
    """How a network is made trainable, and what of it is kept."""

    def attach(self, speech_model: SpeechModel) -> Any:
        """Gives the module that trains: what requires a gradient in it is what the optimiser changes.

        Raises:
            InvalidInput: where the network does not have what is to be trained.
        """

    def state(self, model: Any) -> dict[str, Tensor]:
        """Copies the trained weights of such a module to the host, under the names that they are stored by."""

    def load(self, model: Any, state: Mapping[str, Tensor]) -> None:
        """Puts them back into such a module.

        Raises:
            ValueError: when names or shapes are not those of the module.
        """

    def export(self, model: Any, speech_model: SpeechModel, folder: Path, *, base: Path, artifact: Artifact) -> None:
        """Writes merged/, a complete transformers checkpoint, below a folder, and adapter/ where there is one.

        The module cannot be trained afterwards.
        """


def choose_method(settings: TrainingSettings, device: torch.device) -> TrainingMethod:
    """Gives the method that a run asks for.

    Raises:
        InvalidInput: QLoraUnsupported, where image or device cannot compute with 4-bit weights.
    """
    match settings.method:
        case Method.LORA:
            return Adapters(settings.lora)
        case Method.QLORA:
            return QuantisedAdapters(settings.lora, device)
        case Method.FULL:
            return AllWeights()


def save_state(state: Mapping[str, Tensor], file: Path) -> None:
    """Writes trained weights as safetensors; a file that is there is replaced only by a whole one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    save_file(dict(state), partial, metadata={"format": "pt"})
    partial.replace(file)


def load_state(file: Path) -> dict[str, Tensor]:
    """Reads trained weights."""
    return dict(load_file(file))
