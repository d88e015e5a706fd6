"""Double backward of LayerNorm and RMSNorm in Triton: the cotangents of g, x and w in one pass over x, g and c.

A program owns a range of rows, ROWS whole ones at a time in registers: their means, then what is asked for. What the weight gets
it adds up over its rows and leaves as one part, (programs, I); the parts are added afterwards, in order and without atomics.
Bytes: x, g and c read once (g only for x and w), 4 bytes written for each value asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles

# Not yet measured on a GPU.
ELEMENTS = 1024  # of a tile, unless a row is longer
WHOLE = 4096  # features up to which a program holds rows in registers: of 8192, all three spill


@triton.jit
def _norm_kernel(
    x_ptr, g_ptr, c_ptr, mean_ptr, rstd_ptr, weight_ptr, c_weight_ptr, c_bias_ptr, of_g_ptr, of_x_ptr, part_ptr,
    rows, features, rows_each,
    C: tl.constexpr, MEAN: tl.constexpr, WEIGHT: tl.constexpr, C_WEIGHT: tl.constexpr, C_BIAS: tl.constexpr,
    OF_G: tl.constexpr, OF_X: tl.constexpr, OF_W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rows_each rows of contiguous x, g, c (P, I); mean, rstd (P,); weight, c_weight, c_bias (I,); part (programs, I)."""
    lane = tl.arange(0, BLOCK)
    i_in = lane < features
    start = tl.program_id(0) * rows_each
    stop = min(start + rows_each, rows)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        row_in = row < stop
        inside = row_in[:, None] & i_in[None, :]
        at = row.to(tl.int64)[:, None] * features + lane[None, :]
        z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row_in, other=0.0).to(tl.float32)[:, None]
        if MEAN:
            z = tl.where(inside, z - tl.load(mean_ptr + row, mask=row_in, other=0.0).to(tl.float32)[:, None], 0.0)
        z = z * rstd
        if C:
            c = tl.load(c_ptr + at, mask=inside, other=0.0).to(tl.float32)
        else:
            c = tl.zeros((ROWS, BLOCK), tl.float32)
        mean_c = (tl.sum(c, 1) / features)[:, None]
        if not MEAN:
            mean_c = mean_c * 0.0
        along_c = (tl.sum(c * z, 1) / features)[:, None]
        if OF_X or OF_W:
            g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if OF_G or OF_W:
            pushed = rstd * (c - mean_c - z * along_c)
            if OF_W:
                total += g * pushed
            if OF_G:
                if WEIGHT:
                    pushed = pushed * tl.load(weight_ptr + lane, mask=i_in, other=0.0).to(tl.float32)[None, :]
                if C_WEIGHT:
                    pushed += z * tl.load(c_weight_ptr + lane, mask=i_in, other=0.0).to(tl.float32)[None, :]
                if C_BIAS:
                    pushed += tl.load(c_bias_ptr + lane, mask=i_in, other=0.0).to(tl.float32)[None, :]
                tl.store(of_g_ptr + at, pushed, mask=inside)
        if OF_X:
            s = g
            if WEIGHT:
                s = g * tl.load(weight_ptr + lane, mask=i_in, other=0.0).to(tl.float32)[None, :]
            along_s = (tl.sum(s * z, 1) / features)[:, None]
            spread = (tl.sum(c * s, 1) / features)[:, None] - along_c * along_s
            if MEAN:
                spread -= mean_c * (tl.sum(s, 1) / features)[:, None]
            h = -rstd * (s * along_c + c * along_s)
            if C_WEIGHT:
                h += g * tl.load(c_weight_ptr + lane, mask=i_in, other=0.0).to(tl.float32)[None, :]
            along_h = (tl.sum(h * z, 1) / features)[:, None]
            if MEAN:
                h = h - (tl.sum(h, 1) / features)[:, None]
            tl.store(of_x_ptr + at, rstd * (h - z * (along_h + rstd * spread)), mask=inside)
    if OF_W:
        tl.store(part_ptr + tl.program_id(0).to(tl.int64) * features + lane, tl.sum(total, 0), mask=i_in)


def supports(
    x: Tensor, g: Tensor, rstd: Tensor, *, c: Tensor | None = None, precision: str = "ieee", **_: object
) -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    if x.shape[1] > WHOLE:
        return f"x has rows of {x.shape[1]}; the kernel holds rows of up to {WHOLE}"
    return tiles.unfit(x, g)


def worthwhile(x: Tensor, g: Tensor, rstd: Tensor, *, precision: str = "ieee", **_: object) -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return None  # the reference is twenty launches or more, and passes over memory


def norm_rop(
    x: Tensor,
    g: Tensor,
    rstd: Tensor,
    *,
    c: Tensor | None = None,
    mean: Tensor | None = None,
    weight: Tensor | None = None,
    c_weight: Tensor | None = None,
    c_bias: Tensor | None = None,
    of: str = "gxw",
    precision: str = "ieee",
) -> tuple[Tensor, ...]:
    """See `hvpfast.ops.norm_rop`; sums and results are float32 under every `precision`."""
    rows, features = x.shape
    given = [y if y is None else y.contiguous() for y in (x, g, c, mean, rstd, weight, c_weight, c_bias)]
    made = {letter: x.new_empty(rows, features, dtype=torch.float32) for letter in of if letter != "w"}
    if 0 in x.shape:
        return tuple(x.new_zeros(features, dtype=torch.float32) if letter == "w" else made[letter] for letter in of)
    with tiles.on_device(x):
        part = launch(*given, made.get("g"), made.get("x"), "w" in of)
    return tuple(part if letter == "w" else made[letter] for letter in of)


def launch(
    x: Tensor,
    g: Tensor,
    c: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    c_weight: Tensor | None,
    c_bias: Tensor | None,
    of_g: Tensor | None,
    of_x: Tensor | None,
    of_w: bool,
    *,
    programs: int | None = None,
) -> Tensor | None:
    """Contiguous x, g, c (P, I), none empty -> of_g and of_x written where given; returns (I,), the weight's, if `of_w`."""
    rows, features = x.shape
    block = max(16, triton.next_power_of_2(features))
    together = max(1, ELEMENTS // block)
    if programs is None:
        programs = 4 * tiles.facts(x.device).processors
    each = triton.cdiv(triton.cdiv(rows, min(programs, rows)), together) * together
    programs = triton.cdiv(rows, each)
    part = x.new_empty(programs if of_w else 0, features, dtype=torch.float32)
    _norm_kernel[programs,](
        x, g, *(x if y is None else y for y in (c, mean)), rstd, *(x if y is None else y for y in (weight, c_weight, c_bias)),
        x if of_g is None else of_g, x if of_x is None else of_x, part, rows, features, each,
        C=c is not None, MEAN=mean is not None, WEIGHT=weight is not None, C_WEIGHT=c_weight is not None,
        C_BIAS=c_bias is not None, OF_G=of_g is not None, OF_X=of_x is not None, OF_W=of_w, ROWS=together, BLOCK=block,
        num_warps=warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    return part.sum(0) if of_w else None


def warps(block: int) -> int:
    return 4 if block <= 2048 else 8
