"""A parameter as the ops see it: the statistics of its per-sample gradients, from what its uses captured.

Uses of one weight stand side by side along T, which sums over them exactly (tied weights, modules called twice).
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hvpfast import ops
from hvpfast.capture.errors import StateError
from hvpfast.capture.layers import Normal
from hvpfast.capture.lookups import LookupSite, TiedSite
from hvpfast.capture.site import DenseSite, EmptySite, Site, SummedSite, added, widened
from hvpfast.heap import spacious

# Kinds of uses that one weight may have together: a table of embeddings and a Linear.
TIED = {"rows", "linear"}

Use = tuple[Normal, Tensor]  # one call's normal form, and the gradient (M, *output) at its output


class _Scaling:
    """One call of a norm layer: what its scale and its shift need, in one pass over the input and the gradient."""

    def __init__(self, normal: Normal, grad: Tensor):
        self._normal, self._grad = normal, grad

    @functools.cached_property
    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (x, how), g = self._normal.scaled(), self._normal.grads(self._grad)[0]
        if x.dtype is not g.dtype:  # autocast
            x, g = widened(x), widened(g)
        return ops.norm_sample_stats(x, g, **how)


# By the ids of a call's normal form and gradient, which an entry keeps alive: a scale and its shift find each other.
_scalings: weakref.WeakValueDictionary[tuple[int, int], _Scaling] = weakref.WeakValueDictionary()


class LinearSite(Site):
    """A weight of a grouped linear map: `groups` of (a (N, T, I), g (M, T, O)); `transposed` if stored (G, I, O)."""

    def __init__(self, shape: tuple[int, ...], groups: Sequence[tuple[Tensor, Tensor]], transposed: bool):
        super().__init__(shape, groups[0][1].shape[0])
        self.groups, self.transposed = list(groups), transposed

    def tensors(self) -> list[Tensor]:
        return [x for pair in self.groups for x in pair]

    def _gather(self, parts: list[Tensor]) -> Tensor:
        """One (R, O, I) a group -> (R, *shape)"""
        parts = [part.mT for part in parts] if self.transposed else parts
        whole = parts[0] if len(parts) == 1 else torch.stack(parts, 1)
        return whole.reshape(whole.shape[0], *self.shape)

    def _split(self, w: Tensor) -> list[Tensor]:
        """(K, *shape) -> one (K, O, I) a group"""
        a, g = self.groups[0]
        last = (a.shape[2], g.shape[2]) if self.transposed else (g.shape[2], a.shape[2])
        parts = w.reshape(w.shape[0], len(self.groups), *last).unbind(1)
        return [part.mT if self.transposed else part for part in parts]

    def sample_grads(self, out: Tensor | None = None) -> Tensor:
        a, g = self.groups[0]
        if len(self.groups) > 1 or self.transposed:
            whole = self._gather([ops.sample_grads(a, g) for a, g in self.groups])
            return whole if out is None else out.copy_(whole)
        out = spacious((self.rows, *self.shape), self.dtype, a.device) if out is None else out
        ops.sample_grads(a, g, out=out.view(self.rows, g.shape[2], a.shape[2]))
        return out

    def surely_finite(self) -> bool:
        (a, g), *others = self.groups
        if others or 4 * (a.numel() + g.numel()) > self.rows * math.prod(self.shape):
            return False
        largest = float(a.abs().amax()) * float(g.abs().amax()) * a.shape[1]
        return largest < torch.finfo(self.dtype).max / 2

    def norms_squared(self) -> Tensor:
        return added(ops.sample_norms_squared(a, g) for a, g in self.groups)

    def dots(self, w: Tensor) -> Tensor:
        pairs = zip(self.groups, self._split(w), strict=True)
        return added(ops.sample_dots(a, g, part.to(a.dtype)) for (a, g), part in pairs)

    def weighted(self, c: Tensor) -> Tensor:
        return self._gather([ops.weighted_grad(a, g, c.to(a.dtype)) for a, g in self.groups])

    def second_moment(self) -> Tensor:
        return self._gather([ops.second_moment(a, g).unsqueeze(0) for a, g in self.groups])[0]

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        norms, sums, squares = zip(*(ops.sample_statistics(a, g) for a, g in self.groups), strict=True)
        return added(norms), *(self._gather([one.unsqueeze(0) for one in parts])[0] for parts in (sums, squares))


class PatchSite(Site):
    """A convolution's weight. Patches are k^d times the input, so they are made for a few samples at a time, in memory
    that stays in the cache and is used again; only the inputs and the output gradients are kept.

    `uses`: each call's (normal form, g (G, M, T, O)).
    """

    # Elements of the patches of one chunk. On two cores with AVX-512, 2026-11-21, patches of 14 samples of (64, 16, 16) took
    # 0.9 ms, of 128 samples 80 ms: fresh pages and the cache cost more than the copy.
    CHUNK = 1 << 20

    def __init__(self, shape: tuple[int, ...], uses: Sequence[tuple[Normal, Tensor]], samples: int):
        super().__init__(shape, uses[0][1].shape[1])
        self.uses, self.samples = list(uses), samples
        self.step = max(1, self.CHUNK // max(1, sum(normal.patches for normal, _ in uses)))

    def tensors(self) -> list[Tensor]:
        return [g for _, g in self.uses]

    def _chunks(self) -> Iterator[tuple[Tensor | slice, LinearSite]]:
        """Rows (of M) of a few samples, and their site."""
        k = self.rows // max(1, self.samples)
        order = torch.arange(self.rows, device=self.uses[0][1].device).reshape(k, -1)
        for start in range(0, self.samples, self.step):
            part = slice(start, min(start + self.step, self.samples))
            rows = order[:, part].reshape(-1) if k > 1 else part
            pairs = []
            for normal, g in self.uses:
                some = g[:, part] if k == 1 else g[:, rows]
                pairs.append((normal.inputs(part), some))
            yield rows, _linear_site(self.shape, pairs, False)

    def _by_rows(self, statistic: Callable[[LinearSite], Tensor]) -> Tensor:
        """(M, ...) from each chunk's rows."""
        result: Tensor | None = None
        for rows, site in self._chunks():
            part = statistic(site)
            if result is None:
                if len(part) == self.rows:
                    return part
                result = part.new_empty(self.rows, *part.shape[1:])
            result[rows] = part
        return result

    def _summed(self, statistic: Callable[[LinearSite, Tensor | slice], Tensor]) -> Tensor:
        total: Tensor | None = None
        for rows, site in self._chunks():
            part = statistic(site, rows)
            total = part if total is None else total.add_(part)
        return total

    def sample_grads(self, out: Tensor | None = None) -> Tensor:
        for rows, site in self._chunks():
            if out is None:
                out = spacious(
                    (self.rows, *self.shape), ops.accumulate_dtype(site.groups[0][0].dtype), self.uses[0][1].device
                )
            if isinstance(rows, slice):
                site.sample_grads(out[rows])
            else:
                out[rows] = site.sample_grads()
        return out

    def norms_squared(self) -> Tensor:
        return self._by_rows(LinearSite.norms_squared)

    def dots(self, w: Tensor) -> Tensor:
        return self._by_rows(lambda site: site.dots(w))

    def weighted(self, c: Tensor) -> Tensor:
        return self._summed(lambda site, rows: site.weighted(c[rows]))

    def second_moment(self) -> Tensor:
        return self._summed(lambda site, _: site.second_moment())

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        norms, total = None, None
        for rows, site in self._chunks():
            part, *sums = site.statistics()
            norms = part.new_empty(self.rows) if norms is None else norms
            norms[rows] = part
            total = sums if total is None else [whole.add_(one) for whole, one in zip(total, sums, strict=True)]
        return norms, *total


