"""Per-sample gradients g_m' a_m, (M, O, I), in Triton: a program owns a tile of one sample's gradient.

Few positions: outer products added one after another in float32, as fast as memory takes the result. Else a product over T.
Flops: 2 M T I O. Bytes: 4 M I O written, and T (N I + M O) of the input's width read, again for each tile but mostly from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables, tiles
from .tiles import Tile, cross

# Tiles by product; `side` is the most that a tile spans. "outer": (SIDE_O, SIDE_I) = (side, depth). "-odd" is for data that
# cannot be loaded 16 bytes at a time. Not yet measured on a GPU.
TILES: dict[str, Tile] = {
    "outer": Tile(32, 128, 4, 1, 0),
    "exact": Tile(128, 32, 8, 3, 32),
    "exact-odd": Tile(64, 32, 4, 3, 32),
    "bf16": Tile(64, 16, 8, 3, 64),
    "bf16x3": Tile(64, 16, 8, 3, 64),
    "bf16x6": Tile(64, 16, 8, 3, 64),
    "ieee": Tile(64, 16, 8, 3, 64),
}
FEW = 16  # positions up to which outer products cost less time than writing their sum


@triton.jit
def _outer_kernel(
    a_ptr, g_ptr, out_ptr, n_all, tiles_o, tiles_i, t_all, i_all, o_all,
    stride_an, stride_at, stride_ai, stride_gm, stride_gt, stride_go, stride_m, stride_o, stride_i,
    SIDE_O: tl.constexpr, SIDE_I: tl.constexpr,
):  # fmt: skip
    """One tile of one sample, (SIDE_O, SIDE_I), as a sum of outer products."""
    tile, m = tl.program_id(0) % (tiles_o * tiles_i), tl.cast(tl.program_id(0) // (tiles_o * tiles_i), tl.int64)
    o = ((tile // tiles_i) * SIDE_O + tl.arange(0, SIDE_O)).to(tl.int64)
    i = ((tile % tiles_i) * SIDE_I + tl.arange(0, SIDE_I)).to(tl.int64)
    g_place, a_place = g_ptr + m * stride_gm + o * stride_go, a_ptr + (m % n_all) * stride_an + i * stride_ai
    step_a, step_g = tl.cast(stride_at, tl.int64), tl.cast(stride_gt, tl.int64)
    total = tl.zeros((SIDE_O, SIDE_I), tl.float32)
    for t in range(t_all):
        slope = tl.load(g_place + t * step_g, mask=o < o_all, other=0.0).to(tl.float32)
        value = tl.load(a_place + t * step_a, mask=i < i_all, other=0.0).to(tl.float32)
        total += slope[:, None] * value[None, :]
    at = m * stride_m + (o * stride_o)[:, None] + (i * stride_i)[None, :]
    tl.store(out_ptr + at, total, mask=(o < o_all)[:, None] & (i < i_all)[None, :])


@triton.jit
def _grads_kernel(
    a_ptr, g_ptr, out_ptr, n_all, tiles_o, tiles_i, t_all, i_all, o_all,
    stride_an, stride_at, stride_ai, stride_gm, stride_gt, stride_go, stride_m, stride_o, stride_i,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, SIDE_O: tl.constexpr, SIDE_I: tl.constexpr,
    DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of one sample, (SIDE_O, SIDE_I), as a product over T."""
    tile, m = tl.program_id(0) % (tiles_o * tiles_i), tl.cast(tl.program_id(0) // (tiles_o * tiles_i), tl.int64)
    o_start, i_start = (tile // tiles_i) * SIDE_O, (tile % tiles_i) * SIDE_I
    o, i, t = tl.arange(0, SIDE_O)[None, :], tl.arange(0, SIDE_I)[None, :], tl.arange(0, DEPTH)[:, None]
    grad = cross(
        g_ptr + m * stride_gm + tl.cast(o_start, tl.int64) * stride_go,
        a_ptr + (m % n_all) * stride_an + tl.cast(i_start, tl.int64) * stride_ai,
        t * stride_gt + o * stride_go, t * stride_at + i * stride_ai,
        tl.cast(stride_gt, tl.int64), tl.cast(stride_at, tl.int64), o_start + o < o_all, i_start + i < i_all, t_all,
        SIDE_O, SIDE_I, PRECISION, EVEN, DEPTH, CHUNK,
    )  # fmt: skip
    o, i = o_start + tl.arange(0, SIDE_O)[:, None], i_start + i
    at = m * stride_m + o * tl.cast(stride_o, tl.int64) + i * tl.cast(stride_i, tl.int64)
    tl.store(out_ptr + at, grad, mask=(o < o_all) & (i < i_all))


def supports(a: Tensor, g: Tensor, *, out: Tensor | None = None, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    if tiles.shares_memory(out, a, g):
        return "out shares memory with a or g, which the kernel still reads when it writes out"
    return tiles.unfit(a, g)


def worthwhile(a: Tensor, g: Tensor, *, out: Tensor | None = None, precision: str = "ieee") -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return tables.slower(a, "sample_grads", g.shape[0] * g.shape[2] * a.shape[2], precision, plain=a.shape[1] > FEW)


def sample_grads(a: Tensor, g: Tensor, *, out: Tensor | None = None, precision: str = "ieee") -> Tensor:
    """See `hvpfast.ops.sample_grads`; `precision` is that of float32 data ("auto" is "bf16x3"); few positions in full."""
    t = a.shape[1]
    if out is None:
        out = g.new_empty(g.shape[0], g.shape[2], a.shape[2], dtype=torch.float32)
    if out.numel() == 0:
        return out
    if t == 0:
        return out.zero_()
    product = "outer" if t <= FEW else tiles.product_of_few(a.dtype, precision, t)
    tile = tables.of(a.device, "sample_grads", TILES, product, tiles.vectors(a, g))
    with tiles.on_device(a):
        launch(a, g, out, product, tile)
    return out


def launch(a: Tensor, g: Tensor, out: Tensor, product: str, tile: Tile) -> None:
    """Run with a given tile: a (N, T, I), g (M, T, O), none of them empty -> out (M, O, I)."""
    (m, t, o), (n, _, i) = g.shape, a.shape
    outer = product == "outer"
    side_o, side_i = tiles.side(o, tile.side), tiles.side(i, tile.depth if outer else tile.side)
    tiles_o, tiles_i = triton.cdiv(o, side_o), triton.cdiv(i, side_i)
    if outer:
        _outer_kernel[(m * tiles_o * tiles_i,)](
            a, g, out, n, tiles_o, tiles_i, t, i, o, *a.stride(), *g.stride(), *out.stride(),
            SIDE_O=side_o, SIDE_I=side_i, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return
    a = tiles.within_32_bits(a, (2, side_i), (1, tile.depth))
    g = tiles.within_32_bits(g, (2, side_o), (1, tile.depth))
    _grads_kernel[(m * tiles_o * tiles_i,)](
        a, g, out, n, tiles_o, tiles_i, t, i, o, *a.stride(), *g.stride(), *out.stride(),
        PRECISION=product, EVEN=o % side_o == i % side_i == t % tile.depth == 0 and tiles.vectors(a, g),
        SIDE_O=side_o, SIDE_I=side_i, DEPTH=tile.depth, CHUNK=tile.chunk,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
