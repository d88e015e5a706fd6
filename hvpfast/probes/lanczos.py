"""`eigsh`: a few extreme eigenpairs of a symmetric matrix, with true residuals and with no copy missed silently."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from hvpfast.autocast import full_precision

from .krylov import Basis
from .product import Bar, Product, require_count, rotate_rows, row_gram
from .results import Eigs

BASIS_BYTES = 2 << 30  # memory for the basis, as long as BASIS_MINIMUM vectors fit
BASIS_ROWS = 400  # beyond this the projected eigenproblem and the orthogonalisation cost more than restarts do
BASIS_MINIMUM = 20
MISSED = 1e-3  # about the chance that a start vector hides an eigenvector from the completeness check
ROUNDING = 10  # residuals below ROUNDING * eps * ||A|| count as converged whatever tol says


@full_precision
def eigsh(
    A,
    k: int = 6,
    *,
    which: str = "LA",
    tol: float = 1e-4,
    max_matvecs: int | None = None,
    seed: int = 0,
    v0: Tensor | None = None,
    verify: bool | None = None,
    progress: bool = False,
) -> Eigs:
    """k extreme eigenpairs of a symmetric A by Lanczos with full reorthogonalisation and thick restarts.

    A single-vector Krylov space holds one copy of a repeated eigenvalue. So, once the k wanted pairs have converged,
    they are locked and a fresh random vector in their complement is run until nothing wanted can be left there; what
    turns up is inserted and the check repeated. The check ends when an unseen wanted eigenvector could have at most a
    fraction 1e-3 / sqrt(n) of the random vector, which is a bound, not a guess at convergence, and takes few matvecs if
    the wanted eigenvalues stand clear of the rest.

    Args:
        A: symmetric (n, n) matrix or operator.
        k: number of pairs, 1 <= k <= n; k = n multiplies the identity (n matvecs) and is exact.
        which: "LA" largest, "SA" smallest, "LM" largest in magnitude, "BE" both ends (ceil(k/2) from the top).
        tol: a pair has converged if ||A v - theta v|| <= max(tol * |theta|, 10 eps ||A||), eps of the working dtype.
        max_matvecs: cap, at least 2k; default max(1000, 20k).
        seed: of the random vectors; same seed, same bits.
        v0: start vector (n,), or a block (n, j) of which the sum of the normalised columns is used (the vectors of an
            earlier call, say). With k=1 a v0 that nearly is an eigenvector is taken at its word: another eigenvalue
            that has overtaken it is looked for only with verify=True, which costs about what a cold start costs.
        verify: the check above; None: when k > 1, and when v0 turned out to span an invariant subspace.
        progress: show a bar over matvecs.

    Returns:
        Eigs. values float64, algebraically descending for LA, SA and BE, by descending magnitude for LM; vectors
        (n, k) orthonormal; residuals are true, from k final products that also serve a last Rayleigh-Ritz step.
        Too few matvecs give converged=False and a RuntimeWarning, never an exception. Memory: the basis, at most 2 GiB
        unless n is so large that max(20, 2k + 8) vectors need more.

    Raises:
        ValueError: k, which, v0 or max_matvecs out of range, A not square, or products that no symmetric A gives.
        FloatingPointError: NaN or inf in a product.

    Source: Wu & Simon, SIAM J. Matrix Anal. 22 (2000), for the restarts.
    """
    product = Product(A, "eigsh")
    n = product.n
    require_count("eigsh", "k", k, 1)
    if k > n:
        raise ValueError(f"eigsh: k={k} but A is ({n}, {n}); needs 1 <= k <= {n}")
    if which not in ("LA", "SA", "LM", "BE"):
        raise ValueError(f"eigsh: which={which!r}; needs 'LA', 'SA', 'LM' or 'BE'")
    if not tol >= 0:
        raise ValueError(f"eigsh: tol={tol!r}; needs a number >= 0")
    start = _start_vector(product, v0)
    least = n if k == n else 2 * k
    limit = max(1000, 20 * k, least) if max_matvecs is None else max_matvecs
    require_count("eigsh", "max_matvecs", limit, least, "k to span and k for the residuals, or n if k = n")

    with Bar(product, None if max_matvecs is None else limit, progress) as bar:
        if k == n:
            return _dense(product, which, tol, seed)
        basis = Basis(product, _basis_rows(product, k), 0 if k == 1 and verify is False else 2 * k + 1, seed)
        basis.draw(start)
        guard = k == 1 and start is None
        done, theta, S = _converge(basis, k, which, tol, limit - k, guard, bar)
        chosen = _wanted(theta, k, which)
        values = theta[chosen]
        broke = start is not None and basis.breakdowns > 0
        basis.lock(S, chosen)
        check = (k > 1 or broke) if verify is None else verify
        verified = _complete(basis, values, k, which, tol, limit - k, bar) if check and done else None
        if check and not done:
            verified = False
        return _finish(basis, k, which, tol, seed, verified)


def _start_vector(product: Product, v0: Tensor | None) -> Tensor | None:
    """v0 checked and turned into one vector of the working dtype."""
    if v0 is None:
        return None
    if not isinstance(v0, Tensor) or v0.ndim not in (1, 2) or v0.shape[0] != product.n:
        got = tuple(v0.shape) if isinstance(v0, Tensor) else type(v0).__name__
        raise ValueError(f"eigsh: v0 is {got}; needs a tensor ({product.n},) or ({product.n}, j)")
    v0 = v0.detach().to(device=product.device, dtype=product.dtype)
    if v0.ndim == 2:
        v0 = torch.nn.functional.normalize(v0, dim=0).sum(dim=1)
    if not bool(torch.isfinite(v0).all()) or not bool(v0.any()):
        raise ValueError(
            "eigsh: v0 is zero or not finite; needs a non-zero start vector; leave it out for a random one"
        )
    return v0


def _basis_rows(product: Product, k: int) -> int:
    fits = BASIS_BYTES // (product.n * torch.finfo(product.dtype).bits // 8)
    return max(BASIS_MINIMUM, 2 * k + 8, min(fits, max(BASIS_ROWS, 3 * k)))


def _wanted(theta: Tensor, count: int, which: str) -> Tensor:
    """Indices of the `count` values that `which` ranks first, most wanted first within each end."""
    order = theta.argsort(descending=True, stable=True)
    if which == "LM":
        return theta.abs().argsort(descending=True, stable=True)[:count]
    bottom = {"LA": 0, "SA": count, "BE": count // 2}[which]
    return torch.cat([order[: count - bottom], order[order.numel() - bottom :].flip(0)])


def _tolerances(theta: Tensor, tol: float, basis: Basis) -> Tensor:
    return (tol * theta.abs()).clamp(min=ROUNDING * basis.product.eps * basis.scale)


def _due(basis: Basis) -> bool:
    """Whether to solve the projected problem now: each step while it is small, then every few steps."""
    return basis.size % (1 + basis.size // 50) == 0 or basis.size == basis.rows or basis.exhausted


def _shorten(basis: Basis, theta: Tensor, S: Tensor, k: int, which: str) -> None:
    """Thick restart with the wanted pairs and a third of the room left beside them."""
    basis.restart(theta, S, _wanted(theta, k + (basis.rows - k) // 3, which))


def _converge(
    basis: Basis, k: int, which: str, tol: float, stop: int, guard: bool, bar: Bar
) -> tuple[bool, Tensor, Tensor]:
    """Grow the basis until the k wanted Ritz pairs have converged, the space is exhausted or `stop` matvecs are spent.

    guard: an outlying eigenvalue of which the random start has very little (large n) can leave the first Ritz pairs
    with a small residual; do not stop before one that is 5 % of ||A|| further out is ruled out.
    """
    product = basis.product
    while True:
        basis.extend()
        bar.update()
        spent = product.matvecs >= stop
        if not (spent or _due(basis)):
            continue
        theta, S, residuals = basis.ritz()
        if basis.exhausted:
            return True, theta, S
        if basis.size >= k:
            chosen = _wanted(theta, k, which)
            if bool((residuals[chosen] <= _tolerances(theta[chosen], tol, basis)).all()):
                if not guard or _ruled_out(basis, theta, *_interval(theta[chosen], k, which, 0.05 * basis.scale)):
                    return True, theta, S
        if spent:
            return False, theta, S
        if basis.size == basis.rows:
            _shorten(basis, theta, S, k, which)


def _interval(values: Tensor, k: int, which: str, slack: float) -> tuple[float, float]:
    """(low, high): an eigenvalue <= low or >= high belongs among the k wanted `values`, by at least `slack`."""
    low, high = -math.inf, math.inf
    if which == "LM":
        high = float(values.abs().min()) + slack
        low = -high
    else:
        bottom = {"LA": 0, "SA": k, "BE": k // 2}[which]
        ordered = values.sort(descending=True).values
        if k > bottom:
            high = float(ordered[k - bottom - 1]) + slack
        if bottom:
            low = float(ordered[k - bottom]) - slack
    return low, high


def _ruled_out(basis: Basis, theta: Tensor, low: float, high: float) -> bool:
    """No eigenvector beyond (low, high) can have had more than MISSED / sqrt(n) of the basis' random start vector."""
    limit = math.log(MISSED / math.sqrt(basis.product.n))
    return all(basis.log_component(theta, end) <= limit for end in (low, high) if math.isfinite(end))


