"""Launchers of the CPU kernels of layers' linear maps, which multiply in bf16x3 on AMX and nowhere else."""

from __future__ import annotations

import math

import torch
from hvpfast.kernels.extensions import _modules
from hvpfast.kernels.native_cpu import _cpu_is_portable, _cpu_tier

_FEW = "few rows or features: torch's product is as fast"
_TERMS = 32  # of a sum, below which its error in bf16x3 may exceed the bound that is stated for a mean
_SHORT = f"sums of fewer than {_TERMS} products: bf16x3 would not keep its bound"
_MOST = 1 << 25  # weights beyond which packed ones would not be kept from call to call


def _cpu_reduced_reason(x: torch.Tensor, precision: str, name: str) -> str | None:
    if x.dtype is not torch.float32:
        return f"x is {x.dtype}; the kernel takes float32"
    if precision not in ("auto", "bf16x3"):
        return f"precision is {precision!r}; the kernel multiplies in bf16x3"
    if _modules["cpu"].tier() != "amx":
        return f"the tier is {_modules['cpu'].tier()}; the kernel needs AMX"
    return None if hasattr(_modules["cpu"], name) else "the compiled kernels are older than this file; build them again"


def _cpu_without_amx(precision: str) -> bool:
    _cpu_is_portable()
    return _cpu_tier[0] != "amx" or precision not in ("auto", "bf16x3")


def cpu_matmul(x, w, *, bias=None, precision="auto"):
    rows, columns = x.shape[0], w.shape[1]
    out = x.new_empty(rows, columns)
    if out.numel() and x.shape[1]:
        shift = None if bias is None else bias.contiguous()
        done = _modules["cpu"].matmul(
            x.data_ptr(), *x.stride(), w.data_ptr(), *w.stride(), 0 if shift is None else shift.data_ptr(),
            out.data_ptr(), columns, rows, x.shape[1], columns, torch.get_num_threads(),
        )  # fmt: skip
        if done:
            return out
    # Nothing to add up, or values that bf16 does not hold.
    return torch.mm(x, w, out=out) if bias is None else torch.addmm(bias, x, w, out=out)


def cpu_matmul_supports(x, w, *, bias=None, precision="auto") -> str | None:
    return _cpu_reduced_reason(x, precision, "matmul") or (_SHORT if 0 < x.shape[1] < _TERMS else None)


def cpu_matmul_worthwhile(x, w, *, bias=None, precision="auto") -> str | None:
    if _cpu_without_amx(precision):
        return "without AMX, or in full precision, torch's product is as fast"
    (rows, deep), columns = x.shape, w.shape[1]
    # 0.4x to 0.8x with 10 features on either side, 0.5x to 0.9x of 64 rows, 1.2x of 128, 1.6x to 2.5x above (2 cores, 2026-11-22)
    few = rows < 192 or min(deep, columns) < 48 or rows * deep * columns < 1 << 23
    return _FEW if few or deep * columns > _MOST else None


def _each(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes // len(value))


def cpu_convolve(x, w, *, bias=None, stride=1, padding=0, dilation=1, size=None, precision="auto"):
    axes = x.dim() - 2
    each = [_each(a, axes) for a in (stride, padding, dilation)]
    kernel, extents = w.shape[2:], x.shape[2:]
    places = tuple(size) if size is not None else tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(extents, kernel, *each, strict=True)
    )  # fmt: skip
    features = w.shape[0] if size is None else w.shape[1]
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    out = x.new_empty((x.shape[0], features, *places))
    if out.numel() and x.numel():
        shift = None if bias is None else bias.contiguous()
        shapes = list(zip(extents, kernel, *each, places, strict=True))
        strides, of_weights = x.stride()[:-1], w.stride()
        if axes == 1:  # images of one row
            shapes, strides = [(1, 1, 1, 0, 1, 1), *shapes], (*strides, 0)
            of_weights = (*of_weights[:2], 0, of_weights[2])
        done = _modules["cpu"].convolve(
            x.data_ptr(), w.data_ptr(), 0 if shift is None else shift.data_ptr(), out.data_ptr(), size is not None,
            x.shape[0], x.shape[1], features, tuple(shapes), strides, of_weights, torch.get_num_threads(),
        )  # fmt: skip
        if done:
            return out
    if size is None:
        return (torch.conv1d, torch.conv2d)[axes - 1](x, w, bias, *each)
    given = x.new_empty(()).expand(x.shape[0], features, *places)
    made = torch.ops.aten.convolution_backward(
        x, given, w, None, each[0], each[1], each[2], False, [0] * axes, 1, [True, False, False]
    )[0]
    return made if bias is None else made.add_(bias.view(-1, *[1] * axes))


def cpu_convolve_supports(x, w, *, bias=None, stride=1, padding=0, dilation=1, size=None, precision="auto"):
    reason = _cpu_reduced_reason(x, precision, "convolve")
    if reason is not None:
        return reason
    if x.dim() > 4:
        return "the kernel takes one or two spatial axes"
    axes = x.dim() - 2
    if size is not None and any(
        s > 1 and d > 1 for s, d in zip(_each(stride, axes), _each(dilation, axes), strict=True)
    ):
        return "the transpose of a dilated convolution with a stride"
    if 0 < x.shape[1] * w.shape[2:].numel() < _TERMS:
        return _SHORT
    return None if 16 * max(map(abs, w.stride())) < 1 << 31 else "w's elements are too far apart"


def cpu_convolve_worthwhile(x, w, *, bias=None, stride=1, padding=0, dilation=1, size=None, precision="auto"):
    if _cpu_without_amx(precision):
        return "without AMX, or in full precision, torch's convolution is as fast"
    # 0.6x with 3 channels, 1.0x with 16, 1.3x to 5.7x above (2 cores, 2026-11-22); tiles have 16 positions and 32 features
    n, (one, two), positions = x.shape[0], w.shape[:2], x.shape[2:].numel()
    if size is None and stride != 1:  # the transpose's tiles, too, lie a stride apart
        positions //= math.prod(_each(stride, x.dim() - 2))
    whole = -(-positions // 16) * 16
    work = n * w.numel() * positions
    few = min(one, two) < 24 or -(-one // 32) * -(-two // 32) * 1024 > 1.6 * one * two or work < 1 << 24
    return _FEW if few or whole > 1.5 * positions or n * positions < 512 or w.numel() > _MOST else None
