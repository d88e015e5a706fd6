"""Sums over samples of what is made of the gradients g_m' a_m: their squares, and the gradients weighted by c_m, in Triton.

By samples: a program owns a tile of (O, I) and a range of samples; for each it multiplies over the T positions, then adds
the tile's squares, c_m times the tile, and leaves the tile's part of ||g_m' a_m||^2: one pass for all three, no gradient is
stored. By rows: one product over all N T rows, whose left side is mixed on its way to the tensor cores, sum_k c_kn g_kn,
or for T = 1 sum_k g_kn^2 against a_n^2: nothing depends on how short T is. Either splits its range where the tiles are too
few to fill the GPU; the partial sums (float32, `splits` times the result) are then added in a fixed order, without atomics.
Flops: 2 M T I O by samples, 2 N T I O (times K sums) by rows. Bytes: at least T (N I + M O) of the input's width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables, tiles
from .tiles import Tile, choose_splits, cross, dot

# Tiles by route and product. By rows all data pass through registers: 16-bit data in bf16x6, which multiplies what they
# become (24 bits) as exactly as float32. "-short": whole tiles and at most SHORT positions a sample, which the tensor cores
# add by themselves: that leaves registers for a tile twice as wide. "-odd": rows that cannot be loaded 16 bytes at a time.
# "-one": K = 1 and wide layers. Not yet measured on a GPU.
TILES: dict[tuple[str, str], Tile] = {
    ("samples", "exact"): Tile(64, 64, 8, 3, 16),
    ("samples", "exact-odd"): Tile(64, 32, 8, 3, 32),
    ("samples", "exact-short"): Tile(128, 64, 8, 3, 0),
    ("samples", "bf16"): Tile(64, 16, 8, 4, 64),
    ("samples", "bf16x3"): Tile(64, 16, 4, 4, 64),
    ("samples", "bf16x6"): Tile(64, 16, 8, 3, 64),
    ("samples", "ieee"): Tile(64, 16, 8, 3, 64),
    ("rows", "bf16"): Tile(64, 16, 4, 3, 64),
    ("rows", "bf16x3"): Tile(64, 16, 4, 3, 64),
    ("rows", "bf16x3-one"): Tile(128, 16, 8, 3, 64),
    ("rows", "bf16x6"): Tile(64, 16, 8, 3, 64),
    ("rows", "ieee"): Tile(64, 16, 4, 3, 64),
}
SHORT = 1024
WIDE = 512  # features on both sides from which on the widest tile by rows has enough of them


@triton.jit
def _samples_kernel(
    a_ptr, g_ptr, c_ptr, squares_ptr, weighted_ptr, norms_ptr,
    m_all, n_all, m_each, tiles_o, tiles_i, t_all, i_all, o_all,
    stride_an, stride_at, stride_ai, stride_gm, stride_gt, stride_go, stride_cm, stride_cd,
    stride_qs, stride_qo, stride_qi, stride_ws, stride_wd, stride_wo, stride_wi,
    SQUARES: tl.constexpr, WEIGHTED: tl.constexpr, NORMS: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    SIDE_O: tl.constexpr, SIDE_I: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of (O, I), one split of the samples and (WEIGHTED) one column d of c (M, D). squares (splits, O, I),
    weighted (splits, D, O, I), norms (M, tiles)."""
    tile, split, d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_start, i_start = (tile // tiles_i) * SIDE_O, (tile % tiles_i) * SIDE_I
    o, i, t = tl.arange(0, SIDE_O)[None, :], tl.arange(0, SIDE_I)[None, :], tl.arange(0, DEPTH)[:, None]
    g_ptr += tl.cast(o_start, tl.int64) * stride_go
    a_ptr += tl.cast(i_start, tl.int64) * stride_ai
    squares, weighted = tl.zeros((SIDE_O, SIDE_I), tl.float32), tl.zeros((SIDE_O, SIDE_I), tl.float32)
    for row in range(split * m_each, min((split + 1) * m_each, m_all)):
        m = tl.cast(row, tl.int64)
        grad = cross(
            g_ptr + m * stride_gm, a_ptr + (m % n_all) * stride_an,
            t * stride_gt + o * stride_go, t * stride_at + i * stride_ai,
            tl.cast(stride_gt, tl.int64), tl.cast(stride_at, tl.int64), o_start + o < o_all, i_start + i < i_all, t_all,
            SIDE_O, SIDE_I, PRECISION, EVEN, DEPTH, CHUNK,
        )  # fmt: skip
        if SQUARES:
            squares += grad * grad
        if WEIGHTED:
            weighted += grad * tl.load(c_ptr + m * stride_cm + tl.cast(d, tl.int64) * stride_cd).to(tl.float32)
        if NORMS:
            tl.store(norms_ptr + m * (tiles_o * tiles_i) + tile, tl.sum(grad * grad))
    o, i = o_start + tl.arange(0, SIDE_O)[:, None], i_start + i
    inside, split = (o < o_all) & (i < i_all), tl.cast(split, tl.int64)
    if SQUARES:
        at = o * tl.cast(stride_qo, tl.int64) + i * tl.cast(stride_qi, tl.int64)
        tl.store(squares_ptr + split * stride_qs + at, squares, mask=inside)
    if WEIGHTED:
        at = o * tl.cast(stride_wo, tl.int64) + i * tl.cast(stride_wi, tl.int64)
        tl.store(weighted_ptr + split * stride_ws + tl.cast(d, tl.int64) * stride_wd + at, weighted, mask=inside)


@triton.jit
def _mix(g_place, c_ptr, m, d, g_in, m_in, stride_gm, stride_cm, stride_cd, SQUARES: tl.constexpr):
    """g_m o g_m, or c_md g_m, of rows m, in float32."""
    slope = tl.load(g_place + (m * stride_gm)[:, None], mask=g_in, other=0.0).to(tl.float32)
    if SQUARES:
        return slope * slope
    else:
        return slope * tl.load(c_ptr + m * stride_cm + d * stride_cd, mask=m_in, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _rows_kernel(
    a_ptr, g_ptr, c_ptr, out_ptr, n_all, k_all, t_all, tiles_i, steps_per_split, i_all, o_all,
    stride_an, stride_at, stride_ai, stride_gm, stride_gt, stride_go, stride_cm, stride_cd,
    stride_s, stride_d, stride_o, stride_i,
    SQUARES: tl.constexpr, FLAT: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
    SIDE_O: tl.constexpr, SIDE_I: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of (O, I), one split of the N T rows, one column d of c: sum_p (sum_k c_kp g_kp)' a_p, or with SQUARES
    the same of squares and no c. FLAT: T = 1. ONE: K = 1. out (splits, D, O, I)."""
    tile, split, d = tl.program_id(0), tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    o_start, i_start = (tile // tiles_i) * SIDE_O, (tile % tiles_i) * SIDE_I
    o, i, lane = o_start + tl.arange(0, SIDE_O)[None, :], i_start + tl.arange(0, SIDE_I)[None, :], tl.arange(0, DEPTH)
    o_at, i_at = o * tl.cast(stride_go, tl.int64), i * tl.cast(stride_ai, tl.int64)
    rows = n_all * t_all
    start = split * steps_per_split * DEPTH
    stop = min(start + steps_per_split * DEPTH, rows)
    total = tl.zeros((SIDE_O, SIDE_I), tl.float32)
    for chunk in range(start, stop, DEPTH * CHUNK):
        part = tl.zeros((SIDE_O, SIDE_I), tl.float32)
        for first in range(chunk, min(chunk + DEPTH * CHUNK, stop), DEPTH):
            p = first + lane
            exists = (p < stop)[:, None]
            if FLAT:
                n = p.to(tl.int64)
                a_place, g_place = a_ptr + n[:, None] * stride_an, g_ptr
            else:
                n, t = (p // t_all).to(tl.int64), (p % t_all).to(tl.int64)
                a_place = a_ptr + (n * stride_an + t * stride_at)[:, None]
                g_place = g_ptr + (t * stride_gt)[:, None]
            right = tl.load(a_place + i_at, mask=exists & (i < i_all), other=0.0).to(tl.float32)
            if SQUARES:
                right = right * right
            g_in = exists & (o < o_all)
            if ONE:
                left = _mix(g_place + o_at, c_ptr, n, d, g_in, p < stop, stride_gm, stride_cm, stride_cd, SQUARES)
            else:
                left = tl.zeros((DEPTH, SIDE_O), tl.float32)
                for k in range(k_all):
                    m = n + tl.cast(k, tl.int64) * n_all
                    left += _mix(g_place + o_at, c_ptr, m, d, g_in, p < stop, stride_gm, stride_cm, stride_cd, SQUARES)
            part = dot(tl.trans(left), right, part, PRECISION)
        total += part
    o, i = o_start + tl.arange(0, SIDE_O)[:, None], i_start + tl.arange(0, SIDE_I)[None, :]
    out_ptr += tl.cast(split, tl.int64) * stride_s + d * stride_d
    at = o * tl.cast(stride_o, tl.int64) + i * tl.cast(stride_i, tl.int64)
    tl.store(out_ptr + at, total, mask=(o < o_all) & (i < i_all))


def product_by_rows(dtype: torch.dtype, precision: str, rows: int) -> str:
    """How the route by rows multiplies: 16-bit data, mixed to 24 bits, as exactly as float32."""
    return "bf16x6" if dtype is not torch.float32 else tiles.product_of_few(dtype, precision, rows)


def by_samples(
    a: Tensor,
    g: Tensor,
    c: Tensor | None,
    product: str,
    *,
    squares: Tensor | None = None,
    weighted: Tensor | None = None,
    norms: bool = False,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor | None:
    """One pass over the samples of a (N, T, I), g (M, T, O), c (M, D), none of them empty.

    Writes what it is given: squares (O, I), weighted (D, O, I); returns the squared norms (M,) if asked for.
    """
    (m, t, o), (n, _, i) = g.shape, a.shape
    if weighted is not None and len(weighted) > tiles.MOST_PROGRAMS:
        for some in tiles.columns(len(weighted)):  # sums of a column each, which nothing else is asked for beside
            by_samples(a, g, c[:, some], product, weighted=weighted[some], tile=tile, splits=splits)
        return None
    if tile is None:
        alone = (squares is None) + (weighted is None) + (
            not norms
        ) == 2  # more sums would not fit beside the widest tile
        fits = tiles.vectors(a, g)
        short = alone and t <= SHORT and t % 64 == o % 128 == i % 128 == 0
        kind = "" if product != "exact" else "-odd" if not fits else "-short" if short else ""
        key = f"{product}{kind}"
        tile = tables.tile(a.device, f"moments_samples {key}", TILES["samples", key])
    side_o, side_i = tiles.side(o, tile.side), tiles.side(i, tile.side)
    a = tiles.within_32_bits(a, (2, side_i), (1, tile.depth))
    g = tiles.within_32_bits(g, (2, side_o), (1, tile.depth))
    tiles_o, tiles_i, columns = triton.cdiv(o, side_o), triton.cdiv(i, side_i), 1 if weighted is None else len(weighted)
    steps = triton.cdiv(t, tile.depth)
    if splits is None:
        splits = choose_splits(tiles_o * tiles_i * columns, m * steps, tiles.facts(a.device).processors)
    splits = min(splits, m)
    part = None if norms is False else g.new_empty(m, tiles_o * tiles_i, dtype=torch.float32)
    squares_to, weighted_to = _room(squares, splits), _room(weighted, splits)
    _samples_kernel[tiles_o * tiles_i, splits, columns](
        a, g, a if c is None else c, a if squares is None else squares_to, a if weighted is None else weighted_to,
        a if part is None else part, m, n, triton.cdiv(m, splits), tiles_o, tiles_i, t, i, o,
        *a.stride(), *g.stride(), *((0, 0) if c is None else c.stride()),
        *((0, 0, 0) if squares is None else squares_to.stride()),
        *((0, 0, 0, 0) if weighted is None else weighted_to.stride()),
        SQUARES=squares is not None, WEIGHTED=weighted is not None, NORMS=norms, PRECISION=product,
        EVEN=o % side_o == i % side_i == t % tile.depth == 0 and tiles.vectors(a, g), SIDE_O=side_o, SIDE_I=side_i,
        DEPTH=tile.depth, CHUNK=tile.chunk, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    for out, parts in ((squares, squares_to), (weighted, weighted_to)):
        if splits > 1 and out is not None:
            torch.sum(parts, 0, out=out)
    return None if part is None else part.sum(1)


def by_rows(
    a: Tensor,
    g: Tensor,
    c: Tensor | None,
    out: Tensor,
    product: str,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> None:
    """One product over the rows of a (N, T, I), g (M, T, O), none of them empty: out (D, O, I) of the gradients weighted by
    c (M, D), or (T = 1 only) out (1, O, I) of their squares where c is None."""
    (m, t, o), (n, _, i) = g.shape, a.shape
    if len(out) > tiles.MOST_PROGRAMS:
        for some in tiles.columns(len(out)):
            by_rows(a, g, c[:, some], out[some], product, tile=tile, splits=splits)
        return
    if tile is None:
        wide = m == n and min(o, i) >= WIDE and tiles.vectors(a, g)
        key = f"{product}-one" if wide and ("rows", f"{product}-one") in TILES else product
        tile = tables.tile(a.device, f"moments_rows {key}", TILES["rows", key])
    side_o, side_i = tiles.side(o, tile.side), tiles.side(i, tile.side)
    programs, steps = triton.cdiv(o, side_o) * triton.cdiv(i, side_i), triton.cdiv(n * t, tile.depth)
    if splits is None:
        splits = choose_splits(programs * len(out), steps, tiles.facts(a.device).processors)
    room = _room(out, splits)
    _rows_kernel[programs, splits, len(out)](
        a, g, a if c is None else c, room, n, m // n, t, triton.cdiv(i, side_i), triton.cdiv(steps, splits), i, o,
        *a.stride(), *g.stride(), *((0, 0) if c is None else c.stride()), *room.stride(),
        SQUARES=c is None, FLAT=t == 1, ONE=m == n, PRECISION=product, SIDE_O=side_o, SIDE_I=side_i,
        DEPTH=tile.depth, CHUNK=tile.chunk, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        torch.sum(room, 0, out=out)


def _room(out: Tensor | None, splits: int) -> Tensor | None:
    """Where `splits` partial sums of `out` go: itself, with an axis in front, if there is one."""
    if out is None or splits == 1:
        return out if out is None else out[None]
    return out.new_empty(splits, *out.shape)