def site_of(shape: tuple[int, ...], as_weight: list[Use], as_bias: list[Use], samples: int) -> Site:
    """The site of a parameter from all its uses in a batch of N = `samples`: of one kind, or lookups and products."""
    if as_weight and as_bias:
        raise StateError(f"a parameter of shape {shape} serves both as a weight and as a bias; it has no rule")
    if as_bias:
        return _bias_site(shape, as_bias)
    if not as_weight:
        return EmptySite(shape, 0)
    kind = as_weight[0][0].kind
    if {normal.kind for normal, _ in as_weight} == TIED:
        lookups, products = ([use for use in as_weight if use[0].kind == one] for one in ("rows", "linear"))
        return TiedSite(site_of(shape, lookups, [], samples), site_of(shape, products, [], samples))
    if all(normal.patches for normal, _ in as_weight):
        uses = [(normal, normal.grads(grad)) for normal, grad in as_weight]
        return PatchSite(shape, uses, samples)
    if kind == "scale":
        return _scale_site(shape, as_weight)
    pairs = [(normal.inputs(), normal.grads(grad)) for normal, grad in as_weight]
    if kind == "rows":
        a, g = _side_by_side(pairs)
        return LookupSite(shape, a[0, :, :, 0], g[0])
    return _linear_site(shape, pairs, kind == "transposed")


