"""`solve`: (A + damping I) x = b by conjugate gradients, all right-hand sides together."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from hvpfast.autocast import full_precision
from hvpfast.ops import cg_update
from hvpfast.ops.shared import column_dots

from .product import Bar, Product, require_count
from .results import Solution


@full_precision
def solve(
    A,
    b: Tensor,
    *,
    damping: float = 0.0,
    method: str = "cg",
    tol: float = 1e-6,
    max_iterations: int | None = None,
    preconditioner=None,
    progress: bool = False,
) -> Solution:
    """x with (A + damping I) x = b, for a symmetric A with A + damping I positive definite.

    Conjugate gradients (Hestenes & Stiefel 1952), one recurrence per column of b, one block product per iteration for
    the columns still going. When the recurrence says "converged" the residual is computed anew, and the iteration
    resumed from it for as long as that helps: rounding makes the recurrence optimistic.

    Args:
        A: symmetric (n, n). b: (n,) or (n, K), moved to A's device, where x lies too.
        damping: added to the diagonal.
        tol: on ||b - (A + damping I) x|| / ||b||, each column. In float32, values under about eps * condition number
            cannot be reached.
        max_iterations: default min(10 n, 1000).
        preconditioner: approximate inverse of A + damping I, symmetric positive definite: anything with `@`, or a
            callable, (n,) -> (n,) and (n, K) -> (n, K).

    Returns:
        Solution; `residual` is the true relative one. Not converging gives converged=False and a RuntimeWarning.

    Raises:
        ValueError: a search direction p with p'(A + damping I)p <= 0 (CG has no answer there; the message says the
        damping that would do for it), a preconditioner that is not positive, shapes that do not fit.
        FloatingPointError: NaN or inf in a product.
    """
    product = Product(A, "solve")
    n = product.n
    if method != "cg":
        raise ValueError(f"solve: method={method!r}; needs 'cg'")
    if not isinstance(b, Tensor):
        raise TypeError(f"solve: b is a {type(b).__name__}; needs a tensor ({n},) or ({n}, K)")
    if b.ndim not in (1, 2) or b.shape[0] != n:
        raise ValueError(f"solve: b has shape {tuple(b.shape)}; needs ({n},) or ({n}, K) for A ({n}, {n})")
    if not math.isfinite(damping):
        raise ValueError(f"solve: damping={damping!r}; needs a finite number")
    if not tol >= 0:
        raise ValueError(f"solve: tol={tol!r}; needs a number >= 0")
    limit = min(10 * n, 1000) if max_iterations is None else max_iterations
    require_count("solve", "max_iterations", limit, 0)
    B = b.detach().to(device=product.device, dtype=product.dtype).reshape(n, -1)
    sizes = column_dots(B, B).sqrt()
    if not bool(torch.isfinite(sizes).all()):
        raise ValueError("solve: b has NaN or inf; needs finite entries")

    with Bar(product, None, progress) as bar:
        X, residuals, iterations = _solve_columns(product, B, sizes, float(damping), tol, limit, preconditioner, bar)
    converged = bool((residuals <= tol).all())
    if not converged:
        warnings.warn(
            f"solve: relative residual {float(residuals.max()):.3g} after {iterations} iterations (tol={tol:g}); raise "
            f"max_iterations, damping or tol, use a preconditioner, or a wider dtype than {product.dtype}",
            RuntimeWarning,
            stacklevel=3,
        )
    residual = residuals.cpu() if b.ndim == 2 else float(residuals[0])
    return Solution(X.reshape(b.shape), residual, iterations, converged, product.matvecs, float(damping))


def _solve_columns(
    product: Product, B: Tensor, sizes: Tensor, damping: float, tol: float, limit: int, preconditioner, bar: Bar
) -> tuple[Tensor, Tensor, int]:
    """Rounds of conjugate gradients, each from the true residual of the last."""
    X, R = torch.zeros_like(B), B.clone()
    safe = torch.where(sizes > 0, sizes, 1.0)
    residuals = torch.where(sizes > 0, 1.0, 0.0).double()
    before = torch.full_like(residuals, math.inf)
    goal = max(tol, 0.01 * product.eps)  # below that the recurrence only counts its own rounding
    iterations = 0
    while iterations < limit:
        todo = ((residuals > tol) & (residuals < 0.5 * before)).nonzero().flatten()
        if not todo.numel():
            break
        step, iterations = _conjugate_gradients(
            product, R[:, todo], goal * sizes[todo], damping, iterations, limit, preconditioner, bar
        )
        X[:, todo] += step
        R[:, todo] = B[:, todo] - product(X[:, todo]) - damping * X[:, todo]
        before[todo] = residuals[todo]
        residuals[todo] = column_dots(R[:, todo], R[:, todo]).sqrt() / safe[todo]
        bar.update()
    return X, residuals, iterations


def _conjugate_gradients(
    product: Product, B: Tensor, targets: Tensor, damping: float, done: int, limit: int, preconditioner, bar: Bar
) -> tuple[Tensor, int]:
    """From x = 0 until every column's recurrence residual is under its target, or `limit` iterations in all."""
    X = torch.zeros_like(B)
    columns = torch.arange(B.shape[1], device=B.device)  # those still going
    r, x = B.clone(), X.clone()
    z = _precondition(preconditioner, r)
    p, rz = z.clone(), _positive(r, z)
    while done < limit:
        done += 1
        q = product(p)
        if preconditioner is None:
            *_, curvature, rr = cg_update(x, r, p, q, rz, damping=damping, inplace=True)
        else:
            q.add_(p, alpha=damping)
            curvature = column_dots(p, q)
            a = torch.where(curvature > 0, rz / curvature, 0.0).to(p)
            x.addcmul_(p, a)
            r.addcmul_(q, -a)
            rr = column_dots(r, r)
        bad = ~(curvature > 0)
        if bool(bad.any()):
            before = p[:, bad] if preconditioner is not None else p[:, bad] - r[:, bad]
            ratio = float((curvature[bad] / column_dots(before, before)).min())
            raise ValueError(
                f"solve: curvature p'(A + damping I)p / p'p = {ratio:.6g} in iteration {done}, damping={damping:g}; "
                f"CG needs A + damping I positive definite; use a damping above {damping - ratio:.6g}, or a "
                "positive semi-definite matrix (a GGN instead of a Hessian)"
            )
        bar.update()
        going = rr.sqrt() > targets
        if not bool(going.all()):
            X[:, columns[~going]] = x[:, ~going]
            if not bool(going.any()):
                return X, done
            columns, targets, rz, rr = columns[going], targets[going], rz[going], rr[going]
            x, r, p = (y[:, going].contiguous() for y in (x, r, p))
        if preconditioner is None:
            rz = rr
        else:
            z = _precondition(preconditioner, r)
            new = _positive(r, z)
            p.mul_((new / rz).to(p)).add_(z)
            rz = new
    X[:, columns] = x
    return X, done


def _precondition(preconditioner, r: Tensor) -> Tensor:
    if preconditioner is None:
        return r
    operand = r[:, 0] if r.shape[1] == 1 else r
    z = preconditioner @ operand if hasattr(preconditioner, "__matmul__") else preconditioner(operand)
    if not isinstance(z, Tensor) or z.shape != operand.shape:
        got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"solve: preconditioner gave {got} for {tuple(operand.shape)}; needs the same shape")
    return z.detach().to(r).reshape(r.shape)


def _positive(r: Tensor, z: Tensor) -> Tensor:
    rz = column_dots(r, z)
    if not bool((rz > 0).all()):
        raise ValueError(
            f"solve: preconditioner M has r'Mr = {float(rz.min()):.3g}; needs a finite positive definite one; "
            "raise its damping, or leave it out"
        )
    return rz
