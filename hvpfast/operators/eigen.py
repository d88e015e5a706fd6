"""Eigenbases of Kronecker factors: all of a model's in one call, batched over equal shapes, warm from the last ones.

Source: Golub & Van Loan, Matrix Computations, 4th ed.: 8.1 (first-order turns of an earlier basis), 8.6 (thin rows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpfast.operators.factor import Diagonal, Factor, Thin
from hvpfast.operators.lapack import eigh_all, rounding, skewness

TOLERANCE = 1e-2  # off-diagonal mass of Q'AQ, relative to |A|, up to which an earlier basis still serves
MAX_ANGLE = 0.25  # a pair of directions that would turn by more is left to a full decomposition
REFINE_UP_TO = (
    512  # on a CPU, measured against eigh: 1.7x at 256, 1.4x at 512, 0.5x at 1024; on a GPU any size (not measured)
)
THIN_UP_TO = 0.7  # measured, I = 256 and 1024: 1.5x and 1.9x over the dense route at r = I / 2, 1.0x here, 0.7x at 0.85


@dataclass
class Eigen:
    """Eigenvalues and vectors of a factor, B groups of size I: A = Q diag(values) Q'.

    Attributes:
        values: (B, r), >= 0; ascending, except that a basis which was kept or refined stays in its order.
        vectors: (B, I, r), orthonormal columns; None for a diagonal factor, whose basis is the identity (r = I, values
            in the order of the features). size: I. With r < I, everything orthogonal to the columns has eigenvalue 0.
        route: how it was found: "diagonal", "thin", "eigh", "refined" or "kept" (from an earlier basis).
        offdiagonal: |Q'AQ - diag(values)| / |A| in the Frobenius norm where it was measured ("refined", "kept"), else 0.
    """

    values: Tensor
    vectors: Tensor | None
    size: int
    route: str = "eigh"
    offdiagonal: float = 0.0

    @property
    def groups(self) -> int:
        return self.values.shape[0]

    @property
    def rank(self) -> int:
        """r, the number of directions that it holds."""
        return self.values.shape[-1]

    @property
    def complete(self) -> bool:
        return self.rank == self.size

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def tensors(self) -> list[Tensor]:
        return [self.values] if self.vectors is None else [self.values, self.vectors]

    def to(self, *args, **kwargs) -> Eigen:
        vectors = None if self.vectors is None else self.vectors.to(*args, **kwargs)
        return Eigen(self.values.to(*args, **kwargs), vectors, self.size, self.route, self.offdiagonal)

    def state(self) -> dict[str, Tensor]:
        """Its tensors; a diagonal one has no "vectors". `Eigen.from_state` takes them back."""
        return {"values": self.values} if self.vectors is None else {"values": self.values, "vectors": self.vectors}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], route: str = "kept") -> Eigen:
        values, vectors = state["values"], state.get("vectors")
        if vectors is None:
            return cls(values, None, values.shape[-1], "diagonal")
        return cls(values, vectors, vectors.shape[-2], route)

    def basis(self) -> Tensor:
        """Q (B, I, r), the identity of a diagonal factor too."""
        if self.vectors is not None:
            return self.vectors
        eye = torch.eye(self.size, dtype=self.values.dtype, device=self.values.device)
        return eye.expand(self.groups, -1, -1)

    def rotate(self, x: Tensor) -> Tensor:
        """Q'x for x (..., B, I, n): (..., B, r, n)."""
        return x if self.vectors is None else _times(self.vectors.mT, x)

    def rotate_back(self, y: Tensor) -> Tensor:
        """Q y for y (..., B, r, n): (..., B, I, n)."""
        return y if self.vectors is None else _times(self.vectors, y)

    def apply(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """f(A) x for x (..., B, I, n), f on the eigenvalues (B, r); what the columns leave out gets f(0)."""
        scale = f(self.values)
        if self.complete:
            return self.rotate_back(self.rotate(x) * scale[..., None])
        rest = at_zero(f, self)
        rest = rest[..., None] if isinstance(rest, Tensor) and rest.dim() else rest
        return self.rotate_back(self.rotate(x) * (scale[..., None] - rest)) + x * rest

    def dense(self) -> Tensor:
        """A = Q diag(values) Q' (B, I, I)."""
        if self.vectors is None:
            return self.values.diag_embed()
        return (self.vectors * self.values[:, None]) @ self.vectors.mT


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix (B, m, n) @ x (..., B, n, p), as one product where there is one group."""
    if matrix.shape[0] == 1 and x.shape[-3] == 1:
        return (matrix[0] @ x.squeeze(-3)).unsqueeze(-3)
    return matrix @ x


def at_zero(f: Callable[[Tensor], Tensor], *eigens: Eigen) -> float | Tensor:
    """f(0), for what incomplete bases leave out; raises ValueError where it is not finite and is needed."""
    if all(e.complete for e in eigens):
        return 0.0
    value = f(torch.zeros((), dtype=torch.float64))  # on the CPU: no wait for a GPU
    if value.dim():
        return value.to(eigens[0].values)
    if value.is_cpu:
        if not torch.isfinite(value):
            ranks = ", ".join(f"rank {e.rank} of {e.size}" for e in eigens)
            raise ValueError(f"the factors are singular ({ranks}) and f(0) is {float(value)}; use damping > 0")
        return float(value)
    return value.to(eigens[0].values)


def eigendecompose(
    factors: Sequence[Factor],
    *,
    previous: Sequence[Eigen | None] | None = None,
    tolerance: float = TOLERANCE,
) -> list[Eigen]:
    """Eigenvalues and orthonormal eigenvectors of every factor; equal shapes go through in one batch.

    A `Diagonal` factor is its own decomposition. A `Thin` one goes through the (r, r) Gram matrix of its rows in
    float64 (measured on 2 cores, r = 1024 of I = 4608, float32: 0.23 s, where the dense route takes 3.0 s), unless r is
    more than 0.7 I; directions whose eigenvalue is below 8 eps max(values) are left out or get the value 0.
    The others take `torch.linalg.eigh`.

    With `previous`, Q'AQ is looked at in the earlier basis Q first. Off-diagonal mass of at most `tolerance`, relative
    to |A|_F, keeps Q, with the diagonal as values (one matrix product: 3.5 to 7 times as fast as an eigh, measured at
    256 to 2048). More than that, but such that first-order turns of pairs by less than 0.25 each are predicted to
    remove it: these turns (five products in all; up to size 512 on a CPU), then the mass is measured again. Else a
    full decomposition. `Eigen.route` tells which; keep or refine means that A is
    Q diag(values) Q' to within `tolerance`, with Q orthonormal to 1e-3 `tolerance`; a full decomposition, to rounding.

    Args:
        factors: of any sizes, dtypes and representations. previous: as many `Eigen` or None; those that do not fit
            the factor's shape, dtype or device are not used. tolerance: in [0, 1).

    Returns:
        one `Eigen` a factor, in their order; values that rounding made negative are 0.

    Raises:
        ValueError: a factor is not finite, or could not be decomposed even in float64; the message has its index.
    """
    factors = list(factors)
    previous = [None] * len(factors) if previous is None else list(previous)
    if len(previous) != len(factors):
        raise ValueError(f"eigendecompose: got {len(factors)} factors and {len(previous)} previous; give one each")
    require_finite("eigendecompose", factors)
    found: dict[int, Eigen] = {}
    thin = []
    for index, factor in enumerate(factors):
        if isinstance(factor, Diagonal):
            found[index] = Eigen(factor.values.clamp_min(0), None, factor.size, "diagonal")
        elif isinstance(factor, Thin) and factor.rank <= THIN_UP_TO * factor.size:
            thin.append(index)
    found.update(_thin(factors, thin))
    dense = {index: factor.dense() for index, factor in enumerate(factors) if index not in found}
    warm = [index for index in dense if _fits(previous[index], dense[index])]
    for batch in batches(warm, dense):
        found.update(_warm(batch, dense, previous, tolerance))
    cold = [index for index in dense if index not in found]
    groups = batches(cold, dense)
    stacks = [stack(batch, dense) for batch in groups]
    for batch, (values, vectors) in zip(groups, eigh_all(stacks, groups_of(groups, dense)), strict=True):
        for index, v, q in zip(batch, *unstack(batch, dense, values, vectors), strict=True):
            found[index] = Eigen(v.clamp_min(0), q, q.shape[-1])
    return [found[index] for index in range(len(factors))]


def require_finite(name: str, factors: Sequence[Factor]) -> None:
    """Raise ValueError naming the factors that hold a NaN or an infinity; one wait for the device, not one a factor."""
    sums = [factor.data.sum().double() for factor in factors]  # NaN and inf stay; a sum that overflows is looked at
    by_device: dict[torch.device, list[int]] = {}
    for index, total in enumerate(sums):
        by_device.setdefault(total.device, []).append(index)
    for indices in by_device.values():
        fine = torch.stack([sums[i] for i in indices]).isfinite().tolist()
        suspects = [i for i, good in zip(indices, fine, strict=True) if not good]
        bad = [i for i in suspects if not factors[i].data.isfinite().all()]
        if bad:
            raise ValueError(
                f"{name}: factor {', '.join(map(str, bad))} (of {len(factors)}) holds NaN or infinity; "
                f"the data or gradients that it was made of do: find the layer and look at its input and loss"
            )


def batches(indices: Sequence[int], matrices: dict[int, Tensor]) -> list[list[int]]:
    """The indices by the shape, dtype and device of their matrices (B, m, n), whatever their B."""
    by_shape: dict[tuple, list[int]] = {}
    for index in indices:
        matrix = matrices[index]
        by_shape.setdefault((matrix.shape[1:], matrix.dtype, matrix.device), []).append(index)
    return list(by_shape.values())


def groups_of(batched: Sequence[Sequence[int]], matrices: dict[int, Tensor]) -> list[list[int]]:
    """For every batch, the factor that each of its matrices belongs to: (sum of B) indices."""
    return [[index for index in batch for _ in range(matrices[index].shape[0])] for batch in batched]


def stack(batch: Sequence[int], matrices: dict[int, Tensor]) -> Tensor:
    """(sum of B, m, n); a batch of one is not copied."""
    return matrices[batch[0]] if len(batch) == 1 else torch.cat([matrices[index] for index in batch])


def unstack(batch: Sequence[int], matrices: dict[int, Tensor], *stacked: Tensor) -> list[tuple[Tensor, ...]]:
    """Each of the stacked results (sum of B, ...) cut into those of the batch's factors."""
    counts = [matrices[index].shape[0] for index in batch]
    return [x.split(counts) for x in stacked]


def _fits(before: Eigen | None, matrix: Tensor) -> bool:
    return (
        before is not None
        and before.vectors is not None
        and before.vectors.shape == matrix.shape
        and before.vectors.dtype is matrix.dtype
        and before.vectors.device == matrix.device
    )


def _thin(factors: Sequence[Factor], indices: Sequence[int]) -> dict[int, Eigen]:
    """Through rows rows' = U S U': the columns of rows' U S^-1/2 are eigenvectors of rows' rows, with values S.

    A column with value s is orthogonal to the others up to eps max(S) / s. In float64 that is below float32's rounding
    for all that float32 rows can resolve. Float64 rows need a QR, the large values first, which leaves those columns as
    they are and orthogonalises the small ones against them.
    """
    found: dict[int, Eigen] = {}
    rows = {index: factors[index].rows for index in indices}
    groups = batches(indices, rows)
    stacks = [stack(batch, rows).double() for batch in groups]
    grams = [x @ x.mT for x in stacks]
    for batch, x, (values, u) in zip(groups, stacks, eigh_all(grams, groups_of(groups, rows)), strict=True):
        dtype = factors[batch[0]].dtype
        top = values[:, -1:].clamp_min(0)
        values = torch.where(values > 8 * torch.finfo(dtype).eps * top, values, 0.0)
        vectors = x.mT @ (u * torch.where(values > 0, values, 1.0).rsqrt()[:, None])
        for index, v, q in zip(batch, *unstack(batch, rows, values, vectors), strict=True):
            kept = (v > 0).sum(-1)
            rank = max(int(kept.max()), 1)
            v, q = v[:, -rank:], q[:, :, -rank:]
            if dtype is torch.float64 or int(kept.min()) < rank:
                q = torch.linalg.qr(q.flip(-1))[0].flip(-1)
            found[index] = Eigen(v.to(dtype), q.to(dtype).contiguous(), q.shape[1], "thin")
    return found


def _warm(batch: list[int], dense: dict[int, Tensor], previous: Sequence[Eigen], tolerance: float) -> dict[int, Eigen]:
    """What earlier bases still give of one batch of equal shapes; the rest is left to a full decomposition."""
    a = stack(batch, dense)
    q = stack(batch, {index: previous[index].vectors for index in batch})
    product = a @ q
    values, mass = _diagonal(a, q, product)
    found: dict[int, Eigen] = {}
    cut = unstack(batch, dense, values, mass, product)
    for index, v, off, aq in zip(batch, *cut, strict=True):
        worst, basis = float(off.max()), previous[index].vectors
        if worst <= tolerance:
            found[index] = Eigen(v.clamp_min(0), basis, basis.shape[-1], "kept", worst)
        elif basis.shape[-1] <= REFINE_UP_TO or not basis.is_cpu:
            refined = _refine(dense[index], basis, aq, tolerance)
            if refined is not None:
                found[index] = refined
    return found


def _diagonal(a: Tensor, q: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal of q'aq (B, n), and the norm of the rest of it relative to that of a (B,); product = a q."""
    values = (q * product).sum(-2)
    norm = torch.linalg.matrix_norm(a)
    rest = torch.linalg.matrix_norm(product - q * values[:, None])  # = |q'aq - diag|: q is orthogonal
    return values, torch.where(norm > 0, rest / norm, rest)


def _refine(a: Tensor, q: Tensor, product: Tensor, tolerance: float) -> Eigen | None:
    """One step from the basis q (B, n, n) to q exp(w), or None where that does not reach the tolerance.

    With s = q'aq, the antisymmetric w_ij = s_ij / (s_jj - s_ii) makes it diagonal to first order. Pairs that it would
    turn by more than MAX_ANGLE stay as they are. The exponential is taken to second order: orthogonal to fourth.
    """
    s = q.mT @ product
    values = s.diagonal(dim1=-2, dim2=-1)
    gaps = values[:, None, :] - values[:, :, None]
    turns = s.abs() < MAX_ANGLE * gaps.abs()
    left = torch.where(turns, 0.0, s)
    left.diagonal(dim1=-2, dim2=-1).zero_()
    if bool((torch.linalg.matrix_norm(left) > tolerance * torch.linalg.matrix_norm(a)).any()):
        return None
    w = torch.where(turns, s / gaps, 0.0)
    w = (w - w.mT) / 2
    turned = q @ w
    q = q + turned + turned @ w / 2
    values, mass = _diagonal(a, q, a @ q)
    worst = float(mass.max())
    bound = max(rounding(a), 1e-3 * tolerance)
    if worst > tolerance or bool((skewness(q) > bound).any()):
        return None
    return Eigen(values.clamp_min(0), q, q.shape[-1], "refined", worst)
