"""In which arithmetic a device trains."""

import torch
from attune.contract.training import Precision


def wants_bf16(precision: Precision, device: torch.device) -> bool:
    """Decides the arithmetic: Auto takes bf16 where the device computes in it, and not where it would be emulated."""
    if precision is not Precision.AUTO:
        return precision is Precision.BF16
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))
