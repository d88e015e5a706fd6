"""Squared norms of per-sample gradients, ||g_m' a_m||_F^2 for a (N, T, I), g (M, T, O), a[m % N], in Triton.

T = 1: ||a_n||^2 ||g_m||^2, one pass. T > 1, Gram route: sum_tt' (a_t . a_t')(g_t . g_t'), a program for each input n and
lower tile of (t, t'), off-diagonal ones counted twice; rows of g that share an input share its products. Direct route:
squares of g' a, a program for each row m and tile of (O, I). Gram costs T^2 (I + O) flops, direct 2 T I O: Gram if
T < 2 I O / (I + O). Neither stores a product: a program leaves one float32, and a sum over a row's programs follows
(no atomics: the same bits every time). Bytes: at least T (N I + M O) of the input's width; tiles are read again, mostly
from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables, tiles
from .tiles import Tile, cross, triangle

# Tiles by route and product; `side` is the most that a tile spans: smaller axes take the next power of two, at least 16.
# The Gram route keeps three tiles in registers (a a', g g' and the tensor cores' own). In it lo lo is taken along: without it
# each square on its diagonal is 2e-6 too small, in both factors and in every sample alike. Not yet measured on a GPU.
# "-odd" is for data that cannot be loaded 16 bytes at a time, where the plain tile would spill (bench/ahead.py).
TILES: dict[tuple[str, str], Tile] = {
    ("gram", "exact"): Tile(64, 64, 4, 3, 16),
    ("gram", "exact-odd"): Tile(64, 32, 8, 3, 32),
    ("gram", "bf16"): Tile(64, 16, 4, 4, 64),
    ("gram", "bf16x4"): Tile(64, 16, 4, 4, 64),
    ("gram", "bf16x4-odd"): Tile(64, 16, 8, 3, 64),
    ("gram", "ieee"): Tile(64, 16, 8, 3, 64),
    ("gram", "ieee-odd"): Tile(64, 16, 8, 2, 64),
    ("direct", "exact"): Tile(64, 32, 8, 3, 32),
    ("direct", "bf16"): Tile(64, 16, 4, 4, 64),
    ("direct", "bf16x3"): Tile(64, 16, 4, 4, 64),
    ("direct", "ieee"): Tile(64, 16, 8, 3, 64),
}
FEW = 32  # sums shorter than this gain nothing on tensor cores: float32 data then multiply in full
OUTER_ELEMENTS = 1024  # elements that one program of the T = 1 kernel takes at a time


@triton.jit
def _outer_kernel(
    a_ptr, g_ptr, out_ptr, m_all, n_all, i_all, o_all, stride_an, stride_ai, stride_gm, stride_go,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """T = 1: ||a_(m % N)||^2 ||g_m||^2 for BLOCK_M rows m."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (m < m_all)[:, None]
    f = tl.arange(0, BLOCK_F)[None, :]
    a_at = (m % n_all).to(tl.int64)[:, None] * stride_an + f * tl.cast(stride_ai, tl.int64)  # (BLOCK_M, BLOCK_F)
    g_at = m.to(tl.int64)[:, None] * stride_gm + f * tl.cast(stride_go, tl.int64)
    a_sums, g_sums = tl.zeros((BLOCK_M, BLOCK_F), tl.float32), tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for i in range(0, i_all, BLOCK_F):
        a = tl.load(a_ptr + tl.cast(i, tl.int64) * stride_ai + a_at, mask=inside & (i + f < i_all), other=0.0)
        a_sums += a.to(tl.float32) * a.to(tl.float32)
    for o in range(0, o_all, BLOCK_F):
        g = tl.load(g_ptr + tl.cast(o, tl.int64) * stride_go + g_at, mask=inside & (o + f < o_all), other=0.0)
        g_sums += g.to(tl.float32) * g.to(tl.float32)
    tl.store(out_ptr + m, tl.sum(a_sums, 1) * tl.sum(g_sums, 1), mask=m < m_all)