def _side_by_side(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(G, N, T, I) and (G, M, T, O) of every use, concatenated along T."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([a for a, _ in pairs], 2), torch.cat([g for _, g in pairs], 2)


def _linear_site(shape: tuple[int, ...], pairs: Sequence[tuple[Tensor, Tensor]], transposed: bool) -> LinearSite:
    a, g = _side_by_side(pairs)
    return LinearSite(shape, list(zip(a.unbind(0), g.to(a.dtype).unbind(0), strict=True)), transposed)


def _scale_site(shape: tuple[int, ...], uses: list[Use]) -> Site:
    def rows() -> Tensor:
        return added(_scale_rows(normal.inputs()[0], normal.grads(grad)[0]) for normal, grad in uses)

    ((normal, grad), *others) = uses
    if others or normal.scaled is None:
        return DenseSite(shape, rows())
    scaling = _scalings[id(normal), id(grad)] = _Scaling(normal, grad)
    return SummedSite(shape, normal.grads(grad).shape[1], lambda: scaling.statistics[0::2], rows)


def _bias_site(shape: tuple[int, ...], uses: list[Use]) -> Site:
    def rows() -> Tensor:
        return added(_bias_rows(normal, grad) for normal, grad in uses)

    ((normal, grad), *others) = uses
    if others or normal.bias is not None:
        return DenseSite(shape, rows())
    g = normal.grads(grad)  # (G, M, T, O)
    scaling = _scalings.get((id(normal), id(grad)))
    if scaling is not None:
        return SummedSite(shape, g.shape[1], lambda: scaling.statistics[1::2], rows)
    if g.shape[2] == 1:
        return DenseSite(shape, rows(), borrowed=True)
    g = g.permute(1, 2, 0, 3).flatten(2)
    return SummedSite(shape, len(g), lambda: ops.bias_sample_stats(g), rows)


def _bias_rows(normal: Normal, grad: Tensor) -> Tensor:
    """(M, O), each group's outputs side by side."""
    if normal.bias is not None:
        return normal.bias(widened(grad))
    g = widened(normal.grads(grad))
    g = g[:, :, 0] if g.shape[2] == 1 else g.sum(2)  # (G, M, O)
    return g.movedim(0, 1).reshape(g.shape[1], -1)


def _scale_rows(a: Tensor, g: Tensor) -> Tensor:
    """sum_t g_t o a_t: a (N, T, p), g (M, T, p) -> (M, p)"""
    n, t, p = a.shape
    a, g = widened(a), widened(g).reshape(-1, n, t, p)
    if g.stride(3) == 1:  # not so where channels come first, which the batched product takes as they are
        return (g * a).sum(2).reshape(-1, p)
    return torch.einsum("kntp,ntp->knp", g, a).reshape(-1, p)
