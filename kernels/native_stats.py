"""Launcher of the CPU kernel of norm layers' statistics."""

from __future__ import annotations

import torch
from hvpfast.kernels.extensions import _modules
from hvpfast.kernels.native_cpu import _CPU_DTYPES, _CPU_PORTABLE, _cpu_dtype_reason, _cpu_is_portable

_KINDS = {None: 0, "layer": 1, "rms": 2}


def _by_feature(g: torch.Tensor, kind: str | None) -> bool:
    """Whether positions lie side by side: channels first."""
    return kind is None and g.shape[1] > 1 and g.stride(1) == 1 and g.stride(2) != 1


def cpu_norm_sample_stats(x, g, *, kind=None, eps=0.0, mean=None, rstd=None, precision="auto"):
    wide = torch.float64 if g.dtype is torch.float64 else torch.float32
    m, _, features = g.shape
    by_feature = _by_feature(g, kind)
    each = 2 if by_feature else 1
    given, strides = [], []
    for y in (mean, rstd):
        y = None if y is None else y.to(wide)
        given.append(y)
        strides += (0, 0) if y is None else (y.stride(d) if y.shape[d] > 1 else 0 for d in (0, each))
    norms, squares = (g.new_empty(2, size, dtype=wide) for size in (m, features))
    _modules["cpu"].norm_sample_stats(
        x.data_ptr(), x.shape, x.stride(), g.data_ptr(), g.shape, g.stride(), _CPU_DTYPES[g.dtype],
        (_KINDS[kind], eps, *(0 if y is None else y.data_ptr() for y in given), *strides, by_feature),
        norms.data_ptr(), squares.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return norms[0], norms[1], squares[0], squares[1]


def cpu_norm_sample_stats_supports(x, g, *, kind=None, eps=0.0, mean=None, rstd=None, precision="auto") -> str | None:
    if g.dtype not in _CPU_DTYPES:
        return _cpu_dtype_reason("g", g)
    if not hasattr(_modules["cpu"], "norm_sample_stats"):
        return "the compiled kernels are older than this file; build them again (pip install .)"
    if mean is None and rstd is None:
        return None
    over = 1 if _by_feature(g, kind) else 2
    for name, y in (("mean", mean), ("rstd", rstd)):
        if y is not None and y.shape[over] != 1:
            return f"{name} differs along axis {over}; for g in this layout the kernel takes one value for all of it"
    return None


def cpu_norm_sample_stats_worthwhile(x, g, *, kind=None, **_) -> str | None:
    if _cpu_is_portable():
        return _CPU_PORTABLE
    if g.numel() < 8192 and _by_feature(g, kind):  # 0.85x at (8, 16, 16), 1.6x at (64, 16, 512) and more (2026-11-21)
        return "few values, channels first: a call costs more than the passes that it spares"
    return None
