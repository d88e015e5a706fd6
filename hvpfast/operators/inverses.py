"""Damped inverses of Kronecker factors without an eigenbasis: Cholesky, Woodbury, and Newton-Schulz products.

Sources: Golub & Van Loan, Matrix Computations 4th ed., 2.1.4 (Woodbury); Guo & Higham, A Schur-Newton method for the
matrix p-th root and its inverse, SIAM J. Matrix Anal. 28 (2006) (the coupled iteration).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvpfast import dispatch
from hvpfast.operators.eigen import batches, require_finite, stack, unstack
from hvpfast.operators.factor import Diagonal, Factor, Thin
from hvpfast.ops import gram


def _dampings(name: str, factors: Sequence[Factor], damping: Sequence[float | Tensor]) -> list[Tensor]:
    """Each factor's damping as (B,), in its dtype; numbers are checked, tensors are not waited for."""
    damping = list(damping)
    if len(damping) != len(factors):
        raise ValueError(f"{name}: got {len(factors)} factors and {len(damping)} dampings; give one each")
    out = []
    for index, (factor, d) in enumerate(zip(factors, damping, strict=True)):
        if not isinstance(d, Tensor) and not 0 <= d < float("inf"):
            raise ValueError(f"{name}: the damping of factor {index} is {d}; it must be finite and >= 0")
        out.append(torch.as_tensor(d, dtype=factor.dtype, device=factor.device).expand(factor.groups))
    return out


def cholesky_inverses(factors: Sequence[Factor], damping: Sequence[float | Tensor]) -> list[Tensor]:
    """`(A + d I)^-1` of every factor, through Cholesky; equal shapes go through in one batch.

    A `Thin` factor with rows R takes (I - R'(R R' + d I)^-1 R) / d, an (r, r) solve (`thin_solve` applies it without
    the (I, I) matrix); a `Diagonal` one is inverted by elements. No jitter is added: what fails, or is singular to
    working precision, is done again in float64, one by one.

    Args:
        factors: of any sizes and representations. damping: d of each, a number >= 0, or a tensor () or (B,).

    Returns:
        (B, I, I) for each factor, in its dtype.

    Raises:
        ValueError: a factor is not finite, or singular with the damping given; the message has its index.
    """
    factors = list(factors)
    shares = _dampings("cholesky_inverses", factors, damping)
    require_finite("cholesky_inverses", factors)
    found: dict[int, Tensor] = {}
    dense: dict[int, Tensor] = {}
    thin: dict[int, Tensor] = {}
    for index, factor in enumerate(factors):
        if isinstance(factor, Diagonal):
            shifted = factor.values + shares[index][:, None]
            if not bool((shifted > 0).all()):
                raise _singular(index, factor, shares[index])
            found[index] = shifted.reciprocal().diag_embed()
        elif isinstance(factor, Thin) and factor.rank < factor.size:
            if not bool((shares[index] > 0).all()):
                raise _singular(index, factor, shares[index])
            thin[index] = factor.rows
        else:
            dense[index] = factor.dense()
    for batch in batches(list(dense), dense):
        inverse = _solve(batch, factors, shares, stack(batch, dense), lambda a: a, _inverse_of)
        found.update(zip(batch, *unstack(batch, dense, inverse), strict=True))
    for batch in batches(list(thin), thin):
        inverse = _solve(batch, factors, shares, stack(batch, thin), _rows_gram, _woodbury)
        found.update(zip(batch, *unstack(batch, thin, inverse), strict=True))
    return [found[index] for index in range(len(factors))]


def thin_solve(factor: Thin, damping: float | Tensor, x: Tensor) -> Tensor:
    """`(A + d I)^-1 x` for a thin factor and x (B, I, n), with no (I, I) matrix: an (r, r) Cholesky and two products.

    Raises:
        ValueError: as `cholesky_inverses`; d must be > 0.
    """
    (d,) = _dampings("thin_solve", [factor], [damping])
    require_finite("thin_solve", [factor])
    if not bool((d > 0).all()):
        raise _singular(0, factor, d)

    def finish(rows: Tensor, lower: Tensor, d: Tensor, part: slice) -> Tensor:
        b = x[part].to(rows.dtype)
        return (b - rows.mT @ torch.cholesky_solve(rows @ b, lower)) / d[:, None, None]

    return _solve([0], [factor], [d], factor.rows, _rows_gram, finish)


def _rows_gram(rows: Tensor) -> Tensor:
    return rows @ rows.mT


def _inverse_of(matrices: Tensor, lower: Tensor, d: Tensor, part: slice) -> Tensor:
    return torch.cholesky_inverse(lower)


def _woodbury(rows: Tensor, lower: Tensor, d: Tensor, part: slice) -> Tensor:
    half = torch.linalg.solve_triangular(lower, rows, upper=False)
    inverse = (half.mT @ half).neg_()
    inverse.diagonal(dim1=-2, dim2=-1).add_(1)
    return inverse / d[:, None, None]


def _solve(
    batch: list[int],
    factors: Sequence[Factor],
    shares: Sequence[Tensor],
    given: Tensor,
    square: Callable,
    finish: Callable,
) -> Tensor:
    """finish(given, lower, d, part) for the Cholesky factors of square(given) + d I; in float64 where those fail."""
    owners = [index for index in batch for _ in range(factors[index].groups)]
    d = torch.cat([shares[index] for index in batch])
    lower, info, rounding = _factorise(square(given), d)
    fine = (info == 0) & (_least_pivot(lower) > rounding)
    if bool(fine.all()):
        return finish(given, lower, d, slice(None))
    lower[~fine] = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    result = finish(given, lower, d, slice(None))
    for i in torch.nonzero(~fine).flatten().tolist():
        part = slice(i, i + 1)
        wide, share = given[part].double(), d[part].double()
        lower, info, _ = _factorise(square(wide), share)
        # Without damping, a pivot below the given dtype's rounding is nothing but rounding.
        if bool(info.any()) or not bool((share > 0) | (_least_pivot(lower) > rounding[part])):
            raise _singular(owners[i], factors[owners[i]], d[part])
        result[part] = finish(wide, lower, share, part).to(given.dtype)
    return result


