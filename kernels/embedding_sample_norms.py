"""Per-sample gradients of an embedding table - for each row that a sample looks up the sum of g over its positions - as
norms and as sums of squares over samples, in Triton.

Positions are sorted (stably) by index, so that those that share a row of the table stand side by side: a program reads the
gradients of its group in that order, adds up a run, and adds its square where the run ends. Norms: a group is a sample.
Second moment: a group is a row of the table, a run what one sample adds to it. A group's positions are read one tile of
TOGETHER after another; nothing is added in another order from call to call, and there are no atomics. Bytes: g once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles

# Not yet measured on a GPU.
TOGETHER = 8  # positions that are loaded at once
FEATURES = 128  # of a program


@triton.jit
def _runs_kernel(
    g_ptr, order_ptr, index_ptr, bounds_ptr, out_ptr, k_all, n_all, t_all, d_all, tiles_d,
    stride_gm, stride_gt, stride_gd, NORMS: tl.constexpr, TOGETHER: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One group, one tile of D. order (N T,): positions n T + t, sorted; index (N, T). NORMS: group m = k N + n, its positions
    n T to (n + 1) T of `order`, out (M, tiles). Else group v, positions bounds[v] to bounds[v + 1], all K rows of g that
    share them, out (V, D)."""
    group, tile = tl.program_id(0), tl.program_id(1)
    d = tile * FEATURES + tl.arange(0, FEATURES)
    lane, d_in, d_at = tl.arange(0, TOGETHER), d < d_all, d.to(tl.int64) * stride_gd
    if NORMS:
        start, first_k, last_k = (group % n_all).to(tl.int64) * t_all, group // n_all, group // n_all + 1
        stop = start + t_all
    else:
        start, stop = tl.load(bounds_ptr + group), tl.load(bounds_ptr + group + 1)
        first_k, last_k = 0, k_all
    total = tl.zeros((FEATURES,), tl.float32)
    for k in range(first_k, last_k):
        run, last = tl.zeros((FEATURES,), tl.float32), tl.full((), -1, tl.int64)
        for first in range(start, stop, TOGETHER):
            p = first + lane
            inside = p < stop
            place = tl.load(order_ptr + p, mask=inside, other=0)
            n, t = place // t_all, place % t_all
            key = n
            if NORMS:
                key = tl.load(index_ptr + place, mask=inside, other=-1).to(tl.int64)
            g_at = (tl.cast(k, tl.int64) * n_all + n) * stride_gm + t * stride_gt
            g = tl.load(g_ptr + g_at[:, None] + d_at[None, :], mask=inside[:, None] & d_in[None, :], other=0.0)
            for each in tl.static_range(TOGETHER):
                taken = (lane == each) & inside
                this = tl.max(tl.where(taken, key, -1), 0)  # -1 past the end: a run of its own, of nothing
                value = tl.sum(tl.where(taken[:, None], g.to(tl.float32), 0.0), 0)
                total += tl.where(this == last, 0.0, run * run)
                run = tl.where(this == last, run, 0.0) + value
                last = this
        total += run * run
    if NORMS:
        tl.store(out_ptr + tl.cast(group, tl.int64) * tiles_d + tile, tl.sum(total))
    else:
        tl.store(out_ptr + tl.cast(group, tl.int64) * d_all + d, total, mask=d_in)


def supports(g: Tensor, indices: Tensor, *, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(g)


def embedding_sample_norms(g: Tensor, indices: Tensor, *, precision: str = "ieee") -> Tensor:
    """See `hvpfast.ops.embedding_sample_norms`; sums and results are float32 under every `precision`."""
    (m, t, d), n = g.shape, len(indices)
    if 0 in g.shape:
        return g.new_zeros(m, dtype=torch.float32)
    indices = indices.contiguous()
    starts = torch.arange(0, n * t, t, device=g.device).unsqueeze(1)
    order = (indices.argsort(dim=1, stable=True) + starts).flatten()
    part = g.new_empty(m, triton.cdiv(d, features(d)), dtype=torch.float32)
    with tiles.on_device(g):
        launch(g, order, indices, order, part, m, True)
    return part.sum(1) if part.shape[1] > 1 else part[:, 0]


def launch(g: Tensor, order: Tensor, indices: Tensor, bounds: Tensor, out: Tensor, groups: int, norms: bool) -> None:
    """g (M, T, D) and indices (N, T), contiguous, none of them empty; see `_runs_kernel`."""
    (m, t, d), n = g.shape, len(indices)
    side = features(d)
    tiles_d = triton.cdiv(d, side)
    _runs_kernel[groups, tiles_d](
        g, order, indices, bounds, out, m // n, n, t, d, tiles_d, *g.stride(),
        NORMS=norms, TOGETHER=TOGETHER, FEATURES=side, num_warps=4 if side > 32 else 1, enable_fp_fusion=True,
    )  # fmt: skip


def features(d: int) -> int:
    """Of a program's tile."""
    return tiles.side(d, FEATURES)
