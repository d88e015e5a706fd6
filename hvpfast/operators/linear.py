"""Linear operators: what `@` takes and returns, the algebra, and the ways out (dense, SciPy)."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpfast.autocast import full_precision
from hvpfast.space import Space

if TYPE_CHECKING:
    import scipy.sparse.linalg


class LinearOperator:
    """A symmetric (P, P) matrix over named parameters, known by its products.

    `A @ v` takes and returns one form: flat `(P,)`, `(P, K)`, or a dict or list of tensors shaped like the parameters
    (with a last axis of K for K columns). `A + B`, `A - B`, `-A`, `2 * A`, `A / 2` and `A @ B` are operators; so is
    `A + 0.1 * Identity(A)`. Nothing is computed before a product is asked for.

    Attributes:
        shape: (P, P). dtype, device: the parameters'. params: {name: parameter}.
    """

    def __init__(self, space: Space, params: dict[str, Tensor]):
        self.space, self._params = space, params
        self.shape = (space.size, space.size)
        self.dtype, self.device = space.dtype, space.device

    @property
    def params(self) -> dict[str, Tensor]:
        return dict(self._params)

    def _rows(self, rows: Tensor) -> Tensor:
        """The product, (K, P) -> (K, P): row k is A times row k."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.shape[0]} x {self.shape[1]}, {self.dtype}, {self.device}>"

    @full_precision
    def __matmul__(self, v: object) -> object:
        if isinstance(v, LinearOperator):
            return Product(self, v)
        rows, restore = self.space.rows(v, f"{type(self).__name__} @ v")
        if rows.shape[0] == 0 or rows.shape[1] == 0:
            return restore(torch.zeros_like(rows))
        return restore(self._rows(rows))

    def __rmatmul__(self, v: object) -> object:
        """`v' A` for a flat vector or (K, P) rows; the operator is symmetric."""
        if isinstance(v, Tensor):
            return (self @ v.T).T if v.dim() == 2 else self @ v
        return NotImplemented

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """`tensor @ A` and `scalar_tensor * A` reach the operator: torch asks here before it gives up."""
        if len(args) == 2 and isinstance(args[0], Tensor) and isinstance(args[1], LinearOperator):
            if func in (Tensor.__matmul__, Tensor.matmul, torch.matmul):
                return args[1].__rmatmul__(args[0])
            if func in (Tensor.__mul__, Tensor.mul, torch.mul):
                return args[1].__mul__(args[0])
        return NotImplemented

    def __add__(self, other: object) -> LinearOperator:
        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: object) -> LinearOperator:
        return Sum(self, Scaled(-1.0, other)) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: object) -> LinearOperator:
        return Scaled(_scalar(factor), self) if _is_scalar(factor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, factor: object) -> LinearOperator:
        return Scaled(1 / _scalar(factor), self) if _is_scalar(factor) else NotImplemented

    def __neg__(self) -> LinearOperator:
        return Scaled(-1.0, self)

    @property
    def T(self) -> LinearOperator:
        return self

    def adjoint(self) -> LinearOperator:
        """The transpose: the operator itself, which is symmetric (a product of two is not: see `Product`)."""
        return self.T

    @full_precision
    def quadratic_form(self, v: object) -> Tensor:
        """`v' A v`, summed in float64: a scalar, or (K,) for K columns (not the (K, K) matrix)."""
        rows, _ = self.space.rows(v, f"{type(self).__name__}.quadratic_form")
        values = (rows.double() * self._rows(rows).double()).sum(1)
        flat = isinstance(v, Tensor) and v.dim() == 1
        listed = not isinstance(v, Tensor) and rows.shape[0] == 1
        return values[0] if flat or listed else values

    @full_precision
    def to_dense(self, *, columns: int = 64) -> Tensor:
        """The (P, P) matrix, by products with the identity, `columns` at a time. For small P: it takes P products."""
        p = self.shape[0]
        dense = torch.empty(p, p, dtype=self.dtype, device=self.device)
        for start in range(0, p, columns):
            stop = min(start + columns, p)
            basis = torch.zeros(stop - start, p, dtype=self.dtype, device=self.device)
            basis[torch.arange(stop - start), torch.arange(start, stop)] = 1
            dense[:, start:stop] = self._rows(basis).T
        return dense

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """A `scipy.sparse.linalg.LinearOperator` of the same matrix (numpy in, numpy out; products run on `device`)."""
        from scipy.sparse.linalg import LinearOperator as SciPyOperator

        kind = torch.float64 if self.dtype is torch.float64 else torch.float32

        def product(v, operator=self):
            rows = torch.as_tensor(v).to(operator.device, kind)
            result = operator._rows(rows.reshape(operator.shape[1], -1).T.to(operator.dtype)).T
            return result.to("cpu", kind).numpy().reshape(v.shape)

        def adjoint(v):
            return product(v, self.T)

        return SciPyOperator(
            shape=self.shape,
            dtype=torch.zeros(0, dtype=kind).numpy().dtype,
            matvec=product,
            matmat=product,
            rmatvec=adjoint,
            rmatmat=adjoint,
        )


def _is_scalar(x: object) -> bool:
    return isinstance(x, numbers.Real) or (isinstance(x, Tensor) and x.dim() == 0)


def _scalar(x: object) -> float:
    return float(x)


def _same_space(left: LinearOperator, right: LinearOperator) -> None:
    if left.space.names != right.space.names or left.space.shapes != right.space.shapes:
        raise ValueError(
            f"the operators act on different parameters: {left.shape[0]} numbers in {len(left.space.names)} tensors and "
            f"{right.shape[0]} in {len(right.space.names)}; build both with the same params="
        )


class Sum(LinearOperator):
    """A + B."""

    def __init__(self, left: LinearOperator, right: LinearOperator):
        _same_space(left, right)
        super().__init__(left.space, left._params)
        self.left, self.right = left, right

    def _rows(self, rows: Tensor) -> Tensor:
        return self.left._rows(rows) + self.right._rows(rows)

    @property
    def T(self) -> LinearOperator:
        return Sum(self.left.T, self.right.T)


class Scaled(LinearOperator):
    """c A."""

    def __init__(self, factor: float, operator: LinearOperator):
        super().__init__(operator.space, operator._params)
        self.factor, self.operator = factor, operator

    def _rows(self, rows: Tensor) -> Tensor:
        return self.operator._rows(rows) * self.factor

    @property
    def T(self) -> LinearOperator:
        return Scaled(self.factor, self.operator.T)


class Product(LinearOperator):
    """A B, which is symmetric only if A and B commute; its transpose is B' A'."""

    def __init__(self, left: LinearOperator, right: LinearOperator):
        _same_space(left, right)
        super().__init__(left.space, left._params)
        self.left, self.right = left, right

    def _rows(self, rows: Tensor) -> Tensor:
        return self.left._rows(self.right._rows(rows))

    @property
    def T(self) -> LinearOperator:
        return Product(self.right.T, self.left.T)

    def __rmatmul__(self, v: object) -> object:
        if isinstance(v, Tensor):
            return (self.T @ v.T).T if v.dim() == 2 else self.T @ v
        return NotImplemented


class Identity(LinearOperator):
    """The identity on the parameters of another operator: `A + damping * Identity(A)`."""

    def __init__(self, like: LinearOperator):
        super().__init__(like.space, like._params)

    def _rows(self, rows: Tensor) -> Tensor:
        return rows.clone()


def chunks(k: int, width: int) -> Iterator[slice]:
    """Slices of at most `width` over range(k)."""
    for start in range(0, k, width):
        yield slice(start, min(start + width, k))
