"""A parameter as the ops see it: the statistics of its per-sample gradients, from what its uses captured.

Uses of one weight stand side by side along T, which sums over them exactly (tied weights, modules called twice).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hvpfast import ops
from hvpfast.capture.errors import StateError
from hvpfast.capture.layers import Normal

# Kinds of uses that one weight may have together: a table of embeddings and a Linear.
TIED = {"rows", "linear"}

Use = tuple[Normal, Tensor]  # one call's normal form, and the gradient (M, *output) at its output


class Site:
    """One parameter of `shape`, with M per-sample gradient rows; K below counts directions or sums.

    Attributes:
        rows: M; 0 if no data reach the parameter.
    """

    def __init__(self, shape: tuple[int, ...], rows: int):
        self.shape, self.rows = shape, rows

    def tensors(self) -> list[Tensor]:
        """What the site keeps alive."""
        raise NotImplementedError

    def sample_grads(self) -> Tensor:
        """(M, *shape)"""
        raise NotImplementedError

    def norms_squared(self) -> Tensor:
        """(M,)"""
        raise NotImplementedError

    def dots(self, w: Tensor) -> Tensor:
        """Inner products with K directions (K, *shape) -> (M, K)."""
        raise NotImplementedError

    def weighted(self, c: Tensor) -> Tensor:
        """Weighted sums (M, K) -> (K, *shape)."""
        raise NotImplementedError

    def second_moment(self) -> Tensor:
        """Sum of squares, `shape`."""
        raise NotImplementedError

    def gram(self) -> Tensor:
        """Inner products of the rows' gradients, (M, M)."""
        flat = self.sample_grads().reshape(self.rows, -1)
        return flat @ flat.T


class DenseSite(Site):
    """Gradient rows held as they are, (M, p): biases, scales, and whatever came from autograd."""

    def __init__(self, shape: tuple[int, ...], flat: Tensor):
        super().__init__(shape, flat.shape[0])
        self.flat = flat

    def tensors(self) -> list[Tensor]:
        return [self.flat]

    def sample_grads(self) -> Tensor:
        return self.flat.reshape(-1, *self.shape)

    def norms_squared(self) -> Tensor:
        return self.flat.square().sum(1)

    def dots(self, w: Tensor) -> Tensor:
        return self.flat @ w.reshape(w.shape[0], -1).T.to(self.flat.dtype)

    def weighted(self, c: Tensor) -> Tensor:
        return (c.T.to(self.flat.dtype) @ self.flat).reshape(-1, *self.shape)

    def second_moment(self) -> Tensor:
        return self.flat.square().sum(0).reshape(self.shape)


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

    def sample_grads(self) -> Tensor:
        return self._gather([ops.sample_grads(a, g) for a, g in self.groups])

    def norms_squared(self) -> Tensor:
        return sum(ops.sample_norms_squared(a, g) for a, g in self.groups)

    def dots(self, w: Tensor) -> Tensor:
        pairs = zip(self.groups, self._split(w), strict=True)
        return sum(ops.sample_dots(a, g, part.to(a.dtype)) for (a, g), part in pairs)

    def weighted(self, c: Tensor) -> Tensor:
        return self._gather([ops.weighted_grad(a, g, c.to(a.dtype)) for a, g in self.groups])

    def second_moment(self) -> Tensor:
        return self._gather([ops.second_moment(a, g).unsqueeze(0) for a, g in self.groups])[0]


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

    def _chunks(self) -> Iterator[tuple[Tensor, LinearSite]]:
        """Rows (of M) of a few samples, and their site."""
        k = self.rows // max(1, self.samples)
        order = torch.arange(self.rows, device=self.uses[0][1].device).reshape(k, -1)
        for start in range(0, self.samples, self.step):
            part = slice(start, min(start + self.step, self.samples))
            rows = order[:, part].reshape(-1)
            pairs = []
            for normal, g in self.uses:
                some = g[:, part] if k == 1 else g[:, rows]
                pairs.append((normal.inputs(part), some))
            yield rows, _linear_site(self.shape, pairs, False)

    def _by_rows(self, statistic: Callable[[LinearSite, Tensor], Tensor]) -> Tensor:
        """(M, ...) from each chunk's rows."""
        result: Tensor | None = None
        for rows, site in self._chunks():
            part = statistic(site, rows)
            if result is None:
                if len(rows) == self.rows:
                    return part
                result = part.new_empty(self.rows, *part.shape[1:])
            result[rows] = part
        return result

    def _summed(self, statistic: Callable[[LinearSite, Tensor], Tensor]) -> Tensor:
        total: Tensor | None = None
        for rows, site in self._chunks():
            part = statistic(site, rows)
            total = part if total is None else total.add_(part)
        return total

    def sample_grads(self) -> Tensor:
        return self._by_rows(lambda site, _: site.sample_grads())

    def norms_squared(self) -> Tensor:
        return self._by_rows(lambda site, _: site.norms_squared())

    def dots(self, w: Tensor) -> Tensor:
        return self._by_rows(lambda site, _: site.dots(w))

    def weighted(self, c: Tensor) -> Tensor:
        return self._summed(lambda site, rows: site.weighted(c[rows]))

    def second_moment(self) -> Tensor:
        return self._summed(lambda site, _: site.second_moment())


