"""The R-operator of a linear map, dx w' + x dw' (+ db), of K directions (dx, dw), in Triton.

One product over the concatenation [dx x] [w dw]': a program owns a tile of one direction's (P, O) and adds both products
in one float32 sum, then the direction's db, so that no intermediate (K, P, O) is written and read again. Where the tiles are too
few to fill the GPU each range of I is summed apart, and the ranges are added in order. The three products of Pearlmutter's
algorithm are this one with other axes: y = x w', gx = g w (w transposed) and gw = g' x (the sum runs over the rows: both
transposed); the kernel takes strides. Flops: 4 K P O I. Bytes: at least those of x, w, their K tangents and 4 K P O.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables, tiles
from .tiles import Tile, add_cross, choose_splits

# Tiles by product; "-odd" is for data that cannot be loaded 16 bytes at a time. Not yet measured on a GPU.
TILES: dict[str, Tile] = {
    "exact": Tile(128, 32, 8, 4, 32),
    "exact-odd": Tile(64, 32, 8, 3, 32),
    "bf16": Tile(64, 16, 8, 3, 64),
    "bf16x3": Tile(64, 16, 8, 3, 64),
    "bf16x6": Tile(64, 16, 8, 3, 64),
    "ieee": Tile(32, 32, 4, 3, 32),
}


@triton.jit
def _rop_kernel(
    x_ptr, w_ptr, dx_ptr, dw_ptr, db_ptr, out_ptr, p_all, o_all, i_all, tiles_o, tiles_all, steps_per_split,
    stride_xp, stride_xi, stride_wo, stride_wi, stride_ak, stride_ap, stride_ai, stride_bk, stride_bo, stride_bi,
    stride_dk, stride_do, stride_s, stride_k, stride_p, stride_o,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    SIDE: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """SIDE rows p, SIDE features o of one direction k over one split of I: out (splits, K, P, O). dx, dw, db have the strides
    a, b and d."""
    tile, split = tl.program_id(0) % tiles_all, tl.program_id(1)
    k = (tl.program_id(0) // tiles_all).to(tl.int64)
    p_start, o_start = (tile // tiles_o) * SIDE, (tile % tiles_o) * SIDE
    lane, i = tl.arange(0, SIDE)[None, :], tl.arange(0, DEPTH)[:, None]
    p_in, o_in = p_start + lane < p_all, o_start + lane < o_all
    p_first, o_first = tl.cast(p_start, tl.int64), tl.cast(o_start, tl.int64)
    start = split * steps_per_split * DEPTH
    stop = min(start + steps_per_split * DEPTH, i_all)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    total = add_cross(
        total, dx_ptr + k * stride_ak + p_first * stride_ap, w_ptr + o_first * stride_wo,
        i * stride_ai + lane * stride_ap, i * stride_wi + lane * stride_wo,
        tl.cast(stride_ai, tl.int64), tl.cast(stride_wi, tl.int64), p_in, o_in, start, stop, i_all,
        PRECISION, EVEN, DEPTH, CHUNK,
    )  # fmt: skip
    total = add_cross(
        total, x_ptr + p_first * stride_xp, dw_ptr + k * stride_bk + o_first * stride_bo,
        i * stride_xi + lane * stride_xp, i * stride_bi + lane * stride_bo,
        tl.cast(stride_xi, tl.int64), tl.cast(stride_bi, tl.int64), p_in, o_in, start, stop, i_all,
        PRECISION, EVEN, DEPTH, CHUNK,
    )  # fmt: skip
    if BIAS:
        shift = tl.load(db_ptr + k * stride_dk + (o_first + lane) * stride_do, mask=o_in, other=0.0).to(tl.float32)
        total += tl.where(split == 0, shift, 0.0)
    p, o = p_first + tl.arange(0, SIDE)[:, None], o_first + lane
    out_ptr += tl.cast(split, tl.int64) * stride_s + k * stride_k
    tl.store(out_ptr + p * stride_p + o * stride_o, total, mask=(p < p_all) & (o < o_all))


def supports(
    x: Tensor, w: Tensor, dx: Tensor, dw: Tensor, *, db: Tensor | None = None, precision: str = "ieee"
) -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(x, w)


def worthwhile(
    x: Tensor, w: Tensor, dx: Tensor, dw: Tensor, *, db: Tensor | None = None, precision: str = "ieee"
) -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return tables.slower(
        x, "linear_rop", 2 * max(dx.numel(), dw.shape[:-2].numel() * x.numel()) * w.shape[0], precision
    )


def linear_rop(
    x: Tensor, w: Tensor, dx: Tensor, dw: Tensor, *, db: Tensor | None = None, precision: str = "ieee"
) -> Tensor:
    """See `hvpfast.ops.linear_rop`; `precision` is that of float32 data ("auto" is "bf16x6": as exact as float32)."""
    columns = dx if dx.dim() == 3 else dx[None]
    directions = dw if dx.dim() == 3 else dw[None]
    shifts = db if db is None or dx.dim() == 3 else db[None]
    (p, i), o = x.shape, w.shape[0]
    if 0 in (len(columns), p, o):
        return x.new_empty(*dx.shape[:-1], o, dtype=torch.float32)
    if i == 0:
        result = x.new_zeros(len(columns), p, o, dtype=torch.float32)
        result = result if shifts is None else result + shifts[:, None]
    else:
        product = tiles.product_of_few(x.dtype, "bf16x6" if precision == "auto" else precision, i)
        fits = (
            all(map(_fits, (x, w, columns[0], directions[0]))) and (columns.stride(0) | directions.stride(0)) % 16 == 0
        )
        with tiles.on_device(x):
            tile = tables.of(x.device, "linear_rop", TILES, product, fits)
            result = launch(x, w, columns, directions, shifts, product, tile)
    return result if dx.dim() == 3 else result[0]


def _fits(z: Tensor) -> bool:
    """Whether a matrix can be loaded 16 bytes at a time along one of its axes, and the compiler will know it."""
    low, high = sorted(z.stride())
    return z.data_ptr() % 16 == 0 and low == 1 and high % 16 == 0 and (z.shape[0] | z.shape[1]) % 16 == 0


def launch(
    x: Tensor, w: Tensor, dx: Tensor, dw: Tensor, db: Tensor | None, product: str, tile: Tile, splits: int | None = None
) -> Tensor:
    """Run with a given tile: x (P, I), w (O, I), dx (K, P, I), dw (K, O, I), db (K, O) or None, none empty -> (K, P, O)."""
    (p, i), o, side = x.shape, w.shape[0], tile.side
    x, w = (tiles.within_32_bits(z, (0, side), (1, tile.depth)) for z in (x, w))
    dx, dw = (tiles.within_32_bits(z, (1, side), (2, tile.depth)) for z in (dx, dw))
    tiles_o, steps = triton.cdiv(o, side), triton.cdiv(i, tile.depth)
    tiles_all = triton.cdiv(p, side) * tiles_o
    if splits is None:
        splits = choose_splits(tiles_all * len(dx), 2 * steps, tiles.facts(x.device).processors)
    splits = min(splits, steps)
    out = x.new_empty(splits, len(dx), p, o, dtype=torch.float32)
    _rop_kernel[tiles_all * len(dx), splits](
        x, w, dx, dw, x if db is None else db, out, p, o, i, tiles_o, tiles_all, triton.cdiv(steps, splits),
        *x.stride(), *w.stride(), *dx.stride(), *dw.stride(), *((0, 0) if db is None else db.stride()), *out.stride(),
        BIAS=db is not None, PRECISION=product, EVEN=p % side == o % side == i % tile.depth == 0, SIDE=side,
        DEPTH=tile.depth, CHUNK=tile.chunk, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)
