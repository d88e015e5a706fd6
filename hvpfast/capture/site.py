"""What a parameter's per-sample gradients are asked for, and those that are held as rows: the base of every site."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hvpfast import ops


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

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics."""
        return ops.accumulate_dtype(self.tensors()[-1].dtype)

    def sample_grads(self, out: Tensor | None = None) -> Tensor:
        """(M, *shape), in `out` if given: a contiguous tensor of that shape and dtype."""
        raise NotImplementedError

    def surely_finite(self) -> bool:
        """Whether it is known, for less than a look at `sample_grads`, that they hold neither NaN nor inf."""
        return False

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

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Norms squared (M,), the rows' sum and their second moment, both `shape`, in one pass where there is one."""
        norms, moment = self.norms_squared(), self.second_moment()
        return norms, self.weighted(self.ones())[0], moment

    def ones(self) -> Tensor:
        """Weights (M, 1) of a plain sum."""
        return self.tensors()[0].new_ones(self.rows, 1)

    def gram(self) -> Tensor:
        """Inner products of the rows' gradients, (M, M)."""
        flat = self.sample_grads().reshape(self.rows, -1)
        return flat @ flat.T


class DenseSite(Site):
    """Gradient rows held as they are, (M, p): biases of single positions, and whatever came from autograd."""

    def __init__(self, shape: tuple[int, ...], flat: Tensor, borrowed: bool = False):
        """`borrowed`: the rows may be another tensor's memory, which no caller must get."""
        super().__init__(shape, flat.shape[0])
        self.flat, self._borrowed = flat, borrowed

    def tensors(self) -> list[Tensor]:
        return [self.flat]

    def sample_grads(self, out: Tensor | None = None) -> Tensor:
        rows = self.flat.reshape(-1, *self.shape)
        return out.copy_(rows) if out is not None else rows.clone() if self._borrowed else rows

    def norms_squared(self) -> Tensor:
        # Of the gradients of a Linear's bias, whose input is a one: in one pass, with no array of squares.
        return ops.sample_norms_squared(self.flat.new_ones(1, 1, 1).expand(self.rows, 1, 1), self.flat.unsqueeze(1))

    def dots(self, w: Tensor) -> Tensor:
        return self.flat @ w.reshape(w.shape[0], -1).T.to(self.flat.dtype)

    def weighted(self, c: Tensor) -> Tensor:
        return (c.T.to(self.flat.dtype) @ self.flat).reshape(-1, *self.shape)

    def second_moment(self) -> Tensor:
        return self.flat.square().sum(0).reshape(self.shape)


class SummedSite(DenseSite):
    """A bias or a scale, whose rows are sums over positions: they are made where more than their norms and squares is asked for.

    statistics: () -> (norms squared (M,), sum of squares (p,)). make: () -> (M, p).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        rows: int,
        statistics: Callable[[], tuple[Tensor, Tensor]],
        make: Callable[[], Tensor],
    ):
        Site.__init__(self, shape, rows)
        self._statistics, self._make, self._borrowed = statistics, make, False

    @functools.cached_property
    def flat(self) -> Tensor:
        rows = self._make()
        self._statistics = self._make = None  # nor what they hold: the rows are all that is needed now
        return rows

    def norms_squared(self) -> Tensor:
        return super().norms_squared() if self._statistics is None else self._statistics()[0].clone()

    def second_moment(self) -> Tensor:
        if self._statistics is None:
            return super().second_moment()
        return self._statistics()[1].reshape(self.shape).clone()


class EmptySite(Site):
    """A parameter that this batch does not reach."""

    def tensors(self) -> list[Tensor]:
        return []


def added(parts: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors: `sum` would copy the first."""
    return functools.reduce(Tensor.add, parts)


def widened(x: Tensor) -> Tensor:
    return x.to(ops.accumulate_dtype(x.dtype))
