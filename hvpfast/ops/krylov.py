"""What Krylov methods do between two products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvpfast.arguments import floats, usual
from hvpfast.dispatch import op
from hvpfast.ops.shared import column_dots, wide


def _check_reorthogonalize(w, basis, *, normalize=False):
    name = "reorthogonalize"
    if isinstance(w, Tensor) != isinstance(basis, Tensor) or (
        not isinstance(w, Tensor) and not 0 < len(w) == len(basis)
    ):
        raise ValueError(f"{name}: w and basis must be two tensors, or two lists as long as one another and not empty")
    for one, rows in _tensors(w, basis):
        if not usual(one, rows):
            floats(name, w=one, basis=rows)
        fits = rows.dim() == one.dim() + 1 and rows.shape[1:] == one.shape
        if not fits or (isinstance(w, Tensor) and one.dim() != 1):
            raise ValueError(
                f"{name}: w has shape {tuple(one.shape)} and basis {tuple(rows.shape)}; they must be (n,) and (k, n): "
                f"one vector a row, as long as w; or lists of tensors and the same with an axis k in front"
            )
    if not isinstance(w, Tensor) and len({rows.shape[0] for rows in basis}) > 1:
        raise ValueError(
            f"{name}: the tensors of basis have {', '.join(str(len(y)) for y in basis)} rows; give as many of each"
        )


@op(check=_check_reorthogonalize, backends=("cuda",))
def reorthogonalize(
    w: Tensor | Sequence[Tensor], basis: Tensor | Sequence[Tensor], *, normalize: bool = False
) -> tuple[Tensor | list[Tensor], Tensor, Tensor]:
    """w minus its part in the span of orthonormal rows: classical Gram-Schmidt, twice, with coefficients and the rest's norm.

    The second pass takes away what rounding left of the first, and its coefficients are added: for a float32 basis their
    float64 sum is as good as a float64 dot product.

    Args:
        w: (n,). basis: (k, n), orthonormal rows, k >= 0. Or lists of tensors (...) and (k, ...) that are one vector and k of
            them together (a model's parameters, not flattened), at least one. normalize: divide the rest by its norm (a zero
            rest stays zero).

    Returns:
        (rest, coefficients, norm): the rest like w, float32 or float64, `basis w` (k,) and the norm of the rest before any
        division (), both float64 for every dtype. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.

    Source: Giraud, Langou & Rozloznik, Computers & Mathematics with Applications 50 (2005): twice is enough.
    """
    parts = [wide(one).reshape(-1) for one, _ in _tensors(w, basis)]
    rows = [wide(rows).reshape(len(rows), one.numel()) for one, rows in _tensors(w, basis)]
    sums = []
    for _ in range(2):
        sums.append(sum(y @ x for x, y in zip(parts, rows, strict=True)))
        parts = [torch.addmv(x, y.T, sums[-1].to(x), alpha=-1) for x, y in zip(parts, rows, strict=True)]
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in parts]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if normalize:
        parts = [x / torch.where(norm > 0, norm, 1.0).to(x.dtype) for x in parts]
    rest = parts[0] if isinstance(w, Tensor) else [x.reshape(one.shape) for x, one in zip(parts, w, strict=True)]
    return rest, sums[0].double() + sums[1].double(), norm


def _check_cg_update(x, r, p, q, rz, *, damping=0.0, inplace=False):
    name, lists = "cg_update", [x, r, p, q]
    sizes = {None if isinstance(one, Tensor) else len(one) for one in lists}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            f"{name}: x, r, p and q must be four tensors, or four lists as long as one another and not empty"
        )
    if not isinstance(rz, Tensor) or rz.dtype is not torch.float64 or rz.dim() > 1:
        got = f"{rz.dtype} {tuple(rz.shape)}" if isinstance(rz, Tensor) else type(rz).__name__
        raise TypeError(
            f"{name}: rz is {got}; it must be a float64 tensor, () or (K,): the r'z of the iteration before"
        )
    for one in _tensors(x, r, p, q):
        if not usual(*one):
            floats(name, **dict(zip(("x", "r", "p", "q"), one, strict=True)))
        if not one[0].shape == one[1].shape == one[2].shape == one[3].shape:
            raise ValueError(
                f"{name}: x, r, p and q have shapes {', '.join(str(tuple(y.shape)) for y in one)}; they must be the same"
            )
        if rz.dim() and (one[0].dim() == 0 or one[0].shape[-1] != len(rz)):
            raise ValueError(f"{name}: x has shape {tuple(one[0].shape)}; its last axis must be rz's {len(rz)} columns")
        if inplace and one[0].dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: x is {one[0].dtype}; only float32 and float64 vectors are updated in place")


def _tensors(*given: Tensor | Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The arguments tensor by tensor, be they tensors or lists."""
    return [given] if isinstance(given[0], Tensor) else list(zip(*given, strict=True))


