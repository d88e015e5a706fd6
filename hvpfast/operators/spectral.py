"""Functions of one Kronecker block in its factors' eigenbases: inverse, powers, samples, trace, log-determinant.

The block of a weight (O, I) is F = G (x) A on v.flatten(): F v = G v A, and with G = Qg diag(lg) Qg', A = Qa diag(la) Qa'

    f(F) v = Qg (f(L) o (Qg' v Qa)) Qa',   L_oi = lg_o la_i  (K-FAC)  or any others in that basis (EKFAC).

What bases of less than full rank leave out has the eigenvalue 0 and gets f(0).
Source: George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis, arXiv:1806.03884.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvpfast.operators.eigen import Eigen, at_zero, eigendecompose
from hvpfast.operators.factor import Factor
from hvpfast.operators.inverses import cholesky_inverses, newton_schulz_inverses, thin_solve
from hvpfast.ops import kron_solve

__all__ = [
    "Eigen",
    "Spectrum",
    "cholesky_inverses",
    "eigendecompose",
    "newton_schulz_inverses",
    "pi",
    "solve_all",
    "thin_solve",
]


def pi(a: Factor, g: Factor) -> Tensor:
    """sqrt((tr A / dim A) / (tr G / dim G)) (B,): A gets the damping sqrt(d) pi, G sqrt(d) / pi.

    1 where either trace is 0 (no direction to balance). Source: Martens & Grosse, arXiv:1503.05671, section 6.3.
    """
    mean_a, mean_g = a.trace() / a.size, g.trace() / g.size
    fine = (mean_a > 0) & (mean_g > 0)
    ratio = torch.where(fine, mean_a, 1.0).sqrt() / torch.where(fine, mean_g, 1.0).sqrt()
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)


class Spectrum:
    """One block: the eigenbases of G and A, and the eigenvalues (B, O_r, I_r) in them.

    Args:
        g, a: bases of G and A, with the same groups. values: (B, O_r, I_r), the eigenvalues of the products of their
            columns; None: the products of theirs (K-FAC). EKFAC gives second moments of the rotated gradients instead.

    Functions f take and return a tensor by elements: they are called with `values`, and with a float64 zero () where
    the bases are incomplete. A damping is a number, or a tensor () or (B,).
    """

    def __init__(self, g: Eigen, a: Eigen, values: Tensor | None = None):
        if g.groups != a.groups:
            raise ValueError(f"Spectrum: G has {g.groups} groups and A {a.groups}; they must be the same")
        shape = (g.groups, g.rank, a.rank)
        if values is None:
            values = g.values[:, :, None] * a.values[:, None, :]
        elif tuple(values.shape) != shape:
            raise ValueError(f"Spectrum: values has shape {tuple(values.shape)}; it must be {shape}, (B, O_r, I_r)")
        self.g, self.a, self.values = g, a, values

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, O, I)"""
        return self.g.groups, self.g.size, self.a.size

    @property
    def complete(self) -> bool:
        return self.g.complete and self.a.complete

    @property
    def zeros(self) -> int:
        """How many eigenvalues of each group are 0 because the bases leave their directions out."""
        return self.g.size * self.a.size - self.g.rank * self.a.rank

    def rotate(self, v: Tensor) -> Tensor:
        """Qg' v Qa for v (..., B, O, I): (..., B, O_r, I_r)."""
        g, a = self.g, self.a
        if g.rank * a.size * (g.size + a.rank) < a.rank * g.size * (a.size + g.rank):  # the fewer products
            return _right(g.rotate(v), a.vectors)
        return g.rotate(_right(v, a.vectors))

    def rotate_back(self, y: Tensor) -> Tensor:
        """Qg y Qa' for y (..., B, O_r, I_r): (..., B, O, I)."""
        g, a = self.g, self.a
        q = None if a.vectors is None else a.vectors.mT
        if g.size * a.rank * (g.rank + a.size) < a.size * g.rank * (a.rank + g.size):
            return _right(g.rotate_back(y), q)
        return g.rotate_back(_right(y, q))

    def apply(self, f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """f(F) v for v (K, B, O, I), or with any axes in front; shaped like v.

        Raises:
            ValueError: v does not fit, or the bases are incomplete and f(0) is not finite.
        """
        self._check(v)
        rest = at_zero(f, self.g, self.a)
        if self.complete:
            return self.rotate_back(self.rotate(v) * f(self.values))
        return self.rotate_back(self.rotate(v) * (f(self.values) - rest)).add_(v * rest)

    def matmul(self, v: Tensor) -> Tensor:
        """F v for v (..., B, O, I)."""
        self._check(v)
        return self.rotate_back(self.rotate(v) * self.values)

    def power(self, exponent: float, v: Tensor, damping: float | Tensor = 0.0) -> Tensor:
        """(F + d I)^exponent v for v (..., B, O, I). Raises ValueError if that is singular and the exponent negative."""
        if exponent < 0:
            self._require_regular(damping)
        return self.apply(lambda x: (x + _each(damping, x)).pow(exponent), v)

    def solve(self, v: Tensor, damping: float | Tensor) -> Tensor:
        """(F + d I)^-1 v for v (..., B, O, I). Raises ValueError if F + d I is singular."""
        self._require_regular(damping)
        return self.apply(lambda x: (x + _each(damping, x)).reciprocal(), v)

    def sample(self, noise: Tensor, damping: float | Tensor) -> Tensor:
        """Samples of N(0, (F + d I)^-1) from standard normal noise (..., B, O, I): (F + d I)^-1/2 noise."""
        return self.power(-0.5, noise, damping)

    def trace(self, f: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """tr F, or tr f(F), of each group (B,)."""
        if f is None:
            return self.values.sum((-2, -1))
        rest = at_zero(f, self.g, self.a)
        return f(self.values).sum((-2, -1)) + self.zeros * (rest.flatten() if isinstance(rest, Tensor) else rest)

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """log det(F + d I) of each group (B,); -inf if that is singular."""
        d = torch.as_tensor(damping, dtype=self.values.dtype, device=self.values.device)
        total = (self.values + _each(d, self.values)).log().sum((-2, -1))
        return total + self.zeros * d.log() if self.zeros else total

    def diagonal(self, f: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Diagonal of F, or of f(F), shaped like the weight (B, O, I)."""
        rest = 0.0 if f is None else at_zero(f, self.g, self.a)
        y = self.values if f is None else f(self.values) - rest
        if self.a.vectors is not None:
            y = y @ self.a.vectors.square().mT
        if self.g.vectors is not None:
            y = self.g.vectors.square() @ y
        return y + rest

    def _check(self, v: Tensor) -> None:
        if tuple(v.shape[-3:]) != self.shape:
            raise ValueError(f"Spectrum: v has shape {tuple(v.shape)}; it must be (..., B, O, I) = (..., {self.shape})")

    def _require_regular(self, damping: float | Tensor) -> None:
        """Without damping no eigenvalue may be 0; a tensor's value, and a positive number, are not looked at further."""
        if isinstance(damping, Tensor):
            return
        if not 0 <= damping < float("inf"):
            raise ValueError(f"Spectrum: the damping is {damping}; it must be finite and >= 0")
        if damping == 0 and (self.zeros or not bool((self.values > 0).all())):
            top = float(self.values.max())
            raise ValueError(
                f"Spectrum: the block is singular and the damping 0; give a damping > 0, for example {1e-3 * top:.1g}"
            )


def _right(v: Tensor, q: Tensor | None) -> Tensor:
    """v (..., B, m, n) @ q (B, n, p), as one product where there is one group; v itself for q None."""
    if q is None:
        return v
    if q.shape[0] == 1 and v.shape[-3] == 1:
        return (v.squeeze(-3) @ q[0]).unsqueeze(-3)
    return v @ q


def _each(damping: float | Tensor, values: Tensor) -> float | Tensor:
    """A damping (B,) shaped to go with values (B, m, n); with the zero (), or as (), as it is."""
    if isinstance(damping, Tensor) and damping.dim() == 1:
        return damping[:, None, None]
    return damping


def solve_all(spectra: Sequence[Spectrum], vs: Sequence[Tensor], damping: float | Sequence[float]) -> list[Tensor]:
    """(F + d I)^-1 v of all blocks, those of one group and full rank in one `kron_solve`; v (K, 1, O, I) or (K, B, O, I).

    Raises:
        ValueError: a block is singular with its damping, or the lists differ in length.
    """
    shares = [damping] * len(spectra) if isinstance(damping, (int, float, Tensor)) else list(damping)
    if not len(spectra) == len(vs) == len(shares):
        raise ValueError(
            f"solve_all: got {len(spectra)} blocks, {len(vs)} vectors, {len(shares)} dampings; give one each"
        )
    found: dict[int, Tensor] = {}
    listed: dict[tuple, list[int]] = {}
    for index, (block, v, d) in enumerate(zip(spectra, vs, shares, strict=True)):
        plain = block.complete and block.shape[0] == 1 and block.a.vectors is not None and block.g.vectors is not None
        if plain and not isinstance(d, Tensor) and v.dim() == 4:
            block._check(v)
            block._require_regular(d)
            listed.setdefault((v.dtype, v.device), []).append(index)
        else:
            found[index] = block.solve(v, d)
    for indices in listed.values():
        columns = [
            [vs[i].squeeze(1), spectra[i].g.vectors[0], spectra[i].a.vectors[0], spectra[i].values[0]] for i in indices
        ]
        solved = kron_solve(*map(list, zip(*columns, strict=True)), [shares[i] for i in indices])
        found.update((i, x.unsqueeze(1)) for i, x in zip(indices, solved, strict=True))
    return [found[index] for index in range(len(spectra))]