@triton.jit
def _gram_kernel(
    a_ptr, g_ptr, part_ptr, n_all, k_all, k_each, in_triangle, t_all, i_all, o_all,
    stride_an, stride_at, stride_ai, stride_gm, stride_gt, stride_go,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum over one tile of (t, t') of (a a')∘(g g'), for input n and k_each of the K rows of g that pair with it."""
    tile, n = tl.program_id(0) % in_triangle, tl.program_id(0) // in_triangle
    row, column = triangle(tile)
    lane, f = tl.arange(0, SIDE)[None, :], tl.arange(0, DEPTH)[:, None]
    row_in, column_in = row * SIDE + lane < t_all, column * SIDE + lane < t_all  # (1, SIDE)
    step_a, step_g = tl.cast(stride_ai, tl.int64), tl.cast(stride_go, tl.int64)
    a_at, g_at = f * stride_ai + lane * stride_at, f * stride_go + lane * stride_gt  # (DEPTH, SIDE)
    a_ptr += tl.cast(n, tl.int64) * stride_an
    aa = cross(
        a_ptr + tl.cast(row * SIDE, tl.int64) * stride_at, a_ptr + tl.cast(column * SIDE, tl.int64) * stride_at,
        a_at, a_at, step_a, step_a, row_in, column_in, i_all, SIDE, SIDE, PRECISION, EVEN, DEPTH, CHUNK,
    )  # fmt: skip
    for k in range(tl.program_id(1) * k_each, min((tl.program_id(1) + 1) * k_each, k_all)):
        m = tl.cast(k, tl.int64) * n_all + n
        of_m = g_ptr + m * stride_gm
        gg = cross(
            of_m + tl.cast(row * SIDE, tl.int64) * stride_gt, of_m + tl.cast(column * SIDE, tl.int64) * stride_gt,
            g_at, g_at, step_g, step_g, row_in, column_in, o_all, SIDE, SIDE, PRECISION, EVEN, DEPTH, CHUNK,
        )  # fmt: skip
        twice = tl.where(row == column, 1.0, 2.0)
        tl.store(part_ptr + m * in_triangle + tile, twice * tl.sum(aa * gg))


@triton.jit
def _direct_kernel(
    a_ptr, g_ptr, part_ptr, n_all, tiles_o, tiles_i, t_all, i_all, o_all,
    stride_an, stride_at, stride_ai, stride_gm, stride_gt, stride_go,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, SIDE_O: tl.constexpr, SIDE_I: tl.constexpr,
    DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum of squares of one tile of g_m' a_m."""
    tile, m = tl.program_id(0) % (tiles_o * tiles_i), tl.program_id(0) // (tiles_o * tiles_i)
    o_start, i_start = (tile // tiles_i) * SIDE_O, (tile % tiles_i) * SIDE_I
    o, i, t = tl.arange(0, SIDE_O)[None, :], tl.arange(0, SIDE_I)[None, :], tl.arange(0, DEPTH)[:, None]
    g_ptr += tl.cast(m, tl.int64) * stride_gm + tl.cast(o_start, tl.int64) * stride_go
    a_ptr += tl.cast(m % n_all, tl.int64) * stride_an + tl.cast(i_start, tl.int64) * stride_ai
    grad = cross(
        g_ptr, a_ptr, t * stride_gt + o * stride_go, t * stride_at + i * stride_ai,
        tl.cast(stride_gt, tl.int64), tl.cast(stride_at, tl.int64), o_start + o < o_all, i_start + i < i_all, t_all,
        SIDE_O, SIDE_I, PRECISION, EVEN, DEPTH, CHUNK,
    )  # fmt: skip
    tl.store(part_ptr + tl.cast(m, tl.int64) * (tiles_o * tiles_i) + tile, tl.sum(grad * grad))


def takes_gram(t: int, i: int, o: int) -> bool:
    """Whether the Gram route costs fewer flops than the direct one, T < 2 I O / (I + O)."""
    return t * (i + o) < 2 * i * o


def choose_tile(a: Tensor, g: Tensor, route: str, product: str) -> Tile:
    """The tile from `TILES` for this route and product, and for how a and g lie in memory."""
    odd = not tiles.vectors(a, g) and (route, f"{product}-odd") in TILES
    key = f"{product}-odd" if odd else product
    return tables.tile(a.device, f"norms_{route} {key}", TILES[route, key])


def supports(a: Tensor, g: Tensor, *, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(a, g)


def worthwhile(a: Tensor, g: Tensor, *, precision: str = "ieee") -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    t, i, o = a.shape[1], a.shape[2], g.shape[2]
    work = len(g) * t * min(t * (i + o) / 2, i * o)
    return tables.slower(a, "sample_norms_squared", work, precision) if t > 1 else None


def sample_norms_squared(a: Tensor, g: Tensor, *, precision: str = "ieee") -> Tensor:
    """See `hvpfast.ops.sample_norms_squared`; `precision` is that of float32 data ("auto" is "bf16x3")."""
    if 0 in a.shape or 0 in g.shape:
        return g.new_zeros(len(g), dtype=torch.float32)
    t, i, o = a.shape[1], a.shape[2], g.shape[2]
    route = "outer" if t == 1 else "gram" if takes_gram(t, i, o) else "direct"
    short = min(i, o) if route == "gram" else t
    product = "ieee" if a.dtype is torch.float32 and short < FEW else tiles.product(a.dtype, precision)
    with tiles.on_device(a):
        if route == "outer":
            return launch_outer(a, g)
        product = "bf16x4" if route == "gram" and product == "bf16x3" else product
        tile = choose_tile(a, g, route, product)
        return launch_gram(a, g, product, tile) if route == "gram" else launch_direct(a, g, product, tile)


def launch_outer(a: Tensor, g: Tensor) -> Tensor:
    """The T = 1 kernel: a (N, 1, I), g (M, 1, O) -> (M,)."""
    out = g.new_empty(len(g), dtype=torch.float32)
    wide = min(OUTER_ELEMENTS, triton.next_power_of_2(max(a.shape[2], g.shape[2])))
    block = OUTER_ELEMENTS // wide
    _outer_kernel[(triton.cdiv(len(g), block),)](
        a, g, out, len(g), len(a), a.shape[2], g.shape[2], a.stride(0), a.stride(2), g.stride(0), g.stride(2),
        BLOCK_M=block, BLOCK_F=wide, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def launch_gram(a: Tensor, g: Tensor, product: str, tile: Tile) -> Tensor:
    """The Gram route with a given tile: a (N, T, I), g (M, T, O) -> (M,)."""
    n, t, i = a.shape
    o, k = g.shape[2], len(g) // n
    side = tiles.side(t, tile.side)
    across = triton.cdiv(t, side)
    in_triangle = across * (across + 1) // 2
    # Rows of g with one input share its products, unless the programs are then too few to fill the GPU twice.
    k_each = k if n * in_triangle >= 2 * tiles.facts(a.device).processors else triton.cdiv(k, tiles.MOST_PROGRAMS)
    a, g = (tiles.within_32_bits(x, (1, side), (2, tile.depth)) for x in (a, g))
    part = g.new_empty(len(g), in_triangle, dtype=torch.float32)
    _gram_kernel[n * in_triangle, triton.cdiv(k, k_each)](
        a, g, part, n, k, k_each, in_triangle, t, i, o, *a.stride(), *g.stride(),
        PRECISION=product, EVEN=t % side == i % tile.depth == o % tile.depth == 0 and tiles.vectors(a, g),
        SIDE=side, DEPTH=tile.depth, CHUNK=tile.chunk, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return part.sum(1) if in_triangle > 1 else part[:, 0]


def launch_direct(a: Tensor, g: Tensor, product: str, tile: Tile) -> Tensor:
    """The direct route with a given tile: a (N, T, I), g (M, T, O) -> (M,)."""
    n, t, i = a.shape
    o = g.shape[2]
    side_o, side_i = tiles.side(o, tile.side), tiles.side(i, tile.side)
    tiles_o, tiles_i = triton.cdiv(o, side_o), triton.cdiv(i, side_i)
    a = tiles.within_32_bits(a, (2, side_i), (1, tile.depth))
    g = tiles.within_32_bits(g, (2, side_o), (1, tile.depth))
    part = g.new_empty(len(g), tiles_o * tiles_i, dtype=torch.float32)
    _direct_kernel[(len(g) * tiles_o * tiles_i,)](
        a, g, part, n, tiles_o, tiles_i, t, i, o, *a.stride(), *g.stride(),
        PRECISION=product, EVEN=o % side_o == i % side_i == t % tile.depth == 0 and tiles.vectors(a, g),
        SIDE_O=side_o, SIDE_I=side_i, DEPTH=tile.depth, CHUNK=tile.chunk, num_warps=tile.warps,
        num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return part.sum(1) if tiles_o * tiles_i > 1 else part[:, 0]
