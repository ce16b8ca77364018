"""DeepSpeed: the engine that trains a network, and how a network that is shared out becomes whole again."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Final

import deepspeed
import torch
from attune.contract.training import Offload
from deepspeed.accelerator import get_accelerator
from torch import nn

from attune_trainer.training.settings import TrainingSettings
from attune_trainer.training.weights import trained_parameters

# The ZeRO stage in which no process has the whole network.
SHARES_WEIGHTS: Final = 3


@contextlib.contextmanager
def distributed() -> Iterator[None]:
    """Joins the processes that train together, and leaves them."""
    # Shared-memory reductions are an extension that DeepSpeed compiles on first use; the image has no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def is_peer_lost(error: BaseException) -> bool:
    """Tells whether an exception, or one that led to it, means that another training process is no longer there."""
    reached: BaseException | None = error
    while reached is not None:
        # gloo has no class of its own: its errors name the source file that they come from.
        if isinstance(reached, torch.distributed.DistError) or "gloo/" in str(reached):
            return True
        reached = reached.__cause__ or reached.__context__
    return False


def build_engine(objective: nn.Module, settings: TrainingSettings, dtype: torch.dtype) -> Any:
    """Sets up DeepSpeed with torch's own optimiser, whose kernels are compiled already.

    Args:
        objective: gives the loss of a batch; owns the network that trains.
        settings: of the run.
        dtype: arithmetic of the forward and backward pass; weights and optimiser stay in fp32.
    """
    parameters, zero = settings.hyperparameters, settings.distributed.deepspeed
    optimizer = torch.optim.AdamW(
        list(trained_parameters(objective).values()),
        lr=float(parameters.learning_rate),
        weight_decay=float(parameters.weight_decay),
        fused=True,
    )
    vectors = [parameter.numel() for parameter in objective.parameters() if parameter.dim() <= 1]
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's bookkeeping only: batches vary in size
        "gradient_accumulation_steps": parameters.gradient_accumulation or 1,
        "gradient_clipping": float(parameters.max_grad_norm),
        "zero_optimization": {
            "stage": zero.zero_stage,
            # Norms and biases stay whole everywhere; matrices, those of adapters too, are shared out.
            "stage3_param_persistence_threshold": max(vectors, default=0),
            **({"offload_optimizer": {"device": "cpu"}} if zero.offload is Offload.OPTIMIZER else {}),
        },
        # Its own optimiser for the host has to be compiled, which the image cannot; torch's runs there as well.
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": dtype is not torch.float32, "dtype": str(dtype).removeprefix("torch.")},
        "steps_per_print": sys.maxsize,
    }
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    return engine


def copy_trained(source: nn.Module, target: nn.Module) -> None:
    """Copies what trains into a whole network of the same shape, from one of which each process may hold only a part.

    All processes have to call this at the same point.
    """
    own = dict(target.named_parameters())
    for name, parameter in trained_parameters(source).items():
        with deepspeed.zero.GatheredParameters([parameter]), torch.no_grad():
            own[name].copy_(parameter)
