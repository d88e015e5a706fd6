"""Gradients sqrt(weight) (p - e_y) in the logits at labels y drawn from p, in Triton, for any class count.

Labels are found in float64 sums of float64 exponentials, so that no other backend draws another one. Up to NARROW classes a
program owns whole rows: logits once, then draw after draw. More classes: one launch leaves each tile's maximum and sum, a
second finds the tile and then the class of every draw (a row a program), a third writes. Bytes: logits once (twice for many
classes), 4 bytes an element written; no cumulative sums in memory, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles

# Not yet measured on a GPU.
NARROW = 1024  # classes that a program holds in registers, in float64
ELEMENTS = 1024  # of the narrow kernel's tile, at least
BLOCK, WARPS = 1024, 4  # classes a tile, and warps, of the wide ones


@triton.jit
def _weight(weight_ptr, row, stride_wr, inside):
    return tl.sqrt(tl.load(weight_ptr + row * stride_wr, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def _rows_kernel(
    x_ptr, u_ptr, weight_ptr, out_ptr, rows, classes, k_all,
    stride_xr, stride_xc, stride_uk, stride_ur, stride_wr, stride_ok,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows and all draws: x (R, C), u (K, R), out (K, R, C) contiguous but in K."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (lane < classes)[None, :]
    x_at = (row * stride_xr)[:, None] + (lane.to(tl.int64) * stride_xc)[None, :]
    x = tl.load(x_ptr + x_at, mask=inside, other=float("-inf")).to(tl.float64)
    top = tl.max(x, 1)
    e = tl.exp(x - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total, below = tl.sum(e, 1), tl.cumsum(e, 1)
    p = (e / total[:, None]).to(tl.float32)
    if WEIGHTED:
        weight = _weight(weight_ptr, row, stride_wr, row < rows)
    for j in range(k_all):
        k = tl.cast(j, tl.int64)
        u = tl.load(u_ptr + k * stride_uk + row * stride_ur, mask=row < rows, other=0.0).to(tl.float64)
        passed = (below <= (u * total)[:, None]) & inside
        label = tl.minimum(tl.sum(passed.to(tl.int32), 1), classes - 1)
        result = p - (lane[None, :] == label[:, None]).to(tl.float32)
        if WEIGHTED:
            result = result * weight[:, None]
        tl.store(out_ptr + k * stride_ok + row[:, None] * classes + lane[None, :], result, mask=inside)


@triton.jit
def _tiles_kernel(x_ptr, part_ptr, classes, steps, stride_xr, stride_xc, BLOCK: tl.constexpr):
    """One tile of one row: its maximum and its sum of exp(x - maximum), into part (R, steps, 2) float64."""
    row, step = tl.cast(tl.program_id(0) // steps, tl.int64), tl.program_id(0) % steps
    c = (step * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    x = tl.load(x_ptr + row * stride_xr + c * stride_xc, mask=c < classes, other=float("-inf")).to(tl.float64)
    top = tl.max(x, 0)
    part_ptr += (row * steps + step) * 2
    tl.store(part_ptr, top)
    tl.store(part_ptr + 1, tl.sum(tl.exp(x - tl.where(top == float("-inf"), 0.0, top)), 0))


@triton.jit
def _labels_kernel(
    x_ptr, u_ptr, part_ptr, whole_ptr, label_ptr, rows, classes, k_all, steps,
    stride_xr, stride_xc, stride_uk, stride_ur, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its shift and sum into whole (R, 2) float64, its labels into label (K, R). STEPS: a power of two."""
    row, lane, step = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK), tl.arange(0, STEPS)
    here = step < steps
    part_ptr += row * steps * 2
    m = tl.load(part_ptr + step * 2, mask=here, other=float("-inf"))
    top = tl.max(m, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    sums = tl.load(part_ptr + step * 2 + 1, mask=here, other=0.0) * tl.exp(m - shift)
    total, below = tl.sum(sums, 0), tl.cumsum(sums, 0)
    tl.store(whole_ptr + row * 2, shift)
    tl.store(whole_ptr + row * 2 + 1, total)
    for j in range(k_all):
        k = tl.cast(j, tl.int64)
        aim = tl.load(u_ptr + k * stride_uk + row * stride_ur).to(tl.float64) * total
        tile = tl.minimum(tl.sum(((below <= aim) & here).to(tl.int32), 0), steps - 1)
        before = tl.sum(tl.where(step < tile, sums, 0.0), 0)
        c = (tile * BLOCK + lane).to(tl.int64)
        inside = c < classes
        x = tl.load(x_ptr + row * stride_xr + c * stride_xc, mask=inside, other=float("-inf")).to(tl.float64)
        passed = (before + tl.cumsum(tl.exp(x - shift), 0) <= aim) & inside
        label = tl.minimum(tile * BLOCK + tl.sum(passed.to(tl.int32), 0), classes - 1)
        tl.store(label_ptr + k * rows + row, label)


@triton.jit
def _write_kernel(
    x_ptr, weight_ptr, whole_ptr, label_ptr, out_ptr, rows, classes, k_all, steps,
    stride_xr, stride_xc, stride_wr, stride_ok, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one row, all draws."""
    row, step = tl.cast(tl.program_id(0) // steps, tl.int64), tl.program_id(0) % steps
    c = step * BLOCK + tl.arange(0, BLOCK)
    inside, at = c < classes, c.to(tl.int64) * stride_xc
    x = tl.load(x_ptr + row * stride_xr + at, mask=inside, other=float("-inf")).to(tl.float32)
    shift, total = tl.load(whole_ptr + row * 2).to(tl.float32), tl.load(whole_ptr + row * 2 + 1).to(tl.float32)
    p = tl.exp(x - shift) / total
    if WEIGHTED:
        weight = _weight(weight_ptr, row, stride_wr, row < rows)
    for j in range(k_all):
        k = tl.cast(j, tl.int64)
        result = p - (c == tl.load(label_ptr + k * rows + row)).to(tl.float32)
        if WEIGHTED:
            result = result * weight
        tl.store(out_ptr + k * stride_ok + row * classes + c, result, mask=inside)


def supports(logits: Tensor, uniform: Tensor, *, weight: Tensor | None = None, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(logits)


def softmax_sample(logits: Tensor, uniform: Tensor, *, weight: Tensor | None = None, precision: str = "ieee") -> Tensor:
    """See `hvpfast.ops.softmax_sample`; results are float32 under every `precision`."""
    classes = logits.shape[-1]
    out = logits.new_empty(*uniform.shape, classes, dtype=torch.float32)
    if out.numel():
        rows = logits.numel() // classes
        x, u, to = logits.reshape(rows, classes), uniform.reshape(-1, rows), out.view(-1, rows, classes)
        with tiles.on_device(logits):
            launch(x, u, None if weight is None else weight.reshape(rows), to)
    return out


def launch(x: Tensor, u: Tensor, weight: Tensor | None, out: Tensor, *, narrow: int = NARROW) -> None:
    """x (R, C), u (K, R), weight (R,) or None, none of them empty -> out (K, R, C), contiguous."""
    (rows, classes), columns = x.shape, len(u)
    weighted, weight = weight is not None, x if weight is None else weight
    stride_w, stride_o = weight.stride(0) if weighted else 0, out.stride(0)
    if classes <= narrow:
        block = max(16, triton.next_power_of_2(classes))
        together = max(1, ELEMENTS // block)
        _rows_kernel[(triton.cdiv(rows, together),)](
            x, u, weight, out, rows, classes, columns, *x.stride(), *u.stride(), stride_w, stride_o,
            WEIGHTED=weighted, ROWS=together, BLOCK=block, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        return
    steps = triton.cdiv(classes, BLOCK)
    part = x.new_empty(rows, steps, 2, dtype=torch.float64)
    whole, labels = part.new_empty(rows, 2), x.new_empty(columns, rows, dtype=torch.int32)
    plain = {"BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": True}
    _tiles_kernel[(rows * steps,)](x, part, classes, steps, *x.stride(), **plain)
    _labels_kernel[(rows,)](
        x, u, part, whole, labels, rows, classes, columns, steps, *x.stride(), *u.stride(),
        STEPS=triton.next_power_of_2(steps), **plain,
    )  # fmt: skip
    _write_kernel[(rows * steps,)](
        x, weight, whole, labels, out, rows, classes, columns, steps, *x.stride(), stride_w, stride_o,
        WEIGHTED=weighted, **plain,
    )  # fmt: skip
