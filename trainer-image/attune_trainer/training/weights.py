"""Named weights: which train, what they look like, and a copy of them that nothing changes."""

from collections.abc import Mapping

from torch import Tensor, nn


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Gives the parameters that require a gradient, by name; one that two layers share has the first one's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_to_host(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies weights to the host."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in weights.items()}


def check_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Lets weights pass that have the names and shapes expected.

    Raises:
        ValueError: for others, naming the first that differs.
    """
    differing = sorted(set(expected) ^ set(found)) or sorted(
        name for name in expected if expected[name].shape != found[name].shape
    )
    if differing:
        raise ValueError(f"these are not the weights of this model: {differing[0]} differs")