def _factorise(matrices: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower Cholesky factors of matrices + d I, LAPACK's verdicts (L,), and below which a pivot is rounding (L,)."""
    shifted = matrices.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(d[:, None])
    top = shifted.diagonal(dim1=-2, dim2=-1).amax(-1)
    lower, info = torch.linalg.cholesky_ex(shifted)
    return lower, info, matrices.shape[-1] * torch.finfo(matrices.dtype).eps * top


def _least_pivot(lower: Tensor) -> Tensor:
    return lower.diagonal(dim1=-2, dim2=-1).square().amin(-1)


def _singular(index: int, factor: Factor, damping: Tensor) -> ValueError:
    mean = float(factor.trace().mean()) / factor.size
    return ValueError(
        f"factor {index}, {factor}, is singular with damping {float(damping.min()):.3g} (its mean eigenvalue is "
        f"{mean:.3g}); give a damping > 0, for example {max(1e-3 * mean, 1e-12):.1g}"
    )


def newton_schulz_inverses(
    factors: Sequence[Factor],
    damping: Sequence[float | Tensor],
    *,
    root: int = 1,
    iterations: int = 20,
    precision: str = "ieee",
) -> list[Tensor]:
    """`(A + d I)^(-1/root)` by matrix products alone: no LAPACK and no wait for the device between the first and last.

    root = 1 squares the error E = I - s (A + d I): E <- E E, X <- X + X E, then one or two float32 steps
    X <- X + X (I - (A + d I) X) that remove what lower precision left. root = 2 and 4 run the coupled iteration.
    `iterations` are enough for condition numbers (max(values) + d) / d up to about 2^(iterations - 4) (root 1) or
    2^(iterations - 6); a factor beyond that is returned inaccurate: nothing is checked, so that nothing waits.

    On a CPU this loses to `cholesky_inverses`, the one to take there: 45 ms against 1.3 ms for one 256 x 256, 290 ms
    against 22 ms for 1024 x 1024 (2 cores, float32, 20 iterations). On a GPU it has not been measured.

    Args:
        factors, damping: as in `cholesky_inverses`; d must be > 0 for a singular factor. root: 1, 2 or 4.
        precision: of the squares E E (root 1): "ieee", or "bf16x3" for `hvpfast.ops.gram` to split float32 in two bf16
            halves where it has such a kernel, for condition numbers up to 1e4.

    Returns:
        (B, I, I) for each factor, in its dtype.
    """
    if root not in (1, 2, 4):
        raise ValueError(f"newton_schulz_inverses: root is {root}; it must be 1, 2 or 4")
    if precision not in ("ieee", "bf16x3"):
        raise ValueError(f"newton_schulz_inverses: precision is {precision!r}; it must be 'ieee' or 'bf16x3'")
    factors = list(factors)
    shares = _dampings("newton_schulz_inverses", factors, damping)
    dense = {index: factor.dense() for index, factor in enumerate(factors) if not isinstance(factor, Diagonal)}
    found = {
        index: (factor.values + shares[index][:, None]).pow(-1 / root).diag_embed()
        for index, factor in enumerate(factors)
        if index not in dense
    }
    for batch in batches(list(dense), dense):
        matrix = stack(batch, dense).clone()
        d = torch.cat([shares[index] for index in batch])
        matrix.diagonal(dim1=-2, dim2=-1).add_(d[:, None])
        # At least the largest eigenvalue: the smaller of two norms that need no iteration.
        bound = torch.minimum(torch.linalg.matrix_norm(matrix), matrix.abs().sum(-1).amax(-1))[:, None, None]
        if root == 1:
            result = _inverse(matrix, 2 / (bound + d[:, None, None]), iterations, precision)
        else:
            result = _root(matrix, 1 / bound, root, iterations)
        found.update(zip(batch, *unstack(batch, dense, result), strict=True))
    return [found[index] for index in range(len(factors))]


def _inverse(matrix: Tensor, scale: Tensor, iterations: int, precision: str) -> Tensor:
    e = matrix * -scale
    e.diagonal(dim1=-2, dim2=-1).add_(1)  # eigenvalues in (-1, 1)
    x = e.clone()
    x.diagonal(dim1=-2, dim2=-1).add_(1)
    for _ in range(iterations - 1):
        if precision == "ieee":
            e = e @ e
        else:
            with dispatch.precision(precision):
                e = torch.stack([gram(one) for one in e])  # e is symmetric: its square is its Gram matrix
        x = x + x @ e
    x = x * scale
    for _ in range(1 if precision == "ieee" else 2):
        x = x + x @ _minus_from_identity(matrix @ x)
    return (x + x.mT) / 2


def _minus_from_identity(x: Tensor) -> Tensor:
    x = x.neg()
    x.diagonal(dim1=-2, dim2=-1).add_(1)
    return x


def _root(matrix: Tensor, scale: Tensor, root: int, iterations: int) -> Tensor:
    m = matrix * scale  # tends to the identity, x to its inverse root
    x = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand_as(m)
    for _ in range(iterations):
        t = _minus_from_identity(m) / root
        t.diagonal(dim1=-2, dim2=-1).add_(1)  # ((root + 1) I - m) / root
        power = t @ t if root == 2 else (t @ t) @ (t @ t)
        x, m = x @ t, power @ m
    return (x + x.mT) / 2 * scale.pow(1 / root)
