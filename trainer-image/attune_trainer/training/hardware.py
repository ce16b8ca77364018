"""What a training process runs on, and how much memory it has needed."""

import resource
from typing import Final

import torch
from attune.contract.result import Hardware

from attune_trainer.processors import describe_processors

_PRECISIONS: Final = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def describe_hardware(device: torch.device, dtype: torch.dtype, processes: int) -> Hardware:
    """Names all that the last bit of a weight depends on, besides the run itself."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(describe_processors()["processor"])
    return Hardware(
        device=name[:128],
        precision=_PRECISIONS[dtype],
        processes=processes,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
    )


def peak_memory(device: torch.device, processes: int) -> int:
    """Gives the peak in bytes so far: of the fullest GPU, or on a CPU of all processes together.

    With several processes it is collective: each has to call it at the same point.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        mine = torch.cuda.max_memory_allocated(device)
    else:
        mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # from KiB (getrusage(2))
    if processes == 1:
        return mine
    shared = torch.tensor(mine, dtype=torch.double, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX if on_gpu else torch.distributed.ReduceOp.SUM)
    return int(shared)
