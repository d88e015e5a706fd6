"""Inner products of the per-sample gradients with D directions, <g_m' a_m, w_d> = sum_t g_mt . (w_d a_mt), in Triton.

A program owns a tile of w_d's image of the N T rows of a, multiplies it with the K rows of g that meet it and sums over
the tile's features: neither image nor gradients are stored. It leaves one float32 a row; those of a sample, T of them for
each tile of O, are then added in a fixed order (workspace M T D O / side). Flops: 2 N T I O D. Bytes: at least T (N I + M O)
and D I O of the input's width; tiles are read again, mostly from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grouped, tables, tiles
from .tiles import Tile, cross

# Tiles by product; "-odd" is for data that cannot be loaded 16 bytes at a time. Not yet measured on a GPU.
TILES: dict[str, Tile] = {
    "exact": Tile(128, 32, 8, 4, 32),
    "exact-odd": Tile(64, 32, 8, 3, 32),
    "bf16x3": Tile(64, 16, 8, 3, 64),
    "bf16x6": Tile(64, 16, 8, 3, 64),
    "ieee": Tile(64, 16, 8, 3, 64),
}


@triton.jit
def _dots_kernel(
    a_ptr, g_ptr, w_ptr, part_ptr, rows, k_all, tiles_o, tiles_all, i_all, o_all, columns,
    stride_ap, stride_ai, stride_gp, stride_go, stride_wd, stride_wo, stride_wi,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """SIDE rows p of a, SIDE features o, one direction d: sum_o g[k, p, o] (w_d a_p)_o into part (tiles of O, K, rows, D)."""
    tile, d = tl.program_id(0) % tiles_all, tl.program_id(0) // tiles_all
    p_start, o_start = (tile // tiles_o) * SIDE, (tile % tiles_o) * SIDE
    lane, f = tl.arange(0, SIDE)[None, :], tl.arange(0, DEPTH)[:, None]
    image = cross(
        a_ptr + tl.cast(p_start, tl.int64) * stride_ap,
        w_ptr + tl.cast(d, tl.int64) * stride_wd + tl.cast(o_start, tl.int64) * stride_wo,
        f * stride_ai + lane * stride_ap, f * stride_wi + lane * stride_wo,
        tl.cast(stride_ai, tl.int64), tl.cast(stride_wi, tl.int64), p_start + lane < rows, o_start + lane < o_all, i_all,
        SIDE, SIDE, PRECISION, EVEN, DEPTH, CHUNK,
    )  # fmt: skip
    p, o = p_start + tl.arange(0, SIDE), o_start + lane
    inside = (p < rows)[:, None] & (o < o_all)
    for k in range(k_all):
        row = tl.cast(k, tl.int64) * rows + p
        slopes = tl.load(g_ptr + row[:, None] * stride_gp + o * tl.cast(stride_go, tl.int64), mask=inside, other=0.0)
        place = part_ptr + (tl.cast(tile % tiles_o, tl.int64) * k_all * rows + row) * columns + d
        tl.store(place, tl.sum(image * slopes.to(tl.float32), 1), mask=p < rows)


def supports(a: Tensor, g: Tensor, w: Tensor, *, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(a, g)


def worthwhile(a: Tensor, g: Tensor, w: Tensor, *, precision: str = "ieee") -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return tables.slower(a, "sample_dots", a.shape[0] * a.shape[1] * w.numel(), precision)


def sample_dots(a: Tensor, g: Tensor, w: Tensor, *, precision: str = "ieee") -> Tensor:
    """See `hvpfast.ops.sample_dots`; `precision` is that of float32 data ("auto" is "bf16x6": as exact as float32). The others
    are one step finer than what is asked for: few sums of many products of either sign, of which little may remain."""
    (n, t, i), (m, _, o) = a.shape, g.shape
    directions = w if w.dim() == 3 else w[None]
    if 0 in a.shape or 0 in g.shape or len(directions) == 0:
        result = g.new_zeros(m, len(directions), dtype=torch.float32)
    else:
        product = tiles.product_of_few(a.dtype, grouped.product(precision), i)
        with tiles.on_device(a):
            flat_a, flat_g = a.reshape(n * t, i), g.reshape(m * t, o)  # views wherever the leading axes allow them
            fits = tiles.vectors(flat_a[None], flat_g[None], directions)
            tile = tables.of(a.device, "sample_dots", TILES, product, fits)
            result = launch(flat_a, flat_g, directions, product, tile).reshape(-1, m, t, len(directions)).sum((0, 2))
    return result if w.dim() == 3 else result[:, 0]


def launch(a: Tensor, g: Tensor, w: Tensor, product: str, tile: Tile) -> Tensor:
    """Run with a given tile: a (P, I), g (K P, O), w (D, O, I), none of them empty -> (tiles of O, K P, D)."""
    (rows, i), o, side = a.shape, g.shape[1], tile.side
    a = tiles.within_32_bits(a, (0, side), (1, tile.depth))
    w = tiles.within_32_bits(w, (1, side), (2, tile.depth))
    tiles_o = triton.cdiv(o, side)
    tiles_all = triton.cdiv(rows, side) * tiles_o
    part = g.new_empty(tiles_o, len(g), len(w), dtype=torch.float32)
    even = rows % side == o % side == i % tile.depth == 0 and tiles.vectors(a[None], g[None], w)
    _dots_kernel[(tiles_all * len(w),)](
        a, g, w, part, rows, len(g) // rows, tiles_o, tiles_all, i, o, len(w), *a.stride(), *g.stride(), *w.stride(),
        PRECISION=product, EVEN=even, SIDE=side, DEPTH=tile.depth,
        CHUNK=tile.chunk, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return part