def _complete(basis: Basis, values: Tensor, k: int, which: str, tol: float, stop: int, bar: Bar) -> bool:
    """Look for wanted eigenpairs outside the locked ones and insert them; True when none can be left."""
    product = basis.product
    while basis.locked < product.n:
        slack = float(_tolerances(values, tol, basis).max())
        low, high = _interval(values, k, which, slack)
        basis.draw()
        while True:
            if product.matvecs >= stop:
                return False
            basis.extend()
            bar.update()
            if not _due(basis):
                continue
            theta, S, residuals = basis.ritz()
            small = residuals <= _tolerances(theta, tol, basis)
            outside = (theta > high) | (theta < low)
            if basis.exhausted or bool(outside.any()):
                if basis.exhausted or bool(small[outside].all()):
                    break
            elif _ruled_out(basis, theta, low, high):
                return True
            elif (math.isinf(high) or bool(small[-1])) and (math.isinf(low) or bool(small[0])):
                return True
            if basis.size == basis.rows:
                _shorten(basis, theta, S, k, which)
        found = outside.nonzero().flatten()
        if not found.numel():
            return True
        found = found[_wanted(theta[found], min(k, found.numel()), which)]
        union = torch.cat([values, theta[found]])
        basis.lock(S, found)
        best = _wanted(union, k, which)
        values = union[best]
        basis.select(best)
    return True


