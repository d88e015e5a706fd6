"""What several references share: widening, and the pairing of gradient rows with inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hvpfast.arguments import alike, floats
from hvpfast.untouchable import fits


def wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def pair(name: str, a: Tensor, g: Tensor) -> None:
    """Raise unless a (N, T, I) and g (M, T, O) pair as g[m] with a[m % N]."""
    if fits("nti,mto", a, g):
        return
    if not alike(a, g):
        floats(name, a=a, g=g)
    if a.dim() != 3 or g.dim() != 3:
        raise ValueError(
            f"{name}: a has shape {tuple(a.shape)} and g {tuple(g.shape)}; they must be (N, T, I) and (M, T, O): "
            f"give a plain Linear's tensors a T axis of size 1 with unsqueeze(1)"
        )
    (n, t, _), (m, positions, _) = a.shape, g.shape
    if (m % n if n else m) != 0:
        raise ValueError(
            f"{name}: a has {n} rows but g has {m}; g must have a multiple of a's rows (g[m] pairs with a[m % N])"
        )
    if t != positions:
        raise ValueError(f"{name}: a has T = {t} positions but g has {positions}; they must be the same")


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """total (V, ...) with rows (R, ...) added in place at `index` (R,), the same bits every time: on GPUs index_add_ adds in
    whatever order, and index_put_ sorts first."""
    if total.is_cpu:
        return total.index_add_(0, index, rows)
    return total.index_put_((index,), rows, accumulate=True)


def summed(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """(count, ...): the sum of the rows (R, ...) at each `index` (R,), in an order like that of `add_rows`; differentiable."""
    total = rows.new_zeros(count, *rows.shape[1:])
    return total.index_add(0, index, rows) if total.is_cpu else total.index_put((index,), rows, accumulate=True)


def lower_strips(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of matrices (..., I, I) in strips, each with the (n, n) mask of what its corner on the diagonal has on or
    below it. A strip of 128 is turned within a core's cache (2.9 ms for I = 2048, 7.5 ms at 512, one AVX-512 core,
    2026-11-22); a GPU has few launches to make instead."""
    size, side = x.shape[-1], 128 if x.is_cpu else 1024
    mask = torch.ones(min(side, size), min(side, size), dtype=torch.bool, device=x.device).tril_()
    for start in range(0, size, side):
        n = min(side, size - start)
        yield slice(start, start + n), mask[:n, :n]


def mirror_lower(x: Tensor) -> Tensor:
    """Matrices (..., I, I) made symmetric in place: what is above the diagonal becomes a copy of what is below. Nothing is
    allocated but a strip's corner."""
    for strip, kept in lower_strips(x):
        x[..., : strip.start, strip] = x[..., strip, : strip.start].mT
        corner = x[..., strip, strip]
        corner.copy_(torch.where(kept, corner, corner.mT))
    return x


def columns(a: Tensor, g: Tensor) -> int:
    """K: how many gradient rows pair with each input row."""
    return g.shape[0] // a.shape[0] if a.shape[0] else 1


def repeat(a: Tensor, g: Tensor) -> Tensor:
    """a (N, T, I) -> (M, T, I), row m being a[m % N]; a view where M = N."""
    k = columns(a, g)
    return a if k == 1 else a.expand(k, *a.shape).reshape(g.shape[0], *a.shape[1:])


_ELEMENTS = 1 << 21  # float64 elements that a sum converts at a time


def pieces_of(x: Tensor, dim: int) -> list[slice]:
    """Slices along `dim` that hold about `_ELEMENTS` elements each."""
    step = max(1, _ELEMENTS * x.shape[dim] // max(1, x.numel()))
    return [slice(start, start + step) for start in range(0, x.shape[dim], step)]


# Elements that a CPU's sums convert at a time, in memory that is used again. Two cores with AVX-512, 2026-11-21, float32, one
# column of 1e6 elements: 0.59 ms, by pieces in fresh memory 1.07 ms; four columns: 3.6 and 8.2 ms.
_CACHED = 1 << 17


def column_dots(x: Tensor, y: Tensor) -> Tensor:
    """x, y (n, K) -> (K,) float64: the dot product of each pair of columns."""
    if x.numel() <= _CACHED or (x.dtype is torch.float64 and x.is_cpu):
        return _piece_dots(x.double(), x.double() if y is x else y.double())
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    if not x.is_cpu:
        return sum((_piece_dots(x[rows].double(), y[rows].double()) for rows in pieces_of(x, 0)), total)
    step = max(1, _CACHED // x.shape[1])
    left, right = (total.new_empty(step, x.shape[1]) for _ in range(2))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        size = min(step, len(x) - start)
        total += _piece_dots(left[:size].copy_(x[rows]), right[:size].copy_(y[rows]))
    return total


def _piece_dots(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x[:, 0], y[:, 0]).reshape(1) if x.shape[1] == 1 else (x * y).sum(0)
