"""Launchers of the CPU kernels over per-sample gradients g_m' a_m: norms, second moments, the gradients themselves."""

from __future__ import annotations

import torch
from hvpfast.kernels.extensions import _modules
from hvpfast.kernels.native_cpu import (
    _CPU_DTYPES,
    _CPU_PLAIN_PRODUCT,
    _CPU_PORTABLE,
    _CPU_PRECISIONS,
    _cpu_dtype_reason,
    _cpu_is_portable,
    _cpu_tier,
    _cpu_uses_amx,
)


def cpu_sample_norms_squared(a, g, *, precision="auto"):
    out = g.new_empty(g.shape[0], dtype=torch.float64 if g.dtype is torch.float64 else torch.float32)
    _modules["cpu"].sample_norms_squared(
        a.data_ptr(), a.shape, a.stride(), g.data_ptr(), g.shape, g.stride(), _CPU_DTYPES[a.dtype],
        out.data_ptr(), _CPU_PRECISIONS[precision], torch.get_num_threads(),
    )  # fmt: skip
    return out


def cpu_sample_norms_squared_supports(a, g, *, precision="auto") -> str | None:
    return None if a.dtype in _CPU_DTYPES else _cpu_dtype_reason("a", a)


def cpu_sample_norms_squared_worthwhile(a, g, *, precision="auto") -> str | None:
    if (_cpu_tier[0] == "portable") if _cpu_tier else _cpu_is_portable():
        return _CPU_PORTABLE
    (_, t, i), o = a.shape, g.shape[2]
    if t >= 256 and t * (i + o) >= 2 * i * o and not _cpu_uses_amx(a, precision):
        return _CPU_PLAIN_PRODUCT
    return None


def cpu_second_moment(a, g, *, out=None, precision="auto"):
    if out is None:
        shape = (g.shape[2], a.shape[2])
        out = g.new_empty(shape, dtype=torch.float64 if g.dtype is torch.float64 else torch.float32)
    _modules["cpu"].second_moment(
        a.data_ptr(), a.shape, a.stride(), g.data_ptr(), g.shape, g.stride(), _CPU_DTYPES[a.dtype],
        out.data_ptr(), out.stride(), _CPU_PRECISIONS[precision], torch.get_num_threads(),
    )  # fmt: skip
    return out


def cpu_second_moment_supports(a, g, *, out=None, precision="auto") -> str | None:
    return None if a.dtype in _CPU_DTYPES else _cpu_dtype_reason("a", a)


def _cpu_moments_worthwhile(a, g, c=None, *, out=None, precision="auto") -> str | None:
    if (_cpu_tier[0] == "portable") if _cpu_tier else _cpu_is_portable():
        return _CPU_PORTABLE
    t = a.shape[1]
    if (t == 1 or t >= 256) and not _cpu_uses_amx(a, precision):
        return _CPU_PLAIN_PRODUCT
    return None


cpu_second_moment_worthwhile = _cpu_moments_worthwhile


def cpu_sample_statistics(a, g, c=None, *, precision="auto"):
    (n, t, i), (m, _, o) = a.shape, g.shape
    norms, squares = cpu_sample_norms_squared(a, g, precision=precision), cpu_second_moment(a, g, precision=precision)
    rows = g.to(norms.dtype) if c is None else g.to(norms.dtype) * c.to(norms.dtype).reshape(m, 1, 1)
    rows = rows if m == n else rows.reshape(m // n, n, t, o).sum(0)  # those that share an input
    return norms, rows.reshape(n * t, o).T @ a.to(norms.dtype).reshape(n * t, i), squares


def cpu_sample_statistics_supports(a, g, c=None, *, precision="auto") -> str | None:
    return None if a.dtype in _CPU_DTYPES else _cpu_dtype_reason("a", a)


cpu_sample_statistics_worthwhile = _cpu_moments_worthwhile  # sample_norms_squared is slower nowhere else


def cpu_sample_grads(a, g, *, out=None, precision="auto"):
    if out is None:
        shape = (g.shape[0], g.shape[2], a.shape[2])
        out = g.new_empty(shape, dtype=torch.float64 if g.dtype is torch.float64 else torch.float32)
    _modules["cpu"].sample_grads(
        a.data_ptr(), a.shape, a.stride(), g.data_ptr(), g.shape, g.stride(), _CPU_DTYPES[a.dtype],
        out.data_ptr(), out.stride(), _CPU_PRECISIONS[precision], torch.get_num_threads(),
    )  # fmt: skip
    return out


def cpu_sample_grads_supports(a, g, *, out=None, precision="auto") -> str | None:
    if a.dtype not in _CPU_DTYPES:
        return _cpu_dtype_reason("a", a)
    if out is not None and out.numel() and out.untyped_storage().data_ptr() in (
        a.untyped_storage().data_ptr(), g.untyped_storage().data_ptr()
    ):  # fmt: skip
        return "out shares memory with a or g"
    return None


def cpu_sample_grads_worthwhile(a, g, *, out=None, precision="auto") -> str | None:
    if _cpu_is_portable():
        return _CPU_PORTABLE
    # Measured on a 2-core AVX-512 + AMX machine, 2026-11-21.
    (_, t, i), (m, _, o) = a.shape, g.shape
    size = m * o * i
    large = size * (8 if a.dtype is torch.float64 else 4) > 8 << 20
    if t == 1:
        return None if size >= 1 << 17 else "a small result: torch's call costs as little"
    if (a.dtype is torch.bfloat16 or (precision == "bf16x3" and t >= 32)) and _cpu_uses_amx(a, precision):
        return None
    if t > 64 or not large:
        return _CPU_PLAIN_PRODUCT
    return None


def cpu_rotated_second_moment(a, g, qa, qg, *, out=None, precision="auto"):
    wide = torch.float64 if a.dtype is torch.float64 else torch.float32
    if a.dtype is not torch.float32:  # what 16-bit data become when rotated is not split
        precision = "ieee"
    return cpu_second_moment(a.to(wide) @ qa.to(wide), g.to(wide) @ qg.to(wide), out=out, precision=precision)


def cpu_rotated_second_moment_supports(a, g, qa, qg, *, out=None, precision="auto") -> str | None:
    return None if a.dtype in _CPU_DTYPES else _cpu_dtype_reason("a", a)


def cpu_rotated_second_moment_worthwhile(a, g, qa, qg, *, out=None, precision="auto") -> str | None:
    if (_cpu_tier[0] == "portable") if _cpu_tier else _cpu_is_portable():
        return _CPU_PORTABLE
    t = a.shape[1]
    if (t == 1 or t >= 256) and (a.dtype is torch.bfloat16 or not _cpu_uses_amx(a, precision)):
        return _CPU_PLAIN_PRODUCT
    return None