@op(check=_check_cg_update, backends=("cuda",))
def cg_update(
    x: Tensor | Sequence[Tensor], r: Tensor | Sequence[Tensor], p: Tensor | Sequence[Tensor],
    q: Tensor | Sequence[Tensor], rz: Tensor, *, damping: float = 0.0, inplace: bool = False,
) -> tuple:  # fmt: skip
    """One iteration of conjugate gradients on (A + damping I) x = b after the product q = A p, for K systems together.

        c = p'(q + damping p);  x += (rz / c) p;  r -= (rz / c) (q + damping p);  p = r + (r'r / rz) p

    A system whose c is not positive keeps its x and r, and p becomes r + p: A + damping I is not positive definite, or p is 0.

    Args:
        x, r, p, q: the iterate, its residual, the direction and its image, of one shape (...) or, for K systems, (..., K); or
            lists of tensors that are one vector together (a model's parameters, not flattened).
        rz: () or (K,), float64: r'r before. inplace: write into x, r and p, which must be float32 or float64.

    Returns:
        (x, r, p, c, r'r): vectors float32 or float64; c and the new r'r float64 like rz, summed in float64. Nothing waits for
        the device. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.

    Source: M. R. Hestenes & E. Stiefel, J. Research Nat. Bur. Standards 49, 1952.
    """
    parts = [tuple(map(wide, one)) for one in _tensors(x, r, p, q)]
    images = [torch.add(q_, p_, alpha=damping) if damping else q_ for _, _, p_, q_ in parts]
    curvature = _total([_dots(part[2], image, rz) for part, image in zip(parts, images, strict=True)], rz)
    rate = torch.where(curvature > 0, rz / curvature, 0.0)
    add = torch.Tensor.addcmul_ if inplace else torch.addcmul
    xs, rs, ps = [], [], []
    for (x_, r_, p_, _), image in zip(parts, images, strict=True):
        a = rate.to(x_)
        xs.append(add(x_, p_, a))
        rs.append(add(r_, image, a, value=-1))
    rr = _total([_dots(r_, r_, rz) for r_ in rs], rz)
    turn = torch.where(rz > 0, rr / rz, 0.0)
    for (_, _, p_, _), r_ in zip(parts, rs, strict=True):
        ps.append(p_.mul_(turn.to(p_)).add_(r_) if inplace else torch.addcmul(r_, p_, turn.to(p_)))
    vectors = (xs[0], rs[0], ps[0]) if isinstance(x, Tensor) else (xs, rs, ps)
    return *vectors, curvature, rr


def _total(parts: list[Tensor], like: Tensor) -> Tensor:
    return sum(parts[1:], parts[0]) if parts else torch.zeros_like(like)


def _dots(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """x'y, float64: () of all, or (K,) of the last axis' columns where `like` is (K,)."""
    if x.dim() == 2 and like.dim() == 1:
        return column_dots(x, y)
    k = len(like) if like.dim() else 1
    flat = x.reshape(x.numel() // max(k, 1), k)
    return column_dots(flat, flat if y is x else y.reshape(flat.shape)).reshape(like.shape)
