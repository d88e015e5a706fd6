"""Norms and squares of the per-sample gradients of scales and shifts, sum_t g_mt o x^_nt and sum_t g_mt, in Triton.

A program owns a tile of features, a range of samples and a range of their positions: it normalises, adds over positions in
registers, squares, and leaves each sample's part of the norms and one sum of squares for its range. Where a position's own
mean and variance are asked for, the tile is all features (up to WHOLE; beyond, a launch before finds them). Few long samples,
and sums of more than MOST_STEPS tiles, are split along T: then the sums of each range, (M, ranges, 2, I), are added and
squared afterwards. All of it in a fixed order, without atomics. Bytes: x and g, once each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles

# Not yet measured on a GPU.
ELEMENTS = 2048  # of a tile, unless the features are more
FEATURES = 128  # of a tile that need not hold all
WHOLE = 8192  # features up to which a program holds whole positions: of 16384, all dtypes spill
FEW_POSITIONS = 16  # up to which a tile has no more
BLOCK = 4096  # features that a program takes at a time where it cannot hold all
MOST_POSITIONS = 64  # of 128 features-last ones in float32, LLVM crashes for sm_90 (Triton 3.9)
MOST_STEPS = 256  # tiles along T that one float32 sum takes

KINDS = {None: 0, "layer": 1, "rms": 2}


@triton.jit
def _given(ptr, t, i, t_in, i_in, stride_t, stride_i, HOW: tl.constexpr):
    """A tile's values of a mean or a scale, as small as they are: HOW 1: of features, 2: of positions, 3: of both."""
    t_at, i_at = t.to(tl.int64) * stride_t, i.to(tl.int64) * stride_i
    if HOW == 1:
        return tl.load(ptr + i_at, mask=i_in, other=0.0).to(tl.float32)[None, :]
    elif HOW == 2:
        return tl.load(ptr + t_at, mask=t_in, other=0.0).to(tl.float32)[:, None]
    else:
        inside = t_in[:, None] & i_in[None, :]
        return tl.load(ptr + t_at[:, None] + i_at[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _stats_kernel(
    x_ptr, g_ptr, mean_ptr, rstd_ptr, norms_ptr, squares_ptr, sums_ptr,
    eps, m_all, n_all, m_each, t_all, t_each, i_all, tiles_i,
    stride_xn, stride_xt, stride_xi, stride_gm, stride_gt, stride_gi,
    stride_an, stride_at, stride_ai, stride_rn, stride_rt, stride_ri,
    SCALE: tl.constexpr, KIND: tl.constexpr, MEAN: tl.constexpr, RSTD: tl.constexpr, SUMS: tl.constexpr,
    POSITIONS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One tile of I, one range of M, one range of T. norms (2, M, tiles), squares (ranges of M, 2, I); or with SUMS, where
    T is split, sums (M, ranges of T, 2, I) alone. mean, rstd: strides a and r, `_given`'s HOW or 0. Without SCALE the shift
    alone. Places within a tile are 32-bit."""
    tile, part, range_t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane_t, lane_i = tl.arange(0, POSITIONS), tl.arange(0, FEATURES)
    i = tile * FEATURES + lane_i
    i_in, i_start = i < i_all, tl.cast(tile * FEATURES, tl.int64)
    start, stop = range_t * t_each, min((range_t + 1) * t_each, t_all)
    x_at = lane_t[:, None] * stride_xt + lane_i[None, :] * stride_xi
    g_at = lane_t[:, None] * stride_gt + lane_i[None, :] * stride_gi
    scale_squares, shift_squares = tl.zeros((FEATURES,), tl.float32), tl.zeros((FEATURES,), tl.float32)
    for row in range(part * m_each, min((part + 1) * m_each, m_all)):
        m = tl.cast(row, tl.int64)
        n = m % n_all
        scale, shift = tl.zeros((POSITIONS, FEATURES), tl.float32), tl.zeros((POSITIONS, FEATURES), tl.float32)
        for first in range(start, stop, POSITIONS):
            t = tl.cast(first, tl.int64)
            t_in = first + lane_t < stop
            inside = t_in[:, None] & i_in[None, :]
            g = tl.load(g_ptr + (m * stride_gm + t * stride_gt + i_start * stride_gi) + g_at, mask=inside, other=0.0)
            g = g.to(tl.float32)
            shift += g
            if SCALE:
                x = tl.load(
                    x_ptr + (n * stride_xn + t * stride_xt + i_start * stride_xi) + x_at, mask=inside, other=0.0
                )
                x = x.to(tl.float32)
                if KIND == 1:
                    x = tl.where(inside, x - (tl.sum(x, 1) / i_all)[:, None], 0.0)
                if KIND != 0:
                    x = x * (1.0 / tl.sqrt(tl.sum(x * x, 1) / i_all + eps))[:, None]
                if MEAN != 0:
                    x -= _given(mean_ptr + n * stride_an, first + lane_t, i, t_in, i_in, stride_at, stride_ai, MEAN)
                if RSTD != 0:
                    x *= _given(rstd_ptr + n * stride_rn, first + lane_t, i, t_in, i_in, stride_rt, stride_ri, RSTD)
                scale += tl.where(inside, g * x, 0.0)  # outside, a position without features has infinite 1 / rms
        b = tl.sum(shift, 0)
        s = tl.sum(scale, 0)
        if SUMS:
            place = sums_ptr + (m * tl.num_programs(2) + range_t) * 2 * i_all + i
            tl.store(place, s, mask=i_in)
            tl.store(place + i_all, b, mask=i_in)
        else:
            tl.store(norms_ptr + m * tiles_i + tile, tl.sum(s * s))
            tl.store(norms_ptr + (tl.cast(m_all, tl.int64) + m) * tiles_i + tile, tl.sum(b * b))
            scale_squares += s * s
            shift_squares += b * b
    if not SUMS:
        place = squares_ptr + tl.cast(part, tl.int64) * 2 * i_all + i
        tl.store(place, scale_squares, mask=i_in)
        tl.store(place + i_all, shift_squares, mask=i_in)


@triton.jit
def _positions_kernel(
    x_ptr, mean_ptr, rstd_ptr, eps, t_all, i_all, stride_xn, stride_xt, stride_xi, CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean of one position's features (CENTERED) and 1 / their deviation, BLOCK at a time, into mean and rstd (N T,): about
    the mean, so that nothing cancels; what is looked at twice is still in the cache."""
    row = tl.program_id(0)
    x_ptr += (row // t_all).to(tl.int64) * stride_xn + (row % t_all).to(tl.int64) * stride_xt
    lane = tl.arange(0, BLOCK)
    at = lane.to(tl.int64) * stride_xi
    step = tl.cast(stride_xi, tl.int64)
    mean = 0.0
    if CENTERED:
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, i_all, BLOCK):
            total += tl.load(x_ptr + first * step + at, mask=first + lane < i_all, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / i_all
        tl.store(mean_ptr + row, mean)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, i_all, BLOCK):
        inside = first + lane < i_all
        x = tl.load(x_ptr + first * step + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - mean, 0.0)
        squares += x * x
    tl.store(rstd_ptr + row, 1.0 / tl.sqrt(tl.sum(squares, 0) / i_all + eps))


def supports(
    x: Tensor, g: Tensor, *, kind=None, eps=0.0, mean=None, rstd=None, precision: str = "ieee"
) -> str | None:  # fmt: skip
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(x, g)


def norm_sample_stats(
    x: Tensor,
    g: Tensor,
    *,
    kind: str | None = None,
    eps: float = 0.0,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `hvpfast.ops.norm_sample_stats`; sums and results are float32 under every `precision`."""
    with tiles.on_device(g):
        if kind is not None and x.shape[2] > WHOLE and 0 not in g.shape:
            mean, rstd = positions(x, kind, eps)
            kind = None
        return launch(x, g, kind, eps, mean, rstd)


def positions(x: Tensor, kind: str, eps: float) -> tuple[Tensor | None, Tensor]:
    """Means ("layer") or None ("rms"), and 1 / standard deviations or root mean squares, (N, T, 1), of x (N, T, I), not empty."""
    n, t, i = x.shape
    rstd = x.new_empty(n, t, 1, dtype=torch.float32)
    mean = torch.empty_like(rstd) if kind == "layer" else None
    _positions_kernel[(n * t,)](
        x, rstd if mean is None else mean, rstd, eps, t, i, *x.stride(), CENTERED=mean is not None, BLOCK=BLOCK, num_warps=8,
        enable_fp_fusion=True,
    )  # fmt: skip
    return mean, rstd


def launch(
    x: Tensor | None,
    g: Tensor,
    kind: str | None = None,
    eps: float = 0.0,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    *,
    splits: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, T, I), or None for the shift alone, g (M, T, I), mean and rstd broadcast -> norms (M,) twice, squares (I,) twice."""
    m, t, i = g.shape
    if 0 in g.shape:
        return (*g.new_zeros(2, m, dtype=torch.float32), *g.new_zeros(2, i, dtype=torch.float32))
    n = m if x is None else len(x)
    whole = kind is not None
    by_position = g.stride(1) == 1 and g.stride(2) != 1 and not whole  # channels first: positions are side by side
    features = tiles.side(i, WHOLE if whole else ELEMENTS // FEATURES if by_position else FEATURES)
    positions = max(1, min(ELEMENTS // features, ELEMENTS if by_position else MOST_POSITIONS))
    if t <= FEW_POSITIONS:  # a tile of fewer, but of few kinds: each is compiled when it is first met
        positions = min(positions, 1 if t == 1 else FEW_POSITIONS)
    tiles_i, steps = triton.cdiv(i, features), triton.cdiv(t, positions)
    wanted = 2 * tiles.facts(g.device).processors
    if splits is None:
        splits = (
            min(m, triton.cdiv(2 * wanted, tiles_i)),
            max(triton.cdiv(steps, MOST_STEPS), min(steps // 4, wanted // (tiles_i * m)), 1),
        )
    ranges_t = triton.cdiv(steps, triton.cdiv(steps, splits[1]))
    ranges_m = min(m, tiles.MOST_PROGRAMS) if ranges_t > 1 else splits[0]
    g = tiles.within_32_bits(g, (1, positions), (2, features))
    x = x if x is None else tiles.within_32_bits(x, (1, positions), (2, features))
    one = g if x is None else x
    strides = (x is not None and x.stride()) or (0, 0, 0)
    of_mean, of_rstd = ((0, 0, 0) if y is None else y.expand(one.shape).stride() for y in (mean, rstd))
    if ranges_t > 1:
        sums, norms, squares = g.new_empty(m, ranges_t, 2, i, dtype=torch.float32), g, g
    else:
        norms, squares = (g.new_empty(s, dtype=torch.float32) for s in ((2, m, tiles_i), (ranges_m, 2, i)))
        sums = norms
    _stats_kernel[tiles_i, ranges_m, ranges_t](
        one, g, one if mean is None else mean, one if rstd is None else rstd, norms, squares, sums,
        eps, m, n, triton.cdiv(m, ranges_m), t, triton.cdiv(steps, ranges_t) * positions, i, tiles_i,
        *strides, *g.stride(), *of_mean, *of_rstd,
        SCALE=x is not None, KIND=KINDS[kind], MEAN=given(mean), RSTD=given(rstd), SUMS=ranges_t > 1,
        POSITIONS=positions, FEATURES=features, num_warps=warps(features, by_position), enable_fp_fusion=True,
    )  # fmt: skip
    if ranges_t > 1:
        each = sums.sum(1).square_()  # (M, 2, I)
        norms, squares = each.sum(2).T, each.sum(0)
    else:
        norms = norms.sum(2) if tiles_i > 1 else norms[:, :, 0]
        squares = squares.sum(0) if ranges_m > 1 else squares[0]
    return norms[0], norms[1], squares[0], squares[1]


def given(y: Tensor | None) -> int:
    """How a mean or a scale is read, the less the better: see `_given`."""
    return 0 if y is None else 1 if y.shape[1] == 1 else 2 if y.shape[2] == 1 else 3


def warps(features: int, by_position: bool) -> int:
    return 8 if features > 2048 or by_position else 4