def _finish(basis: Basis, k: int, which: str, tol: float, seed: int, verified: bool | None) -> Eigs:
    """True residuals from one block product with the locked vectors, after a Rayleigh-Ritz step on their span."""
    product, scale = basis.product, basis.scale
    X = basis.V[:k].clone()
    basis.V = None  # the basis may be as large as everything else together
    W = product(X.T).T.contiguous()
    L = torch.linalg.cholesky(row_gram(X, X).cpu())
    projected = row_gram(X, W).cpu()
    projected = torch.linalg.solve_triangular(L, (projected + projected.T) / 2, upper=False)
    projected = torch.linalg.solve_triangular(L, projected.T, upper=False)
    theta, S = torch.linalg.eigh((projected + projected.T) / 2)
    order = _output_order(theta, which)
    theta, S = theta[order], torch.linalg.solve_triangular(L.T, S[:, order], upper=True)
    rotate_rows(X, S)
    rotate_rows(W, S)
    W -= theta.to(W)[:, None] * X
    residuals = torch.linalg.vector_norm(W, dim=1, dtype=torch.float64).cpu()
    return _result(product, theta, X.T.contiguous(), residuals, which, tol, seed, verified, scale)


def _dense(product: Product, which: str, tol: float, seed: int) -> Eigs:
    """All n pairs from A times the identity."""
    matrix = product.dense()
    theta, S = torch.linalg.eigh(matrix)
    order = _output_order(theta, which)
    theta, S = theta[order], S[:, order]
    residuals = torch.linalg.vector_norm(matrix @ S - S * theta, dim=0)
    vectors = S.to(product.device, product.dtype)
    return _result(product, theta, vectors, residuals, which, tol, seed, None, float(theta.abs().max()))


def _output_order(theta: Tensor, which: str) -> Tensor:
    return (theta.abs() if which == "LM" else theta).argsort(descending=True, stable=True)


def _result(
    product: Product,
    theta: Tensor,
    vectors: Tensor,
    residuals: Tensor,
    which: str,
    tol: float,
    seed: int,
    verified: bool | None,
    scale: float,
) -> Eigs:
    pairs = residuals <= (tol * theta.abs()).clamp(min=ROUNDING * product.eps * scale)
    converged = bool(pairs.all()) and verified is not False
    if not pairs.all():
        worst = int((residuals / theta.abs().clamp(min=torch.finfo(torch.float64).tiny)).argmax())
        warnings.warn(
            f"eigsh: {int((~pairs).sum())} of {pairs.numel()} pairs not converged after {product.matvecs} matvecs; "
            f"worst residual {float(residuals[worst]):.3g} at eigenvalue {float(theta[worst]):.6g} (tol={tol:g}); "
            "raise max_matvecs or tol",
            RuntimeWarning,
            stacklevel=5,
        )
    elif verified is False:
        warnings.warn(
            f"eigsh: {product.matvecs} matvecs were too few to rule out repeated eigenvalues (worst residual "
            f"{float(residuals.max()):.3g}); raise max_matvecs, or pass verify=False if copies do not matter",
            RuntimeWarning,
            stacklevel=5,
        )
    return Eigs(theta, vectors, residuals, converged, product.matvecs, pairs, verified, which, seed)
