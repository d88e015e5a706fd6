"""What Krylov methods do between two products."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.arguments import floats, usual
from hvpfast.dispatch import op
from hvpfast.ops.shared import wide


def _check_reorthogonalize(w, basis, *, normalize=False):
    if not usual(w, basis):
        floats("reorthogonalize", w=w, basis=basis)
    if w.dim() != 1 or basis.dim() != 2 or basis.shape[1] != w.shape[0]:
        raise ValueError(
            f"reorthogonalize: w has shape {tuple(w.shape)} and basis {tuple(basis.shape)}; they must be (n,) and (k, n): "
            f"one vector a row, as long as w"
        )


@op(check=_check_reorthogonalize, backends=("cuda",))
def reorthogonalize(w: Tensor, basis: Tensor, *, normalize: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """w minus its part in the span of orthonormal rows: classical Gram-Schmidt, twice, with coefficients and the rest's norm.

    The second pass takes away what rounding left of the first, and its coefficients are added: for a float32 basis their
    float64 sum is as good as a float64 dot product.

    Args:
        w: (n,). basis: (k, n), orthonormal rows, k >= 0. normalize: divide the rest by its norm (a zero rest stays zero).

    Returns:
        (rest, coefficients, norm): the rest (n,) float32 or float64, `basis w` (k,) and the norm of the rest before any
        division (), both float64 for every dtype. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.

    Source: Giraud, Langou & Rozloznik, Computers & Mathematics with Applications 50 (2005): twice is enough.
    """
    w, basis = wide(w), wide(basis)
    first = basis @ w
    w = torch.addmv(w, basis.T, first, alpha=-1)
    second = basis @ w
    w = torch.addmv(w, basis.T, second, alpha=-1)
    norm = torch.linalg.vector_norm(w, dtype=torch.float64)
    if normalize:
        w = w / torch.where(norm > 0, norm, 1.0).to(w.dtype)
    return w, first.double() + second.double(), norm
