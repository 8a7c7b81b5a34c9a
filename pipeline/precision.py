"""When networks compute in bfloat16: on GPUs, and on CPUs with instructions for it."""

from __future__ import annotations

import functools

import torch


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 autocast if supported (GPUs; CPUs with avx512_bf16 or AMX, twice as fast), else disabled."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=_has_bfloat16(device))


def dtype_of(device: torch.device) -> torch.dtype:
    """What autocast computes in: weights that are never trained can be kept in it."""
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    if device.type != "cpu":
        return device.type == "cuda"
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
