"""Launchers of the compiled kernels for the CPU (`_cpu`): they check, allocate, and hand over pointers and strides."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from hvpfast.kernels.extensions import _load, _modules, _openmp_reason, build_report, missing  # noqa: F401 (re-exported)
from hvpfast.kernels.native_cpu import (
    _CPU_DTYPES,
    _CPU_PORTABLE,
    _CPU_PRECISIONS,
    _cpu_dtype_reason,
    _cpu_is_portable,
    _cpu_tier,
    cpu_calls,  # noqa: F401 (re-exported)
)
from hvpfast.kernels.native_cuda import (  # noqa: F401 (re-exported: dispatch looks here)
    cuda_cg_update,
    cuda_cg_update_supports,
    cuda_cg_update_worthwhile,
    cuda_gram,
    cuda_gram_supports,
    cuda_gram_worthwhile,
    cuda_reorthogonalize,
    cuda_reorthogonalize_supports,
    cuda_reorthogonalize_worthwhile,
)
from hvpfast.kernels.native_layers import (  # noqa: F401 (re-exported)
    cpu_convolve,
    cpu_convolve_supports,
    cpu_convolve_worthwhile,
    cpu_matmul,
    cpu_matmul_supports,
    cpu_matmul_worthwhile,
)
from hvpfast.kernels.native_rop import (  # noqa: F401 (re-exported)
    cpu_activation_rop,
    cpu_activation_rop_supports,
    cpu_activation_rop_worthwhile,
    cpu_norm_rop,
    cpu_norm_rop_supports,
    cpu_norm_rop_worthwhile,
)
from hvpfast.kernels.native_samples import (  # noqa: F401 (re-exported)
    cpu_rotated_second_moment,
    cpu_rotated_second_moment_supports,
    cpu_rotated_second_moment_worthwhile,
    cpu_sample_grads,
    cpu_sample_grads_supports,
    cpu_sample_grads_worthwhile,
    cpu_sample_norms_squared,
    cpu_sample_norms_squared_supports,
    cpu_sample_norms_squared_worthwhile,
    cpu_sample_statistics,
    cpu_sample_statistics_supports,
    cpu_sample_statistics_worthwhile,
    cpu_second_moment,
    cpu_second_moment_supports,
    cpu_second_moment_worthwhile,
)
from hvpfast.kernels.native_stats import (  # noqa: F401 (re-exported)
    cpu_norm_sample_stats,
    cpu_norm_sample_stats_supports,
    cpu_norm_sample_stats_worthwhile,
)


def _cpu_rows(x: torch.Tensor) -> tuple[int, int, int, int, int, int] | None:
    """x (..., I) as rows: (outer, inner, I, outer stride, inner stride, feature stride); None: more than two levels."""
    cols = x.shape[-1]
    if x.is_contiguous():
        return 1, x.numel() // cols if cols else x.shape[:-1].numel(), cols, 0, cols, 1
    levels: list[list[int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 0:
            return 1, 0, cols, 0, 0, 1
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = [levels[-1][0] * size, stride]
        else:
            levels.append([size, stride])
    if len(levels) > 2:
        return None
    (outer, outer_stride), (inner, inner_stride) = ([[1, 0], [1, 0]] + levels)[-2:]
    return outer, inner, cols, outer_stride, inner_stride, x.stride(-1)


def cpu_gram(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, mirror=True, precision="auto"):
    width = x.shape[-1] + ones_column
    if out is None:
        out = x.new_empty((width, width), dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    rows = _cpu_rows(x)
    if rows is None:  # the reference's reshape copies here too
        x = x.contiguous()
        rows = _cpu_rows(x)
    _modules["cpu"].gram(
        x.data_ptr(), _CPU_DTYPES[x.dtype], *rows, ones_column, alpha, beta,
        out.data_ptr(), *out.stride(), mirror, _CPU_PRECISIONS[precision], torch.get_num_threads(),
    )  # fmt: skip
    return out


def cpu_gram_supports(
    x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, mirror=True, precision="auto"
) -> str | None:
    return None if x.dtype in _CPU_DTYPES else _cpu_dtype_reason("x", x)


def cpu_gram_worthwhile(
    x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, mirror=True, precision="auto"
) -> str | None:
    features = x.shape[-1]
    if features == 0 or x.dtype not in _CPU_DTYPES:
        return None
    turned = x.dim() == 2 and x.stride(0) == 1 and features > 1 and x.stride(1) != 1
    return _modules["cpu"].gram_slower(
        x.numel() // features, features, turned, not mirror, _CPU_DTYPES[x.dtype], _CPU_PRECISIONS[precision]
    )


def cpu_sample_gram(a, g, a2=None, g2=None, *, precision="auto"):
    products, columns = cpu_gram(g[:, 0].T, precision=precision), g.shape[0] // a.shape[0] if a.shape[0] else 1
    of_inputs = cpu_gram(a[:, 0].T, precision=precision)
    return products.mul_(of_inputs if columns == 1 else of_inputs.repeat(columns, columns))


def cpu_sample_gram_supports(a, g, a2=None, g2=None, *, precision="auto") -> str | None:
    if a.dtype not in _CPU_DTYPES:
        return _cpu_dtype_reason("a", a)
    if a2 is not None:
        return "a2 and g2 are given; the kernel multiplies a set of samples with itself"
    return None if a.shape[1] == 1 else "the kernel takes one position (T = 1)"


def cpu_sample_gram_worthwhile(a, g, a2=None, g2=None, *, precision="auto") -> str | None:
    if _cpu_is_portable():
        return _CPU_PORTABLE
    if a.shape[2] + g.shape[2] < 512:  # 0.8x at 64 + 10 features, 1.15x at 256 + 256, 1.6x above (2026-11-21)
        return "few features: torch's two products are as fast"
    return None


def cpu_softmax_hvp_worthwhile(logits, v, *, weight=None, precision="auto") -> str | None:
    if (_cpu_tier[0] == "portable") if _cpu_tier else _cpu_is_portable():
        return _CPU_PORTABLE
    if logits.shape[-1] < 128 and v.numel() < 8 * logits.numel():
        return "few classes and vectors: a row is less than it costs to begin one (0.5x at 10 classes, 2026-11-21)"
    return None


def cpu_softmax_hvp(logits, v, *, weight=None, precision="auto"):
    classes = logits.shape[-1]
    out = v.new_empty(v.shape, dtype=torch.float64 if v.dtype is torch.float64 else torch.float32)
    logits, v = logits.contiguous(), v.contiguous()
    if weight is not None:
        weight = weight.contiguous()
    rows = logits.numel() // classes if classes else 0
    _modules["cpu"].softmax_hvp(
        logits.data_ptr(), v.data_ptr(), 0 if weight is None else weight.data_ptr(), 1, _CPU_DTYPES[v.dtype],
        rows, v.numel() // (rows * classes) if rows else 0, classes, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def cpu_softmax_hvp_supports(logits, v, *, weight=None, precision="auto") -> str | None:
    return None if logits.dtype in _CPU_DTYPES else _cpu_dtype_reason("logits", logits)


class _Convolution(NamedTuple):
    """What a convolution's Gram matrix needs to know of a shape and geometry."""

    axes: tuple[tuple[int, ...], ...]  # three of (size, kernel, stride, dilation, padding before, positions)
    channels: int  # of a group
    positions: int
    features: int
    slower: str | None  # why torch is as fast


