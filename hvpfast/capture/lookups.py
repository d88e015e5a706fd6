"""Embedding tables: looked up, and looked up and multiplied with."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpfast import ops
from hvpfast.capture.site import Site, widened
from hvpfast.ops.shared import add_rows

if TYPE_CHECKING:
    from hvpfast.capture.sites import LinearSite


class LookupSite(Site):
    """An embedding's weight (V, D): row indices (N, T) and gradients (M, T, D); never an (M, V, D) array unless asked."""

    def __init__(self, shape: tuple[int, ...], indices: Tensor, g: Tensor):
        super().__init__(shape, g.shape[0])
        self.indices, self.g = indices, g

    def tensors(self) -> list[Tensor]:
        return [self.indices, self.g]

    @functools.cached_property
    def _g(self) -> Tensor:
        """g in the dtype of the sums."""
        return widened(self.g)

    def _indices(self) -> Tensor:
        """(M, T): row m looks up what sample m % N does."""
        return self.indices.repeat(self.rows // max(1, self.indices.shape[0]), 1)

    def _summed(self) -> tuple[Tensor, Tensor]:
        """The distinct (row, index) pairs as row * V + index, (U,), and the sum of gradients of each, (U, D)."""
        v, d = self.shape
        keys = self._indices() + v * torch.arange(self.rows, device=self.g.device).unsqueeze(1)
        distinct, place = keys.reshape(-1).unique(return_inverse=True)
        return distinct, add_rows(self._g.new_zeros(distinct.numel(), d), place, self._g.reshape(-1, d))

    def sample_grads(self, out: Tensor | None = None) -> Tensor:
        v, d = self.shape
        keys, sums = self._summed()
        whole = sums.new_empty(self.rows * v, d) if out is None else out.view(-1, d)
        return whole.zero_().index_copy_(0, keys, sums).view(self.rows, v, d)

    def norms_squared(self) -> Tensor:
        return ops.embedding_sample_norms(self.g, self.indices)

    def dots(self, w: Tensor) -> Tensor:
        looked_up = w.to(self._g.dtype)[:, self._indices()]  # (K, M, T, D)
        return torch.einsum("mtd,kmtd->mk", self._g, looked_up)

    def weighted(self, c: Tensor) -> Tensor:
        v, d = self.shape
        scaled = torch.einsum("mk,mtd->mtkd", c.to(self._g.dtype), self._g).reshape(-1, c.shape[1], d)
        sums = add_rows(scaled.new_zeros(v, c.shape[1], d), self._indices().reshape(-1), scaled)
        return sums.movedim(1, 0)

    def second_moment(self) -> Tensor:
        return ops.embedding_second_moment(self.g, self.indices, self.shape[0])


class TiedSite(Site):
    """One weight (V, D) that is looked up and multiplied with: an embedding whose table is the last layer's weight too.

    Its gradient is the sum of both uses'; statistics add up but for what they have in common in the rows looked up.
    """

    def __init__(self, lookup: LookupSite, linear: LinearSite):
        super().__init__(lookup.shape, lookup.rows)
        self.lookup, self.linear = lookup, linear

    def tensors(self) -> list[Tensor]:
        return [*self.lookup.tensors(), *self.linear.tensors()]

    def sample_grads(self, out: Tensor | None = None) -> Tensor:
        return self.linear.sample_grads(out).add_(self.lookup.sample_grads())

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
        return add_rows(total, keys // self.shape[0], 2 * (ours * theirs).sum(1))

    def dots(self, w: Tensor) -> Tensor:
        return self.lookup.dots(w) + self.linear.dots(w)

    def weighted(self, c: Tensor) -> Tensor:
        return self.lookup.weighted(c) + self.linear.weighted(c)

    def second_moment(self) -> Tensor:
        keys, ours, theirs = self._common()
        moment = self.linear.second_moment()
        add_rows(moment, keys % self.shape[0], ours.mul_(ours + 2 * theirs))
        return moment.clamp_(min=0)  # (ours + theirs)^2 - theirs^2 was added: rounding may leave less than nothing
