"""Hessian of softmax cross-entropy in the logits times vectors, weight (diag p - p p') v a row, in Triton, for any class count;
and its root diag(q) - p q', q = sqrt(p), and the root's transpose (`softmax_root.py`), which differ in what multiplies v.

Up to NARROW classes a program owns whole rows: their softmax once, then vector after vector, everything read once. More
classes: one pass finds a row's maximum m, sum of exp(x - m) and of exp(x - m) v (online, lane by lane, so that nothing waits
for a reduction), a second writes; where rows are too few to fill the GPU, each is split, and the passes are two launches.
Bytes: logits and v read once (twice for many classes, partly from L2), 4 bytes an element written. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles

# Not yet measured on a GPU.
NARROW = 8192  # classes that a program holds in registers
ELEMENTS = 2048  # of the narrow kernel's tile, at least
BLOCK, WARPS = 2048, 8  # classes a step, and warps, of the wide one
MOST_SPLITS = 64

HESSIAN, ROOT, TRANSPOSE = 0, 1, 2  # what is multiplied with: p (v - p'v), q v - p (q'v), or q (v - p'v)


@triton.jit
def _rows_kernel(
    x_ptr, v_ptr, weight_ptr, out_ptr, rows, classes, k_all, k_each,
    stride_xr, stride_xc, stride_vk, stride_vr, stride_vc, stride_wr, stride_ok,
    KIND: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows and k_each of the vectors: x (R, C), v (K, R, C), out (K, R, C) contiguous but in K."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    c = lane.to(tl.int64)
    inside = (row < rows)[:, None] & (lane < classes)[None, :]
    x_at = (row * stride_xr)[:, None] + (c * stride_xc)[None, :]
    x = tl.load(x_ptr + x_at, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 1)
    x -= tl.where(top == float("-inf"), 0.0, top)[:, None]
    e = tl.exp(x)
    total = tl.sum(e, 1)[:, None]
    outer, inner = e / total, e / total
    if KIND != 0:
        outer = tl.exp(0.5 * x) / tl.sqrt(total)
        if KIND == 1:
            inner = outer
    if WEIGHTED:
        factor = tl.load(weight_ptr + row * stride_wr, mask=row < rows, other=0.0).to(tl.float32)
        if KIND != 0:
            factor = tl.sqrt(factor)
    v_at = (row * stride_vr)[:, None] + (c * stride_vc)[None, :]
    for j in range(tl.program_id(1) * k_each, min((tl.program_id(1) + 1) * k_each, k_all)):
        k = tl.cast(j, tl.int64)
        v = tl.load(v_ptr + k * stride_vk + v_at, mask=inside, other=0.0).to(tl.float32)
        dot = tl.sum(tl.where(inside, inner * v, 0.0), 1)[:, None]  # past the end of a row with inf or NaN, p is NaN
        if KIND == 1:
            result = outer * (v - outer * dot)
        else:
            result = outer * (v - dot)
        if WEIGHTED:
            result = result * factor[:, None]
        tl.store(out_ptr + k * stride_ok + row[:, None] * classes + c[None, :], result, mask=inside)


@triton.jit
def _merge(m, s, d, KIND: tl.constexpr):
    """The maximum's shift, sum and dot of lanes that have seen some classes each."""
    top = tl.max(m, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    scale = tl.exp(m - shift)
    return shift, tl.sum(s * scale, 0), tl.sum(d * (tl.exp(0.5 * (m - shift)) if KIND == 1 else scale), 0)


@triton.jit
def _wide_kernel(
    x_ptr, v_ptr, weight_ptr, part_ptr, out_ptr, classes, k_all, splits, steps_per_split,
    stride_xr, stride_xc, stride_vk, stride_vr, stride_vc, stride_wr, stride_ok,
    KIND: tl.constexpr, WEIGHTED: tl.constexpr, FIND: tl.constexpr, WRITE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A range of one row's classes, one vector. FIND: its maximum, sum and dot, into part (R, K, splits, 3) unless WRITE
    follows in the same launch; WRITE: the result. SPLITS: a power of two, at least `splits`."""
    program = tl.program_id(0)
    k, split = tl.cast(program % k_all, tl.int64), (program // k_all) % splits
    row = tl.cast(program // (k_all * splits), tl.int64)
    part_ptr += (row * k_all + k) * splits * 3
    x_ptr += row * stride_xr
    v_ptr += k * stride_vk + row * stride_vr
    start = split * steps_per_split * BLOCK
    stop = min(start + steps_per_split * BLOCK, classes)
    lane = tl.arange(0, BLOCK)
    if FIND:
        m = tl.full((BLOCK,), float("-inf"), tl.float32)
        s, d = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for first in range(start, stop, BLOCK):
            c = (first + lane).to(tl.int64)
            x = tl.load(x_ptr + c * stride_xc, mask=c < stop, other=float("-inf")).to(tl.float32)
            v = tl.load(v_ptr + c * stride_vc, mask=c < stop, other=0.0).to(tl.float32)
            larger = tl.maximum(m, x)
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            scale, e = tl.exp(m - shift), tl.exp(x - shift)
            s = s * scale + e
            if KIND == 1:
                d = d * tl.exp(0.5 * (m - shift)) + tl.exp(0.5 * (x - shift)) * v
            else:
                d = d * scale + e * v
            m = larger
        shift, total, dot = _merge(m, s, d, KIND)
        if not WRITE:
            place = part_ptr + split * 3
            tl.store(place, shift)
            tl.store(place + 1, total)
            tl.store(place + 2, dot)
    else:
        each = tl.arange(0, SPLITS)
        here = each < splits
        m = tl.load(part_ptr + each * 3, mask=here, other=float("-inf"))
        s = tl.load(part_ptr + each * 3 + 1, mask=here, other=0.0)
        shift, total, dot = _merge(m, s, tl.load(part_ptr + each * 3 + 2, mask=here, other=0.0), KIND)
    if WRITE:
        factor, mean = 1.0 / total, dot / total
        if KIND != 0:
            factor = 1.0 / tl.sqrt(total)
        if KIND == 1:
            mean = dot * factor * factor  # of v over q, for exp((x - shift) / 2) to multiply
        if WEIGHTED:
            weight = tl.load(weight_ptr + row * stride_wr).to(tl.float32)
            factor = factor * (weight if KIND == 0 else tl.sqrt(weight))
        out_ptr += k * stride_ok + row * classes
        for first in range(start, stop, BLOCK):
            c = (first + lane).to(tl.int64)
            x = tl.load(x_ptr + c * stride_xc, mask=c < stop, other=float("-inf")).to(tl.float32)
            v = tl.load(v_ptr + c * stride_vc, mask=c < stop, other=0.0).to(tl.float32)
            e = tl.exp(x - shift if KIND == 0 else 0.5 * (x - shift))
            tl.store(out_ptr + c, e * factor * (v - (e * mean if KIND == 1 else mean)), mask=c < stop)


def supports(logits: Tensor, v: Tensor, *, weight: Tensor | None = None, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(logits, v)


def worthwhile(logits: Tensor, v: Tensor, *, weight: Tensor | None = None, precision: str = "ieee") -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return None  # the reference is four launches or more, and passes over memory


def softmax_hvp(logits: Tensor, v: Tensor, *, weight: Tensor | None = None, precision: str = "ieee") -> Tensor:
    """See `hvpfast.ops.softmax_hvp`; sums and results are float32 under every `precision`."""
    return product(logits, v, weight, HESSIAN)


def product(logits: Tensor, v: Tensor, weight: Tensor | None, kind: int) -> Tensor:
    """The product of `kind`, shaped like v (..., C) or (K, ..., C)."""
    classes = logits.shape[-1]
    out = v.new_empty(v.shape, dtype=torch.float32)
    if v.numel():
        rows = logits.numel() // classes
        x, flat, to = logits.reshape(rows, classes), v.reshape(-1, rows, classes), out.view(-1, rows, classes)
        with tiles.on_device(logits):
            launch(x, flat, None if weight is None else weight.reshape(rows), to, kind)
    return out


def launch(
    x: Tensor,
    v: Tensor,
    weight: Tensor | None,
    out: Tensor,
    kind: int = HESSIAN,
    *,
    narrow: int = NARROW,
    splits: int | None = None,
) -> None:
    """x (R, C), v (K, R, C), weight (R,) or None, none of them empty -> out (K, R, C), contiguous."""
    (rows, classes), columns = x.shape, len(v)
    strides = (*x.stride(), *v.stride(), 0 if weight is None else weight.stride(0), out.stride(0))
    weighted, weight = weight is not None, x if weight is None else weight
    processors = tiles.facts(x.device).processors
    if classes <= narrow:
        block = max(16, triton.next_power_of_2(classes))
        together = max(1, ELEMENTS // block)
        programs = triton.cdiv(rows, together)
        few = programs < 2 * processors  # then a program for each vector
        k_each = triton.cdiv(columns, tiles.MOST_PROGRAMS) if few else columns
        _rows_kernel[programs, triton.cdiv(columns, k_each)](
            x, v, weight, out, rows, classes, columns, k_each, *strides,
            KIND=kind, WEIGHTED=weighted, ROWS=together, BLOCK=block, num_warps=4 if block <= 4096 else 8, enable_fp_fusion=True,
        )  # fmt: skip
        return
    steps = triton.cdiv(classes, BLOCK)
    if splits is None:
        splits = min(MOST_SPLITS, triton.cdiv(2 * processors, rows * columns), max(1, steps // 4))
    part = x.new_empty(rows * columns * splits * 3 if splits > 1 else 0, dtype=torch.float32)
    for find, write in ((True, True),) if splits == 1 else ((True, False), (False, True)):
        _wide_kernel[(rows * splits * columns,)](
            x, v, weight, part, out, classes, columns, splits, triton.cdiv(steps, splits), *strides,
            KIND=kind, WEIGHTED=weighted, FIND=find, WRITE=write, SPLITS=1 if splits == 1 else MOST_SPLITS, BLOCK=BLOCK,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
