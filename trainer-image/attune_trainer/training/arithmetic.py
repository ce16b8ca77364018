"""In which arithmetic a device trains."""

import torch
from attune.contract.training import Precision

_STATED = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Decides the arithmetic: Auto takes bf16 where the device computes in it, and not where it would be emulated."""
    if precision in _STATED:
        return _STATED[precision]
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = torch.cpu.get_capabilities()
        able = bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))
    return torch.bfloat16 if able else torch.float32
