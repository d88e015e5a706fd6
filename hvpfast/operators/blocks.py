"""Block-diagonal operators with blocks that can be inverted, drawn from, and taken functions of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvpfast.arguments import accumulate_dtype
from hvpfast.autocast import full_precision
from hvpfast.capture.units import Layout
from hvpfast.operators.factor import Dense, Diagonal, Factor
from hvpfast.operators.linear import LinearOperator
from hvpfast.operators.spectral import Spectrum

Function = Callable[[Tensor], Tensor]  # of eigenvalues, elementwise


class Block:
    """A symmetric block over a few parameters. Vectors are one (K, *shape) a parameter.

    Attributes:
        name: of the module. names: of the parameters.
    """

    def __init__(self, name: str, names: tuple[str, ...]):
        self.name, self.names = name, names

    def product(self, parts: Sequence[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def trace(self) -> Tensor:
        """float64 scalar"""
        raise NotImplementedError

    def diagonal(self) -> list[Tensor]:
        """One tensor shaped like each parameter."""
        raise NotImplementedError

    def squared_norm(self) -> Tensor:
        """The squared Frobenius norm, float64 scalar."""
        raise NotImplementedError


class Decomposed(Block):
    """A block in its eigenbasis: any function of it is one more product."""

    def eigenvalues(self) -> Tensor:
        """All that are kept, flat; the rest is zero."""
        raise NotImplementedError

    def apply(self, f: Function, parts: Sequence[Tensor]) -> list[Tensor]:
        """f(block) v"""
        raise NotImplementedError

    def function_diagonal(self, f: Function) -> list[Tensor]:
        """The diagonal of f(block)."""
        raise NotImplementedError

    @property
    def missing(self) -> int:
        """How many eigenvalues are zero and not kept."""
        return 0

    def sum(self, f: Function) -> Tensor:
        """sum of f over all eigenvalues, float64"""
        values = self.eigenvalues().double()
        total = f(values).sum()
        return total + self.missing * f(values.new_zeros(())) if self.missing else total

    def product(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return self.apply(lambda x: x, parts)

    def trace(self) -> Tensor:
        return self.sum(lambda x: x)

    def squared_norm(self) -> Tensor:
        return self.sum(torch.square)

    def diagonal(self) -> list[Tensor]:
        return self.function_diagonal(lambda x: x)

    def damped(self, damping: float, power: float) -> FunctionBlock:
        """(block + damping)^power. Raises ValueError if that is singular and the power is negative."""
        if power < 0:
            values = self.eigenvalues()
            largest = float(values.max()) if values.numel() else 0.0
            least = 0.0 if self.missing else float(values.min()) if values.numel() else 0.0
            size = values.numel() + self.missing
            if not least + damping > torch.finfo(values.dtype).eps * size**0.5 * largest or least + damping <= 0:
                raise ValueError(
                    f"the block of {self.name or 'the model'!r} ({', '.join(self.names)}) is singular to working precision: its "
                    f"eigenvalues run from {least:.3g} to {largest:.3g} and the damping is {damping:.3g}; give a larger damping"
                )
        return FunctionBlock(self, lambda x: (x + damping) ** power)


class FunctionBlock(Block):
    """f(block) of a decomposed block."""

    def __init__(self, block: Decomposed, f: Function):
        super().__init__(block.name, block.names)
        self.block, self.f = block, f

    def product(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return self.block.apply(self.f, parts)

    def trace(self) -> Tensor:
        return self.block.sum(self.f)

    def squared_norm(self) -> Tensor:
        return self.block.sum(lambda x: self.f(x).square())

    def diagonal(self) -> list[Tensor]:
        return self.block.function_diagonal(self.f)

    def logdet(self) -> Tensor:
        return self.block.sum(lambda x: self.f(x).log())


class KroneckerBlock(Block):
    """G (x) A on (W | b) in row-major order, for every group: the products G V A."""

    def __init__(self, name: str, names: tuple[str, ...], layout: Layout, a: Factor, g: Factor):
        super().__init__(name, names)
        self.layout, self.a, self.g = layout, a, g

    def product(self, parts: Sequence[Tensor]) -> list[Tensor]:
        v = joined(self.layout, parts)
        left, right = self.g, self.a
        if isinstance(left, Dense) and isinstance(right, Dense):
            return self.layout.split(left.matrix @ v @ right.matrix)
        return self.layout.split(right.matmul(left.matmul(v).mT).mT)

    def trace(self) -> Tensor:
        return (self.a.trace().double() * self.g.trace().double()).sum()

    def diagonal(self) -> list[Tensor]:
        return one(self.layout.split((self.g.diagonal()[:, :, None] * self.a.diagonal()[:, None, :]).unsqueeze(0)))

    def squared_norm(self) -> Tensor:
        return (_squared_norm(self.a) * _squared_norm(self.g)).sum()


class FactoredBlock(Block):
    """L (x) R with dense or diagonal L and R that were inverted each on its own (pi and uniform damping)."""

    def __init__(self, block: KroneckerBlock, left: Factor, right: Factor, logdet: Tensor):
        super().__init__(block.name, block.names)
        self._inner = KroneckerBlock(block.name, block.names, block.layout, right, left)
        self._logdet = logdet

    def product(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return self._inner.product(parts)

    def trace(self) -> Tensor:
        return self._inner.trace()

    def diagonal(self) -> list[Tensor]:
        return self._inner.diagonal()

    def squared_norm(self) -> Tensor:
        return self._inner.squared_norm()

    def logdet(self) -> Tensor:
        return self._logdet


class SpectralBlock(Decomposed):
    """A Kronecker block in the eigenbases of its factors, with any eigenvalues (K-FAC's or EKFAC's)."""

    def __init__(self, name: str, names: tuple[str, ...], layout: Layout, spectrum: Spectrum):
        super().__init__(name, names)
        self.layout, self.spectrum = layout, spectrum

    def eigenvalues(self) -> Tensor:
        return self.spectrum.values.reshape(-1)

    @property
    def missing(self) -> int:
        return self.spectrum.zeros * self.layout.groups

    def apply(self, f: Function, parts: Sequence[Tensor]) -> list[Tensor]:
        return self.layout.split(self.spectrum.apply(f, joined(self.layout, parts)))

    def function_diagonal(self, f: Function) -> list[Tensor]:
        return one(self.layout.split(self.spectrum.diagonal(f).unsqueeze(0)))


class RowBlock(Decomposed):
    """A dense block (p, p), or a diagonal one (p,): norm layers, and parameters that no rule covers."""

    def __init__(self, name: str, names: tuple[str, ...], shapes: Sequence[tuple[int, ...]], values: Tensor):
        super().__init__(name, names)
        self.shapes, self.values = [torch.Size(shape) for shape in shapes], values
        self._spectrum: tuple[Tensor, Tensor] | None = None

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(part.shape[0], part.shape[1:].numel()) for part in parts], 1)

    def _parts(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([shape.numel() for shape in self.shapes], 1)
        return [piece.reshape(-1, *shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    @property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        if self._spectrum is None:
            values, vectors = torch.linalg.eigh(self.values.double())
            self._spectrum = values.clamp(min=0).to(self.values.dtype), vectors.to(self.values.dtype)
        return self._spectrum

    def eigenvalues(self) -> Tensor:
        return self.values if self.values.dim() == 1 else self.spectrum[0]

    def product(self, parts: Sequence[Tensor]) -> list[Tensor]:
        flat = self._flat(parts)
        return self._parts(flat * self.values if self.values.dim() == 1 else flat @ self.values)

    def apply(self, f: Function, parts: Sequence[Tensor]) -> list[Tensor]:
        flat = self._flat(parts)
        if self.values.dim() == 1:
            return self._parts(flat * f(self.values))
        values, vectors = self.spectrum
        return self._parts((flat @ vectors * f(values)) @ vectors.T)

    def function_diagonal(self, f: Function) -> list[Tensor]:
        if self.values.dim() == 1:
            flat = f(self.values)
        else:
            values, vectors = self.spectrum
            flat = vectors.square() @ f(values)
        return one(self._parts(flat.unsqueeze(0)))


def one(parts: Sequence[Tensor]) -> list[Tensor]:
    return [part[0] for part in parts]


def joined(layout: Layout, parts: Sequence[Tensor]) -> Tensor:
    """The parameters of a block, weight first, as (K, B, O, I)."""
    rest = list(parts)
    weight = rest.pop(0) if layout.weight is not None else None
    return layout.join(weight, rest.pop(0) if layout.bias is not None else None)


def _squared_norm(factor: Factor) -> Tensor:
    """(B,) float64"""
    if isinstance(factor, (Dense, Diagonal)):
        return factor.data.double().square().flatten(1).sum(1)
    rows = factor.data.double()
    return (rows @ rows.mT).square().sum((1, 2))


class BlockDiagonal(LinearOperator):
    """A block-diagonal operator: one block a module, in the parameters' order of the operator that it came from."""

    def __init__(self, like: LinearOperator, blocks: Sequence[Block]):
        super().__init__(like.space, like._params)
        self._made = list(blocks)

    def _blocks(self) -> list[Block]:
        return self._made

    def blocks(self) -> list[Block]:
        return list(self._blocks())

    def _rows(self, rows: Tensor) -> Tensor:
        k, wide = rows.shape[0], rows.to(accumulate_dtype(self.dtype))  # the factors' dtype
        pieces = zip(self.space.names, wide.split(self.space.sizes, 1), self.space.shapes, strict=True)
        parts = {name: piece.reshape(k, *shape) for name, piece, shape in pieces}
        results: dict[str, Tensor] = {}
        for block in self._blocks():
            results.update(zip(block.names, block.product([parts[name] for name in block.names]), strict=True))
        return self.space.join([results[name] for name in self.space.names], k, rows.dtype)

    @full_precision
    def trace(self) -> Tensor:
        """The exact trace, a float64 scalar."""
        return sum(block.trace() for block in self._blocks())

    @full_precision
    def frobenius_norm(self) -> Tensor:
        """The exact Frobenius norm, a float64 scalar."""
        return sum(block.squared_norm() for block in self._blocks()).sqrt()

    @full_precision
    def diagonal(self) -> Tensor:
        """The exact diagonal, (P,)."""
        results: dict[str, Tensor] = {}
        for block in self._blocks():
            results.update(zip(block.names, block.diagonal(), strict=True))
        parts = [results[name].unsqueeze(0) for name in self.space.names]
        return self.space.join(parts, 1, self.dtype)[0]


class Inverse(BlockDiagonal):
    """The inverse of a damped block-diagonal operator: `K.inverse(damping) @ gradient` is a natural-gradient step."""

    @full_precision
    def logdet(self) -> Tensor:
        """log det of this operator, which is minus that of what it inverts: a float64 scalar."""
        return sum(block.logdet() for block in self._blocks())

    @full_precision
    def det(self) -> Tensor:
        """The determinant, a float64 scalar (inf or 0 beyond its range: use `logdet`)."""
        return self.logdet().exp()


def as_damping(damping: object, who: str) -> float:
    """A non-negative, finite number. Raises ValueError otherwise."""
    value = float(damping)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{who}: damping is {damping!r}; it must be a finite number, zero or more")
    return value