class LookupSite(Site):
    """An embedding's weight (V, D): row indices (N, T) and gradients (M, T, D); never an (M, V, D) array unless asked."""

    def __init__(self, shape: tuple[int, ...], indices: Tensor, g: Tensor):
        super().__init__(shape, g.shape[0])
        self.indices, self.g = indices, g

    def tensors(self) -> list[Tensor]:
        return [self.indices, self.g]

    def _indices(self) -> Tensor:
        """(M, T): row m looks up what sample m % N does."""
        return self.indices.repeat(self.rows // max(1, self.indices.shape[0]), 1)

    def _summed(self) -> tuple[Tensor, Tensor]:
        """The distinct (row, index) pairs as row * V + index, (U,), and the sum of gradients of each, (U, D)."""
        v, d = self.shape
        keys = self._indices() + v * torch.arange(self.rows, device=self.g.device).unsqueeze(1)
        distinct, place = keys.reshape(-1).unique(return_inverse=True)
        return distinct, self.g.new_zeros(distinct.numel(), d).index_add_(0, place, self.g.reshape(-1, d))

    def sample_grads(self) -> Tensor:
        v, d = self.shape
        keys, sums = self._summed()
        return self.g.new_zeros(self.rows * v, d).index_copy_(0, keys, sums).reshape(self.rows, v, d)

    def norms_squared(self) -> Tensor:
        keys, sums = self._summed()
        return self.g.new_zeros(self.rows).index_add_(0, keys // self.shape[0], sums.square().sum(1))

    def dots(self, w: Tensor) -> Tensor:
        looked_up = w.to(self.g.dtype)[:, self._indices()]  # (K, M, T, D)
        return torch.einsum("mtd,kmtd->mk", self.g, looked_up)

    def weighted(self, c: Tensor) -> Tensor:
        v, d = self.shape
        scaled = torch.einsum("mk,mtd->mtkd", c.to(self.g.dtype), self.g).reshape(-1, c.shape[1], d)
        sums = self.g.new_zeros(v, c.shape[1], d).index_add_(0, self._indices().reshape(-1), scaled)
        return sums.movedim(1, 0)

    def second_moment(self) -> Tensor:
        keys, sums = self._summed()
        return self.g.new_zeros(self.shape).index_add_(0, keys % self.shape[0], sums.square())


class TiedSite(Site):
    """One weight (V, D) that is looked up and multiplied with: an embedding whose table is the last layer's weight too.

    Its gradient is the sum of both uses'; statistics add up but for what they have in common in the rows looked up.
    """

    def __init__(self, lookup: LookupSite, linear: LinearSite):
        super().__init__(lookup.shape, lookup.rows)
        self.lookup, self.linear = lookup, linear

    def tensors(self) -> list[Tensor]:
        return [*self.lookup.tensors(), *self.linear.tensors()]

    def sample_grads(self) -> Tensor:
        return self.linear.sample_grads().add_(self.lookup.sample_grads())

    def _common(self) -> tuple[Tensor, Tensor, Tensor]:
        """The distinct (row, index) pairs as row * V + index, (U,), and of each the lookups' and the product's gradient,
        both (U, D)."""
        keys, sums = self.lookup._summed()
        ((a, g),) = self.linear.groups
        parts, row, index = [], keys // self.shape[0], keys % self.shape[0]
        for m in range(self.rows):
            parts.append(g[m][:, index[row == m]].T.to(sums.dtype) @ a[m % a.shape[0]].to(sums.dtype))
        return keys, sums, torch.cat(parts)

    def norms_squared(self) -> Tensor:
        keys, ours, theirs = self._common()
        total = self.lookup.norms_squared() + self.linear.norms_squared()
        return total.index_add_(0, keys // self.shape[0], 2 * (ours * theirs).sum(1))

    def dots(self, w: Tensor) -> Tensor:
        return self.lookup.dots(w) + self.linear.dots(w)

    def weighted(self, c: Tensor) -> Tensor:
        return self.lookup.weighted(c) + self.linear.weighted(c)

    def second_moment(self) -> Tensor:
        keys, ours, theirs = self._common()
        moment = self.linear.second_moment()
        moment.index_add_(0, keys % self.shape[0], ours.mul_(ours + 2 * theirs))
        return moment.clamp_(min=0)  # (ours + theirs)^2 - theirs^2 was added: rounding may leave less than nothing


class EmptySite(Site):
    """A parameter that this batch does not reach."""

    def tensors(self) -> list[Tensor]:
        return []


def site_of(shape: tuple[int, ...], as_weight: list[Use], as_bias: list[Use], samples: int) -> Site:
    """The site of a parameter from all its uses in a batch of N = `samples`: of one kind, or lookups and products."""
    if as_weight and as_bias:
        raise StateError(f"a parameter of shape {shape} serves both as a weight and as a bias; it has no rule")
    if as_bias:
        return DenseSite(shape, sum(_bias_rows(normal, grad) for normal, grad in as_bias))
    if not as_weight:
        return EmptySite(shape, 0)
    kind = as_weight[0][0].kind
    if {normal.kind for normal, _ in as_weight} == TIED:
        lookups, products = ([use for use in as_weight if use[0].kind == one] for one in ("rows", "linear"))
        return TiedSite(site_of(shape, lookups, [], samples), site_of(shape, products, [], samples))
    if all(normal.patches for normal, _ in as_weight):
        uses = [(normal, normal.grads(grad)) for normal, grad in as_weight]
        return PatchSite(shape, uses, samples)
    pairs = [(normal.inputs(), normal.grads(grad)) for normal, grad in as_weight]
    if kind == "scale":
        return DenseSite(shape, sum(_scale_rows(a[0], g[0]) for a, g in pairs))
    if kind == "rows":
        a, g = _side_by_side(pairs)
        return LookupSite(shape, a[0, :, :, 0], _wide(g[0]))
    return _linear_site(shape, pairs, kind == "transposed")


def _side_by_side(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(G, N, T, I) and (G, M, T, O) of every use, concatenated along T."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([a for a, _ in pairs], 2), torch.cat([g for _, g in pairs], 2)


def _linear_site(shape: tuple[int, ...], pairs: Sequence[tuple[Tensor, Tensor]], transposed: bool) -> LinearSite:
    a, g = _side_by_side(pairs)
    return LinearSite(shape, list(zip(a.unbind(0), g.to(a.dtype).unbind(0), strict=True)), transposed)


def _bias_rows(normal: Normal, grad: Tensor) -> Tensor:
    """(M, O), each group's outputs side by side."""
    if normal.bias is not None:
        return normal.bias(_wide(grad))
    g = _wide(normal.grads(grad))
    g = g[:, :, 0] if g.shape[2] == 1 else g.sum(2)  # (G, M, O)
    return g.movedim(0, 1).reshape(g.shape[1], -1)


def _scale_rows(a: Tensor, g: Tensor) -> Tensor:
    """sum_t g_t o a_t: a (N, T, p), g (M, T, p) -> (M, p)"""
    n, t, p = a.shape
    return torch.einsum("kntp,ntp->knp", _wide(g).reshape(-1, n, t, p), _wide(a)).reshape(-1, p)


def _wide(x: Tensor) -> Tensor:
    return x.to(ops.accumulate_dtype(x.dtype))
