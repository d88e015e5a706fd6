"""What the launchers of the compiled CPU kernels share: codes of dtypes and precisions, the tier, and reasons."""

from __future__ import annotations

import torch
from hvpfast.kernels.extensions import _modules

_CPU_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CPU_PRECISIONS = {"auto": 0, "ieee": 1, "bf16x3": 2, "bf16": 3}

_CPU_PORTABLE = "this CPU offers only the portable tier, which is slower than torch's own kernels"
_CPU_PLAIN_PRODUCT = (
    "in full precision this is a plain matrix product, in which torch is as fast (0.85-0.98x, 2026-11-21)"
)
_cpu_tier: list[str] = []  # the tier when it was first asked for; a test that forces one asks for the backend by name


def _cpu_is_portable() -> bool:
    if not _cpu_tier:
        _cpu_tier.append(_modules["cpu"].tier())
    return _cpu_tier[0] == "portable"


def _cpu_uses_amx(x: torch.Tensor, precision: str) -> bool:
    """Whether AMX multiplies these data: bf16 exactly, float32 in halves unless full precision is asked for."""
    _cpu_is_portable()
    return _cpu_tier[0] == "amx" and (x.dtype is torch.bfloat16 or (x.dtype is torch.float32 and precision != "ieee"))


def _cpu_dtype_reason(name: str, x: torch.Tensor) -> str:
    return f"{name} is {x.dtype}; the kernel reads float64, float32, bfloat16 and float16"


def cpu_calls(known: dict[str, object]) -> object | None:
    """The compiled module, which answers in C what is asked on every call, once it knows torch's objects; None if it is older."""
    module = _modules["cpu"]
    if not hasattr(module, "learn"):
        return None
    module.learn(known)
    return module