def _cpu_convolution(shape, kernel_size, stride=1, padding=0, dilation=1, groups=1) -> _Convolution:
    try:
        return _cpu_convolution_kept(shape, kernel_size, stride, padding, dilation, groups)
    except TypeError:  # a list among them
        return _cpu_convolution_of(shape, kernel_size, stride, padding, dilation, groups)


def _cpu_convolution_of(shape, kernel_size, stride, padding, dilation, groups) -> _Convolution:
    dims = len(shape) - 2

    def each(value) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * dims if len(values) == 1 else values

    kernel, steps, spread = each(kernel_size), each(stride), each(dilation)
    reach = [d * (k - 1) for k, d in zip(kernel, spread, strict=True)]
    if isinstance(padding, str):
        around = reach if padding == "same" else [0] * dims
        before = [r // 2 for r in around]
    else:
        before = each(padding)
        around = [2 * p for p in before]
    axes = [
        (size, k, s, d, p, (size + both - r - 1) // s + 1)
        for size, k, s, d, p, both, r in zip(shape[2:], kernel, steps, spread, before, around, reach, strict=True)
    ]
    channels, positions, offsets = shape[1] // groups, math.prod(axis[5] for axis in axes), math.prod(kernel)
    slower = None  # measured on two threads of a 2-core AVX-512 + AMX machine, 2026-11-21
    if shape[0] * positions < 64 and channels * offsets >= 96 and offsets > 1:
        slower = "fewer than 64 patches of 96 features or more: both write the result, and little else is to do"
    return _Convolution(
        ((1, 1, 1, 1, 0, 1),) * (3 - dims) + tuple(axes), channels, positions, channels * offsets, slower
    )


_cpu_convolution_kept = functools.lru_cache(1024)(_cpu_convolution_of)
_cpu_conv_form = 0  # 1 to 3: one form of the kernel wherever it can run (tests)


def cpu_conv_gram(
    x, kernel_size, *, stride=1, padding=0, dilation=1, groups=1, ones_column=False, kfac_approx="expand",
    out=None, alpha=1.0, beta=0.0, precision="auto",
):  # fmt: skip
    axes, channels, positions, features, _ = _cpu_convolution(x.shape, kernel_size, stride, padding, dilation, groups)
    width = features + bool(ones_column)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    if out is None:
        out = x.new_empty((width, width) if groups == 1 else (groups, width, width), dtype=wide)
    if kfac_approx == "reduce":  # the mean patch of a sample: sums of its pixels, one axis after another
        means = _cpu_patch_sums(x.to(wide), axes, 2).reshape(x.shape[0], groups, features).div_(positions)
        for group in range(groups):
            cpu_gram(
                means[:, group], out=out if groups == 1 else out[group], alpha=alpha, beta=beta,
                ones_column=ones_column, precision=precision,
            )  # fmt: skip
        return out
    if features == channels and positions > 1 and not isinstance(padding, str):
        steps = tuple(axis[2] if axis[4] == 0 else 1 for axis in axes)[5 - x.dim() :]
        if max(steps) > 1 and max(axis[4] for axis in axes) == 0:  # the pixels that are seen, side by side
            x = x[(slice(None), slice(None), *(slice(None, None, step) for step in steps))].contiguous()
            axes = _cpu_convolution(x.shape, 1)[0]
    few = features == channels >= 96 and x.shape[0] * positions < 64 and groups == 1 and not _cpu_conv_form
    if few and all(axis[2] == 1 and axis[4] == 0 for axis in axes):  # writing the result is most of it, as in `gram`
        rows, block = x.movedim(1, -1).reshape(-1, channels).to(wide), out[:channels, :channels]
        torch.addmm(block, rows.T, rows, beta=beta, alpha=alpha, out=block)
    else:
        _modules["cpu"].conv_gram(
            x.data_ptr(), _CPU_DTYPES[x.dtype], x.shape[0], groups, channels, axes, x.stride(), alpha, beta,
            out.data_ptr(), out.stride(), _CPU_PRECISIONS[precision], torch.get_num_threads(), _cpu_conv_form,
        )  # fmt: skip
    if ones_column:
        blocks = out if groups > 1 else out[None]
        totals = _cpu_patch_sums(x.sum(0, dtype=wide), axes, 1).view(groups, features).mul_(alpha)
        count = alpha * x.shape[0] * positions
        if beta == 0:
            blocks[:, -1, :-1], blocks[:, :-1, -1], blocks[:, -1, -1] = totals, totals, count
        else:
            blocks[:, -1, :-1].mul_(beta).add_(totals)
            blocks[:, :-1, -1].mul_(beta).add_(totals)
            blocks[:, -1, -1].mul_(beta).add_(count)
    return out


def _cpu_patch_sums(image: torch.Tensor, axes, lead: int) -> torch.Tensor:
    """image (*lead, *spatial) -> (*lead, offsets), flattened: for every kernel offset, the sum of the values it meets."""
    for axis, (size, k, s, d, p, positions) in enumerate(axes[3 - (image.dim() - lead) :], start=lead):
        taken = image.new_zeros(size, k)  # taken[r, u] = 1 where offset u meets input position r
        for u in range(k):
            first = u * d - p
            skipped = max(0, -(first // s))
            taken[first + skipped * s : max(0, first + (positions - 1) * s + 1) : s, u] = 1
        image = torch.movedim(torch.tensordot(image, taken, dims=([axis], [0])), -1, axis)
    return image.flatten()


def cpu_conv_gram_supports(x, kernel_size, **_) -> str | None:  # every name spelt out costs a call 30 ns
    if x.dtype not in _CPU_DTYPES:
        return _cpu_dtype_reason("x", x)
    return "x is empty" if x.numel() == 0 else None


def cpu_conv_gram_worthwhile(
    x, kernel_size, *, stride=1, padding=0, dilation=1, groups=1, kfac_approx="expand", **_
) -> str | None:
    if (_cpu_tier[0] == "portable") if _cpu_tier else _cpu_is_portable():
        return _CPU_PORTABLE
    if kfac_approx == "reduce":
        return None
    try:
        return _cpu_convolution_kept(x.shape, kernel_size, stride, padding, dilation, groups).slower
    except TypeError:
        return _cpu_convolution_of(x.shape, kernel_size, stride, padding, dilation, groups).slower
