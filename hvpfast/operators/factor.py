"""A Kronecker factor, symmetric positive semi-definite, in the form that its rank allows: dense, thin or diagonal.

The leading axis of each is B groups: 1 for an ordinary layer, more for a grouped convolution, which has one factor a
group. Updates (`ema`, `plus`) reuse the storage of the left operand where they can: go on with what they return.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvpfast.arguments import accumulate_dtype
from hvpfast.ops import gram


class Factor:
    """What `Dense`, `Thin` and `Diagonal` share.

    Attributes:
        groups: B. size: I. dtype, device: of the tensor that it holds.
    """

    __slots__ = ("data",)
    kind: str
    shape: str

    def __init__(self, data: Tensor):
        name = type(self).__name__
        if not isinstance(data, Tensor):
            raise TypeError(f"{name}: got a {type(data).__name__}; it must be a tensor {self.shape}")
        if not data.dtype.is_floating_point:
            raise TypeError(f"{name}: got {data.dtype}; it must be a real floating dtype, so convert it first")
        if data.dim() != self.shape.count(",") + 1 or not self._fits(data):
            raise ValueError(
                f"{name}: got shape {tuple(data.shape)}; it must be {self.shape}, B groups of I features: "
                f"give an ordinary layer's factor the group axis with unsqueeze(0)"
            )
        if data.dtype.itemsize < 4:
            data = data.to(accumulate_dtype(data.dtype))
        self.data = data

    @staticmethod
    def _fits(data: Tensor) -> bool:
        return data.shape[0] > 0 and data.shape[-1] > 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}{tuple(self.data.shape)}"

    @property
    def groups(self) -> int:
        return self.data.shape[0]

    @property
    def size(self) -> int:
        return self.data.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def tensors(self) -> list[Tensor]:
        return [self.data]

    def to(self, *args, **kwargs) -> Factor:
        """The factor with its tensor moved or converted, as `Tensor.to`."""
        return type(self)(self.data.to(*args, **kwargs))

    def state(self) -> dict[str, Tensor]:
        """One tensor under the name of the representation; `from_state` takes it back."""
        return {self.kind: self.data}

    def ema(self, other: Factor, decay: float) -> Factor:
        """The running average `decay * self + (1 - decay) * other`. Raises ValueError unless 0 <= decay <= 1."""
        if not 0 <= decay <= 1:
            raise ValueError(f"ema: decay is {decay}; it must lie in [0, 1]")
        return self.plus(other, decay, 1 - decay)

    def plus(self, other: Factor, own: float = 1.0, others: float = 1.0) -> Factor:
        """`own * self + others * other`, in the storage of self where its form allows; own, others >= 0.

        Thin rows of both are stacked, until as many as features are reached: then the sum is dense.

        Raises:
            ValueError: the factors differ in groups or size, one is diagonal and one is not, or a weight is negative.
        """
        if (self.groups, self.size) != (other.groups, other.size):
            raise ValueError(f"plus: got {self} and {other}; both must have the same groups and size")
        if isinstance(self, Diagonal) != isinstance(other, Diagonal):
            raise ValueError(f"plus: got {self} and {other}; a diagonal factor adds to a diagonal one only")
        if own < 0 or others < 0:
            raise ValueError(
                f"plus: got weights {own} and {others}; a factor stays semi-definite for weights >= 0 only"
            )
        if others == 0:
            return self.scaled(own)
        if own == 0:
            return other.scaled(others)
        if isinstance(self, Diagonal):
            return Diagonal(self.data.mul_(own).add_(other.data, alpha=others))
        if isinstance(self, Thin) and isinstance(other, Thin):
            if self.rank + other.rank < self.size:
                return Thin(torch.cat([self.data * math.sqrt(own), other.data * math.sqrt(others)], 1))
            return Dense(self.dense()).plus(other, own, others)
        if isinstance(self, Thin):  # a sum commutes; the caller's dense `other` is left alone
            return Dense(other.data.clone()).plus(self, others, own)
        if isinstance(other, Dense):
            return Dense(self.data.mul_(own).add_(other.data, alpha=others))
        for matrix, rows in zip(self.data, other.data.to(self.dtype), strict=True):
            gram(rows, out=matrix, alpha=others, beta=own)
        return self

    def scaled(self, c: float | Tensor) -> Factor:
        """c times the factor, a new one: c >= 0, a number or (B,)."""
        c = torch.as_tensor(c, dtype=self.dtype, device=self.device)
        return self._scaled(c.reshape(-1, *(1,) * (self.data.dim() - 1)))

    def _scaled(self, c: Tensor) -> Factor:
        return type(self)(self.data * c)

    def dense(self) -> Tensor:
        """The factor as matrices (B, I, I)."""
        raise NotImplementedError

    def trace(self) -> Tensor:
        """(B,)"""
        return self.diagonal().sum(-1)

    def diagonal(self) -> Tensor:
        """(B, I)"""
        raise NotImplementedError

    def matmul(self, x: Tensor) -> Tensor:
        """A x for x (B, I, n), or with further axes in front."""
        raise NotImplementedError


class Dense(Factor):
    """The matrices (B, I, I) themselves."""

    __slots__ = ()
    kind, shape = "dense", "(B, I, I)"

    def __init__(self, matrix: Tensor):
        super().__init__(matrix)

    @staticmethod
    def _fits(data: Tensor) -> bool:
        return data.shape[0] > 0 and 0 < data.shape[1] == data.shape[2]

    @property
    def matrix(self) -> Tensor:
        return self.data

    def dense(self) -> Tensor:
        return self.data

    def diagonal(self) -> Tensor:
        return self.data.diagonal(dim1=-2, dim2=-1)

    def matmul(self, x: Tensor) -> Tensor:
        return self.data @ x


class Thin(Factor):
    """A = rows' rows with rows (B, r, I): what to keep of fewer samples and positions than features, r < I."""

    __slots__ = ()
    kind, shape = "thin", "(B, r, I)"

    def __init__(self, rows: Tensor):
        super().__init__(rows)

    @property
    def rows(self) -> Tensor:
        return self.data

    @property
    def rank(self) -> int:
        """r, the number of rows: an upper bound of the rank."""
        return self.data.shape[1]

    def _scaled(self, c: Tensor) -> Factor:
        return Thin(self.data * c.sqrt())

    def dense(self) -> Tensor:
        return torch.stack([gram(rows) for rows in self.data])

    def diagonal(self) -> Tensor:
        return self.data.square().sum(1)

    def matmul(self, x: Tensor) -> Tensor:
        return self.data.mT @ (self.data @ x)


class Diagonal(Factor):
    """The diagonal (B, I) alone: embeddings, and factors that would be too large."""

    __slots__ = ()
    kind, shape = "diagonal", "(B, I)"

    def __init__(self, values: Tensor):
        super().__init__(values)

    @property
    def values(self) -> Tensor:
        return self.data

    def dense(self) -> Tensor:
        return self.data.diag_embed()

    def diagonal(self) -> Tensor:
        return self.data

    def matmul(self, x: Tensor) -> Tensor:
        return self.data[..., None] * x


_KINDS = {cls.kind: cls for cls in (Dense, Thin, Diagonal)}


def from_state(state: dict[str, Tensor]) -> Factor:
    """The factor that `state()` describes. Raises ValueError for any other dictionary."""
    if len(state) != 1 or next(iter(state)) not in _KINDS:
        raise ValueError(
            f"from_state: got keys {sorted(state)}; give what state() returned, one of {', '.join(_KINDS)}"
        )
    ((kind, data),) = state.items()
    return _KINDS[kind](data)
