"""Training of every weight."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from attune_trainer.modeling.artifact import Artifact
from attune_trainer.modeling.speech_model import SpeechModel
from attune_trainer.training.export import write_model
from attune_trainer.training.weights import check_shapes, copy_to_host, trained_parameters


class AllWeights:
    """Every weight trains; what comes out is the model itself, and no adapter."""

    def attach(self, speech_model: SpeechModel) -> nn.Module:
        """Gives the network as it is; what was frozen when it was loaded, such as Whisper's sinusoids, stays so."""
        model: nn.Module = speech_model.model
        return model

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Copies the weights to the host, those that are shared by two layers once."""
        return copy_to_host(trained_parameters(model))

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Puts weights back.

        Raises:
            ValueError: when names or shapes are not those of the model.
        """
        own = trained_parameters(model)
        check_shapes(own, state)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def export(
        self, model: nn.Module, speech_model: SpeechModel, folder: Path, *, base: Path, artifact: Artifact
    ) -> None:
        """Writes merged/ alone."""
        write_model(model, speech_model, folder, base=base, artifact=artifact)
