"""How long what a stack of convolutions without padding gives is; each is a pair of kernel and stride."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Kernels = Sequence[tuple[int, int]]


def convolved_length(lengths: Tensor, kernels: Kernels) -> Tensor:
    """Gives the length behind the stack: of 400 samples 1, of 720 samples 2, where the kernels are wav2vec2's."""
    for kernel, stride in kernels:
        lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
    return lengths


def shortest_input(kernels: Kernels) -> int:
    """Gives the fewest samples of which the stack makes anything: 400 for wav2vec2's kernels."""
    shortest = 1
    for kernel, stride in reversed(kernels):
        shortest = (shortest - 1) * stride + kernel
    return shortest


def kernels_of(convolutions: Iterable[torch.nn.Conv1d]) -> list[tuple[int, int]]:
    """Reads kernels and strides."""
    return [(one.kernel_size[0], one.stride[0]) for one in convolutions]
