"""Inner products of per-sample gradients, <g_m' a_m, g2_l' a2_l>, (M, M2), in Triton.

By pairs: sum_tt' (a_mt . a2_lt')(g_mt . g2_lt'): a program owns a tile of positions, `side / T` samples of either side with all
their positions, and adds its products up to one number a pair of samples. Of a symmetric result the lower tiles are computed
and written on both sides. By gradients: they are formed in a workspace (at most WORKSPACE elements, a range of O at a time)
and multiplied. By pairs costs M M2 T T2 (I + O) products, by gradients M (T + M2) I O: pairs if T T2 (I + O) < I O.
Nothing is added atomically: the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gram, products, sample_grads, tables, tiles
from .tiles import Tile, cross, triangle

# Tiles by pairs, by product; bf16x4 because each factor's error counts. "-odd" is for data that cannot be loaded 16 bytes at a
# time. Not yet measured on a GPU.
TILES: dict[str, Tile] = {
    "exact": Tile(64, 64, 4, 3, 16),
    "exact-odd": Tile(64, 32, 8, 3, 32),
    "bf16": Tile(64, 16, 4, 4, 64),
    "bf16-odd": Tile(64, 16, 8, 3, 64),
    "bf16x4": Tile(64, 16, 4, 4, 64),
    "bf16x4-odd": Tile(64, 16, 8, 3, 64),
    "ieee": Tile(64, 16, 8, 2, 64),
}
WORKSPACE = 1 << 26  # elements of gradients formed at a time


@triton.jit
def _pairs_kernel(
    a_ptr, g_ptr, a2_ptr, g2_ptr, out_ptr, m_all, n_all, t_all, m2_all, n2_all, t2_all, tiles_2, i_all, o_all,
    stride_an, stride_at, stride_ai, stride_gm, stride_gt, stride_go,
    stride_bn, stride_bt, stride_bi, stride_hm, stride_ht, stride_ho, stride_m, stride_l,
    SYMMETRIC: tl.constexpr, POSITIONS: tl.constexpr, POSITIONS_2: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """SIDE / POSITIONS samples m against SIDE / POSITIONS_2 samples l; POSITIONS is T, rounded up to a power of two.
    a2 and g2 have the strides b and h."""
    if SYMMETRIC:
        row, column = triangle(tl.program_id(0))
    else:
        row, column = tl.program_id(0) // tiles_2, tl.program_id(0) % tiles_2
    lane, f = tl.arange(0, SIDE), tl.arange(0, DEPTH)[:, None]
    m, t = row * (SIDE // POSITIONS) + lane // POSITIONS, lane % POSITIONS
    l, u = column * (SIDE // POSITIONS_2) + lane // POSITIONS_2, lane % POSITIONS_2
    left_in, right_in = ((m < m_all) & (t < t_all))[None, :], ((l < m2_all) & (u < t2_all))[None, :]
    aa = cross(
        a_ptr, a2_ptr, f * stride_ai + ((m % n_all) * stride_an + t * stride_at)[None, :],
        f * stride_bi + ((l % n2_all) * stride_bn + u * stride_bt)[None, :],
        tl.cast(stride_ai, tl.int64), tl.cast(stride_bi, tl.int64), left_in, right_in, i_all,
        SIDE, SIDE, PRECISION, EVEN, DEPTH, CHUNK,
    )  # fmt: skip
    gg = cross(
        g_ptr, g2_ptr, f * stride_go + (m * stride_gm + t * stride_gt)[None, :],
        f * stride_ho + (l * stride_hm + u * stride_ht)[None, :],
        tl.cast(stride_go, tl.int64), tl.cast(stride_ho, tl.int64), left_in, right_in, o_all,
        SIDE, SIDE, PRECISION, EVEN, DEPTH, CHUNK,
    )  # fmt: skip
    S: tl.constexpr = SIDE // POSITIONS
    S_2: tl.constexpr = SIDE // POSITIONS_2
    dots = aa * gg
    if POSITIONS_2 > 1:
        dots = tl.sum(tl.reshape(dots, (SIDE, S_2, POSITIONS_2)), 2)
    if POSITIONS > 1:
        dots = tl.sum(tl.reshape(dots, (S, POSITIONS, S_2)), 1)
    m, l = (row * S + tl.arange(0, S))[:, None], (column * S_2 + tl.arange(0, S_2))[None, :]
    inside = (m < m_all) & (l < m2_all)
    step_m, step_l = tl.cast(stride_m, tl.int64), tl.cast(stride_l, tl.int64)
    if SYMMETRIC:
        tl.store(out_ptr + m * step_m + l * step_l, dots, mask=inside & (m >= l))
        tl.store(out_ptr + l * step_m + m * step_l, dots, mask=inside & (m > l))
    else:
        tl.store(out_ptr + m * step_m + l * step_l, dots, mask=inside)


def supports(
    a: Tensor, g: Tensor, a2: Tensor | None = None, g2: Tensor | None = None, *, precision: str = "ieee"
) -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    pairs = (a, g) if a2 is None else (a, g, a2, g2)
    if _by_pairs(g.shape[1], pairs[-1].shape[1], a.shape[2], g.shape[2]) and any(x.numel() >= 1 << 31 for x in pairs):
        return (
            "the samples' features are 2^31 or more, whose places it counts in 32 bits; give it fewer samples at once"
        )
    return tiles.unfit(*pairs)


def worthwhile(
    a: Tensor, g: Tensor, a2: Tensor | None = None, g2: Tensor | None = None, *, precision: str = "ieee"
) -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    (m, t, o), i = g.shape, a.shape[2]
    m2, t2 = (m, t) if g2 is None else g2.shape[:2]
    return tables.slower(a, "sample_gram", m * min(m2 * t * t2 * (i + o), (t + m2) * i * o), precision)


def sample_gram(
    a: Tensor, g: Tensor, a2: Tensor | None = None, g2: Tensor | None = None, *, precision: str = "ieee"
) -> Tensor:
    """See `hvpfast.ops.sample_gram`; `precision` is that of float32 data ("auto" is "bf16x3")."""
    symmetric = a2 is None
    a2, g2 = (a, g) if symmetric else (a2, g2)
    (m, t, o), (m2, t2, _), i = g.shape, g2.shape, a.shape[2]
    out = g.new_empty(m, m2, dtype=torch.float32)
    if 0 in (*a.shape, *g.shape, *a2.shape, *g2.shape):
        return out.zero_()
    with tiles.on_device(a):
        if _by_pairs(t, t2, i, o):
            product = (
                "ieee" if a.dtype is torch.float32 and min(i, o) < tiles.FEW else tiles.product(a.dtype, precision)
            )
            product = "bf16x4" if product == "bf16x3" else product
            fits = tiles.vectors(a, g, a2, g2)
            tile = tables.of(a.device, "sample_gram", TILES, product, fits)
            launch_pairs(a, g, a2, g2, out, symmetric, product, tile)
        else:
            by_gradients(a, g, a2, g2, out, symmetric, precision)
    return out


def _by_pairs(t: int, t2: int, i: int, o: int) -> bool:
    return (t * t2 * (i + o) < i * o and max(t, t2) <= 64) or t == t2 == 1


def launch_pairs(
    a: Tensor, g: Tensor, a2: Tensor, g2: Tensor, out: Tensor, symmetric: bool, product: str, tile: Tile
) -> None:
    """By pairs with a given tile: a (N, T, I), g (M, T, O), a2 (N2, T2, I), g2 (M2, T2, O) -> out (M, M2); T, T2 <= side."""
    (m, t, o), (m2, t2, _), i, side = g.shape, g2.shape, a.shape[2], tile.side
    a, g, a2, g2 = (tiles.within_32_bits(x, (0, len(x)), (1, x.shape[1]), (2, tile.depth)) for x in (a, g, a2, g2))
    positions, positions_2 = triton.next_power_of_2(t), triton.next_power_of_2(t2)
    tiles_1, tiles_2 = triton.cdiv(m * positions, side), triton.cdiv(m2 * positions_2, side)
    whole = m * t % side == m2 * t2 % side == i % tile.depth == o % tile.depth == 0
    whole = whole and (t, t2) == (positions, positions_2) and tiles.vectors(a, g, a2, g2)
    _pairs_kernel[(tiles_1 * (tiles_1 + 1) // 2 if symmetric else tiles_1 * tiles_2,)](
        a, g, a2, g2, out, m, len(a), t, m2, len(a2), t2, tiles_2, i, o,
        *a.stride(), *g.stride(), *a2.stride(), *g2.stride(), *out.stride(),
        SYMMETRIC=symmetric, POSITIONS=positions, POSITIONS_2=positions_2, PRECISION=product, EVEN=whole,
        SIDE=side, DEPTH=tile.depth, CHUNK=tile.chunk, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def by_gradients(
    a: Tensor,
    g: Tensor,
    a2: Tensor,
    g2: Tensor,
    out: Tensor,
    symmetric: bool,
    precision: str,
    workspace: int = WORKSPACE,
) -> None:
    """By gradients, of at most `workspace` elements at a time: a range of output features after another.

    The gradients are formed one step more exactly than their products are taken: both errors count.
    """
    (m, _, o), m2, i = g.shape, len(g2), a.shape[2]
    name = tiles.product(a.dtype, precision)
    former, product = {
        "exact": ("exact", "bf16x6"), "bf16x3": ("bf16x6", "bf16x3"), "bf16": ("bf16x3", "bf16"),
    }.get(name, (name, name))  # fmt: skip
    step = max(1, min(o, workspace // (max(m, m2) * i)))
    for start in range(0, o, step):
        left = sample_grads.sample_grads(a, g[:, :, start : start + step], precision=former).flatten(1).T
        if symmetric:
            gram.gram(left, out=out, beta=float(start > 0), precision=product)
            continue
        right = sample_grads.sample_grads(a2, g2[:, :, start : start + step], precision=former).flatten(1).T
        part = products.product(left, right, tiles.product_of_few(left.dtype, product, len(left)))
        out = out.copy_(part) if start == 0 else out.add_(part)
