"""Launchers of the CPU kernels of double backward passes."""

from __future__ import annotations

import torch
from hvpfast.kernels.extensions import _modules
from hvpfast.kernels.native_cpu import _CPU_DTYPES, _CPU_PORTABLE, _cpu_dtype_reason, _cpu_is_portable, _cpu_tier

_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "mish": 3, "softplus": 4}
_OLDER = "the compiled kernels are older than this file; build them again (pip install .)"


def cpu_activation_rop(x, g, c, *, activation, of="gx", precision="auto"):
    x, g, c = x.contiguous(), g.contiguous(), c.contiguous()
    made = {letter: x.new_empty(x.shape, dtype=torch.float32) for letter in of}
    at = (made[letter].data_ptr() if letter in made else 0 for letter in "gx")
    _modules["cpu"].activation_rop(
        _ACTIVATIONS[activation], x.data_ptr(), g.data_ptr(), c.data_ptr(), _CPU_DTYPES[x.dtype], x.numel(), *at,
        torch.get_num_threads(),
    )  # fmt: skip
    return tuple(made.values())


def cpu_activation_rop_supports(x, g, c, **_) -> str | None:  # every name spelt out costs a call 30 ns
    if x.dtype not in _CPU_DTYPES or x.dtype is torch.float64:
        return f"x is {x.dtype}; the kernel reads float32, bfloat16 and float16"
    return None if hasattr(_modules["cpu"], "activation_rop") else _OLDER


def cpu_activation_rop_worthwhile(x, g, c, **_) -> str | None:
    return _CPU_PORTABLE if ((_cpu_tier[0] == "portable") if _cpu_tier else _cpu_is_portable()) else None


def cpu_norm_rop(
    x, g, rstd, *, c=None, mean=None, weight=None, c_weight=None, c_bias=None, of="gxw", precision="auto"
):  # fmt: skip
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    mean, rstd = mean if mean is None else mean.to(wide), rstd.to(wide)
    given = [y if y is None else y.contiguous() for y in (x, g, c, weight, c_weight, c_bias, mean, rstd)]
    made = {letter: rstd.new_empty(x.shape[1:] if letter == "w" else x.shape) for letter in of}
    if x.numel():
        _modules["cpu"].norm_rop(
            tuple(0 if y is None else y.data_ptr() for y in given), _CPU_DTYPES[x.dtype], *x.shape,
            tuple(made[letter].data_ptr() if letter in made else 0 for letter in "gxw"), torch.get_num_threads(),
        )  # fmt: skip
    elif "w" in made:
        made["w"].zero_()
    return tuple(made.values())


def cpu_norm_rop_supports(x, g, rstd, **_) -> str | None:
    if x.dtype not in _CPU_DTYPES:
        return _cpu_dtype_reason("x", x)
    return None if hasattr(_modules["cpu"], "norm_rop") else _OLDER


def cpu_norm_rop_worthwhile(x, g, rstd, **_) -> str | None:
    return _CPU_PORTABLE if ((_cpu_tier[0] == "portable") if _cpu_tier else _cpu_is_portable()) else None
