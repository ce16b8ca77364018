"""Elastic weight consolidation: what an old domain depends on is changed least.

Kirkpatrick et al. (2017, arXiv 1612.00796) add lambda / 2 x sum of F (W - W0)^2 to the loss, F being the Fisher
information of the old data about each weight. Here F is not taken as diagonal but as the product of two covariances, of
a layer's inputs and of the loss's gradients at its outputs (Martens & Grosse 2015, arXiv 1503.05671; for this purpose
Ritter et al. 2018, arXiv 1805.07810). That costs two square matrices for each layer, and needs no gradient of a frozen
or quantised weight. W - W0 is what an adapter adds to a layer's weights: of rank r, it takes only r x r products
in a training step. Where all weights train, it is taken of the linear layers' matrices, which are kept as they began.

The penalty is divided by the same expression of W0 itself: it is the share of what these layers tell of old audio that
has changed, whatever the model's size and scale. That is what makes one lambda fit more than one model.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from attune_trainer.modeling.speech_model import IGNORED, SpeechModel
from attune_trainer.training.adapters import linear_layers

_ADAPTER = "default"


@dataclass
class _Covariances:
    """Sums over the positions that count: of inputs, of gradients at the outputs, and of outputs without bias."""

    inputs: Tensor
    gradients: Tensor
    outputs: Tensor
    positions: int = 0


class Importance:
    """Collects, batch by batch, how much the loss depends on the linear layers that train."""

    def __init__(self, model: nn.Module, speech_model: SpeechModel) -> None:
        """Begins with nothing.

        Args:
            model: what trains, and has not been trained yet.
            speech_model: whose network it is.
        """
        adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        self._layers: dict[str, Any] = adapted or dict(linear_layers(speech_model))
        self._sums: dict[str, _Covariances] = {}

    def add(self, loss: nn.Module, features: Tensor, inputs: Tensor, targets: Tensor, lengths: Tensor) -> None:
        """Adds a batch, as TranscriptionLoss takes it: runs it forward and back, and changes no weight."""
        caught: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

        def catch(name: str) -> Any:
            def hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                # Added zeros have the output's gradient, and leave the weight without one.
                probe = torch.zeros_like(output, requires_grad=True)
                plain = output.detach() if module.bias is None else output.detach() - module.bias.detach()
                caught[name] = (inputs[0].detach(), plain, probe)
                return output + probe

            return hook

        with ExitStack() as hooks, torch.enable_grad():
            for name, layer in self._layers.items():
                linear = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
                hooks.enter_context(linear.register_forward_hook(catch(name)))
            # The sum over tokens: a mean would make much of a batch that has few.
            value = loss(features, inputs, targets, lengths) * (targets != IGNORED).sum()
            gradients = torch.autograd.grad(value, [probe for _, _, probe in caught.values()])
        for (name, (read, said, _)), gradient in zip(caught.items(), gradients, strict=True):
            self._take(name, *(one.flatten(0, -2).float() for one in (read, said, gradient)))

    def _take(self, name: str, inputs: Tensor, outputs: Tensor, gradients: Tensor) -> None:
        used = gradients.any(dim=-1)  # what lies behind the end of a transcript has no say in the loss
        inputs, outputs, gradients = inputs[used], outputs[used], gradients[used]
        new = _Covariances(inputs.T @ inputs, gradients.T @ gradients, outputs.T @ outputs, positions=int(used.sum()))
        old = self._sums.get(name)
        if old is not None:
            new = _Covariances(
                old.inputs + new.inputs,
                old.gradients + new.gradients,
                old.outputs + new.outputs,
                old.positions + new.positions,
            )
        self._sums[name] = new

    def share(self) -> None:
        """Adds up what all processes have collected."""
        for one in self._sums.values():
            positions = torch.tensor(float(one.positions), device=one.inputs.device, dtype=torch.double)
            for sums in (one.inputs, one.gradients, one.outputs, positions):
                torch.distributed.all_reduce(sums)
            one.positions = int(positions)

    def consolidate(self, strength: float) -> "Consolidation":
        """Gives the penalty that follows, normalised."""
        heard = {name: one for name, one in self._sums.items() if one.positions}
        whole = sum(float((one.gradients * one.outputs).sum()) / one.positions for one in heard.values())
        return Consolidation(
            [
                _hold(self._layers[name], one.inputs / one.positions, one.gradients / whole)
                for name, one in heard.items()
            ],
            strength,
        )


@dataclass(frozen=True)
class _Held:
    """A layer and both covariances: of inputs, shape (in, in), and of gradients, shape (out, out)."""

    layer: Any
    inputs: Tensor
    gradients: Tensor

    def measure(self) -> Tensor:
        """Gives trace(D' G D C) for a change D of the weights, input covariance C and gradient covariance G.

        For an adapter D = B A (B: out x r, A: r x in) it is trace(B' G B A C A'), in two r x r products.
        """
        down, up = self.layer.lora_A[_ADAPTER].weight.float(), self.layer.lora_B[_ADAPTER].weight.float()
        products: Tensor = (up.T @ self.gradients @ up) * (down @ self.inputs @ down.T)
        scale: float = self.layer.scaling[_ADAPTER]
        return products.sum() * scale**2


@dataclass(frozen=True)
class _HeldWhole(_Held):
    """The same of a layer that trains itself, with its weights as they began."""

    start: Tensor

    def measure(self) -> Tensor:
        """Gives the same, in products of the layer's own size."""
        change = self.layer.weight.float() - self.start
        products: Tensor = (self.gradients @ change @ self.inputs) * change
        return products.sum()


def _hold(layer: Any, inputs: Tensor, gradients: Tensor) -> _Held:
    if isinstance(layer, LoraLayer):
        return _Held(layer, inputs, gradients)
    return _HeldWhole(layer, inputs, gradients, layer.weight.detach().float().clone())


class Consolidation:
    """The penalty on changed weights: lambda / 2 x the share that has changed of what layers tell of old audio."""

    def __init__(self, held: Iterable[_Held], strength: float) -> None:
        self._held = tuple(held)
        self._strength = strength

    def penalty(self) -> Tensor:
        """Gives the penalty as a scalar that can be differentiated; 0 where nothing has changed."""
        return 0.5 * self._strength * torch.stack([one.measure() for one in self._held]).sum()
