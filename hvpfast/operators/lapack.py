"""Eigendecompositions of many matrices (LAPACK's, cuSOLVER's): checked, and again in float64 where they fail."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def eigh_all(stacks: Sequence[Tensor], owners: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues (L, n), ascending, and vectors (L, n, n) of each stack (L, n, n) of symmetric matrices.

    Args:
        owners: for each stack, L numbers: what to call a matrix that cannot be decomposed.

    Raises:
        ValueError: neither the matrix's dtype nor float64 gave a decomposition that fits it.
    """
    return [_eigh(a, owner) for a, owner in zip(stacks, owners, strict=True)]


def _eigh(a: Tensor, owners: Sequence[int]) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = _decompose(a)
        bad = _bad(a, values, vectors)
    except torch.linalg.LinAlgError:
        values, vectors, bad = a.new_empty(a.shape[:-1]), torch.empty_like(a), range(len(a))
    for i in bad:
        values[i], vectors[i] = _again(a[i], owners[i])
    return values, vectors


def _decompose(a: Tensor) -> tuple[Tensor, Tensor]:
    if a.is_cuda:  # a torch that takes one matrix after another there is gone round
        from hvpfast.kernels.eigh_batched import eigh

        return eigh(a)
    return torch.linalg.eigh(a)


def _bad(a: Tensor, values: Tensor, vectors: Tensor) -> list[int]:
    """Which of the decompositions do not fit, asked of one vector z: a z = q values q'z and q q'z = z, to rounding."""
    z, bound = _probe(a), rounding(a)
    rebuilt = vectors @ (values[..., None] * (vectors.mT @ z))
    residual = torch.linalg.vector_norm(rebuilt - a @ z, dim=(-2, -1))
    fine = (residual <= bound * values.abs().amax(-1)) & (skewness(vectors) <= bound)  # a NaN is not fine
    return [] if bool(fine.all()) else torch.nonzero(~fine).flatten().tolist()


def _probe(a: Tensor) -> Tensor:
    """A unit vector (n, 1) that no eigenvector resembles."""
    z = torch.arange(1, a.shape[-1] + 1, dtype=a.dtype, device=a.device).mul(2.399963).cos()[:, None]
    return z / torch.linalg.vector_norm(z)


def rounding(a: Tensor) -> float:
    """How far from exact a sound decomposition of a (L, n, n) may be, on one vector and relative to its norm."""
    return (50 + a.shape[-1] ** 0.5) * torch.finfo(a.dtype).eps


def skewness(q: Tensor) -> Tensor:
    """|q q'z - z| (L,) for one unit vector z: how far the columns of q (L, n, n) are from orthonormal."""
    z = _probe(q)
    return torch.linalg.vector_norm(q @ (q.mT @ z) - z, dim=(-2, -1))


def _again(a: Tensor, owner: int) -> tuple[Tensor, Tensor]:
    """In float64, scaled and symmetrised."""
    wide = (a.double() + a.double().mT) / 2
    scale = float(wide.abs().max()) or 1.0
    try:
        values, vectors = torch.linalg.eigh((wide / scale)[None])
        if not _bad((wide / scale)[None], values, vectors):
            return (values[0] * scale).to(a.dtype), vectors[0].to(a.dtype)
        reason = "LAPACK's decomposition does not fit the matrix"
    except torch.linalg.LinAlgError as error:
        reason = str(error)
    raise ValueError(
        f"eigendecompose: factor {owner} could not be decomposed in {a.dtype} nor in float64 ({reason}); "
        f"it is {tuple(a.shape)}, its largest entry {scale:.3g}: look at the layer's inputs and gradients, or damp it"
    )
