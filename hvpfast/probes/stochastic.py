"""Traces, diagonals and Frobenius norms from products with random signs, always with a standard error."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hvpfast.autocast import full_precision
from hvpfast.ops.shared import column_dots

from .product import COLUMNS, Bar, Product, rademacher, require_count, rotate_rows, row_gram
from .results import Estimate

FIRST_CHECK = 16  # probes before `rtol` may stop Hutchinson: the error of a standard error is then about 18 %
FIRST_BUDGET = 24  # first round of the sketching methods under `rtol`
OTHER_PROBES = 1 << 32  # indices of probes that must be independent of the sketch's
LEAST = {"hutchinson": 2, "hutch++": 4, "xtrace": 4}


@full_precision
def trace(
    A,
    *,
    matvecs: int = 64,
    method: str = "hutchinson",
    rtol: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """The trace of A (the sum of its eigenvalues; divide by n for their mean), with its standard error.

    "hutchinson": mean of v'Av over random signs v; error sqrt(2) ||A - diag A||_F / sqrt(m).
    "hutch++": m/3 products find a range Q, tr(Q'AQ) is exact, Hutchinson with m/3 probes does the remainder; the
    standard error is the remainder's. Far better if the spectrum decays, little worse if it does not.
    "xtrace": each of m/2 vectors is the probe of the range that the others span; the mean of these m/2 exchangeable
    estimates, the standard error from their spread. Most exact for decaying spectra.
    The sketching methods hold about m (n,)-vectors at once; Hutchinson holds 16.

    Args:
        A: square (n, n), symmetric or not.
        matvecs: budget, at least 2 (hutchinson) or 4; from n on the identity is used: exact, standard error 0.
        rtol: stop as soon as stderr <= rtol * |value|, `matvecs` is then the cap. Hutchinson looks after every 8
            probes, from 16 on; the others in rounds of doubling size. The standard error of a result that stopped early
            is slightly optimistic: it was chosen for being small.
        seed: same seed, same probes, on any device.

    Returns:
        Estimate with float value and stderr.

    Raises:
        ValueError: unknown method, too few matvecs, A not square. FloatingPointError: NaN or inf in a product.

    Sources: Hutchinson 1990; Meyer, Musco, Musco & Woodruff, Hutch++, SOSA 2021; Epperly, Tropp & Webber, XTrace,
    SIAM J. Matrix Anal. 45 (2024).
    """
    product = Product(A, "trace")
    if method not in LEAST:
        raise ValueError(f"trace: method={method!r}; needs one of {', '.join(map(repr, LEAST))}")
    _require_budget(product, matvecs, LEAST[method], method)
    _require_rtol("trace", rtol)
    with Bar(product, min(matvecs, product.n), progress) as bar:
        if matvecs >= product.n:
            value, stderr = sum(float(part.sum()) for part in _diagonal_parts(product, bar)), 0.0
        elif method == "hutchinson":
            value, stderr = _mean(product, lambda V, AV: column_dots(V, AV), matvecs, rtol, seed, bar)
        else:
            estimate = _hutch_plus_plus if method == "hutch++" else _xtrace
            value, stderr = _sketched(product, estimate, matvecs, rtol, seed, bar)
    return Estimate(value, stderr, product.matvecs, "exact" if matvecs >= product.n else method, seed)


@full_precision
def frobenius_norm(
    A, *, matvecs: int = 64, rtol: float | None = None, seed: int = 0, progress: bool = False
) -> Estimate:
    """||A||_F = sqrt(E ||A v||^2) over random signs v, with its standard error.

    The mean of ||A v||^2 is unbiased for the square; the root's standard error is stderr(square) / (2 value), the delta
    method, and its bias -stderr^2 / (2 value) is of second order.

    Args, Raises: as `trace`; matvecs >= 2, from n on the result is exact; rtol applies to the norm.

    Returns:
        Estimate with float value and stderr.
    """
    product = Product(A, "frobenius_norm")
    _require_budget(product, matvecs, 2, "a standard error")
    _require_rtol("frobenius_norm", rtol)
    exact = matvecs >= product.n
    with Bar(product, min(matvecs, product.n), progress) as bar:
        if exact:
            square, error = 0.0, 0.0
            for i in range(0, product.n, COLUMNS):
                columns = product(product.identity(i, min(i + COLUMNS, product.n)))
                square += float(column_dots(columns, columns).sum())
                bar.update()
        else:
            rule = None if rtol is None else 2 * rtol
            square, error = _mean(product, lambda V, AV: column_dots(AV, AV), matvecs, rule, seed, bar)
    value = math.sqrt(square)
    stderr = error / (2 * value) if value > 0 else 0.0
    return Estimate(value, stderr, product.matvecs, "exact" if exact else "hutchinson", seed)


@full_precision
def diagonal(A, *, matvecs: int = 64, seed: int = 0, progress: bool = False) -> Estimate:
    """The diagonal of A as the mean of v * (A v) over random signs v, with each entry's standard error.

    Entry i has variance sum_{j != i} A_ij^2 / m: small entries beside large off-diagonals need many probes.

    Args:
        A: square (n, n). matvecs: probes, at least 2; from n on the identity is used: exact, standard error 0.

    Returns:
        Estimate with value (n,) and stderr (n,) in the working dtype (float64 for float64, else float32).

    Source: Bekas, Kokiopoulou & Saad, Applied Numerical Mathematics 57 (2007).
    """
    product = Product(A, "diagonal")
    _require_budget(product, matvecs, 2, "a standard error")
    with Bar(product, min(matvecs, product.n), progress) as bar:
        if matvecs >= product.n:
            value = torch.cat(list(_diagonal_parts(product, bar)))
            return Estimate(value, torch.zeros_like(value), product.matvecs, "exact", seed)
        mean = torch.zeros(product.n, dtype=torch.float64, device=product.device)
        squares = torch.zeros_like(mean)  # sum of squared deviations from the running mean
        for i in range(0, matvecs, COLUMNS):
            V = rademacher(product, seed, range(i, min(i + COLUMNS, matvecs)))
            samples = V.mul_(product(V))
            for j, sample in enumerate(samples.unbind(1), start=i + 1):
                change = sample.double() - mean
                mean += change / j
                squares += change * (sample.double() - mean)
            bar.update()
        stderr = (squares / ((matvecs - 1) * matvecs)).sqrt_()
    return Estimate(mean.to(product.dtype), stderr.to(product.dtype), product.matvecs, "hutchinson", seed)


def _require_budget(product: Product, matvecs: int, least: int, why: str) -> None:
    """`least` matvecs, or n if that is fewer: then the answer is exact."""
    least = min(least, product.n)
    require_count(product.probe, "matvecs", matvecs, least, f"for {why}, n = {product.n}")


def _require_rtol(probe: str, rtol: float | None) -> None:
    if rtol is not None and not rtol > 0:
        raise ValueError(f"{probe}: rtol={rtol!r}; needs a number > 0, or None to spend all matvecs")


def _diagonal_parts(product: Product, bar: Bar):
    """The diagonal of A, COLUMNS entries at a time."""
    for i in range(0, product.n, COLUMNS):
        last = min(i + COLUMNS, product.n)
        yield product(product.identity(i, last))[i:last].diagonal()
        bar.update()


def _mean(
    product: Product,
    sample: Callable[[Tensor, Tensor], Tensor],
    matvecs: int,
    rtol: float | None,
    seed: int,
    bar: Bar,
    deflate: Callable[[Tensor], Tensor] = lambda V: V,
    first: int = 0,
) -> tuple[float, float]:
    """Mean and standard error of sample(V, A V) over at most `matvecs` random sign vectors."""
    samples: list[float] = []
    while len(samples) < matvecs:
        start = first + len(samples)
        V = deflate(rademacher(product, seed, range(start, start + min(COLUMNS, matvecs - len(samples)))))
        samples += sample(V, product(V)).tolist()
        bar.update()
        if rtol is not None and len(samples) >= FIRST_CHECK:
            value, stderr = _mean_and_error(samples)
            if stderr <= rtol * abs(value):
                break
    return _mean_and_error(samples)


def _mean_and_error(samples) -> tuple[float, float]:
    samples = torch.as_tensor(samples, dtype=torch.float64)
    return float(samples.mean()), float(samples.std() / math.sqrt(samples.numel()))


def _sketched(product: Product, estimate, cap: int, rtol: float | None, seed: int, bar: Bar) -> tuple[float, float]:
    """One round with the whole budget, or rounds of doubling size that reuse the sketch A @ Omega."""
    sketch = torch.empty(product.n, 0, dtype=product.dtype, device=product.device)
    budget = cap if rtol is None else min(FIRST_BUDGET, cap)
    while True:
        value, stderr, sketch = estimate(product, budget, sketch, seed)
        bar.update()
        affordable = cap - product.matvecs + sketch.shape[1]
        if rtol is None or stderr <= rtol * abs(value) or affordable < 1.25 * budget:
            return value, stderr
        budget = min(2 * budget, affordable)


def _extend_sketch(product: Product, sketch: Tensor, columns: int, seed: int) -> Tensor:
    """A @ Omega with at least `columns` sign vectors, the first ones reused."""
    if sketch.shape[1] >= columns:
        return sketch
    fresh = product(rademacher(product, seed, range(sketch.shape[1], columns)))
    return torch.cat([sketch, fresh], dim=1)


def _range(Y: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Numerical range of Y (n, p): Q (n, r) orthonormal, singular values (r,), right vectors (p, r); Q'Y = s * V'."""
    Q, R = torch.linalg.qr(Y)
    U, s, Vh = torch.linalg.svd(R.double().cpu(), full_matrices=False)
    rank = int((s > 32 * eps * s[0]).sum())
    rows = Q.T.contiguous()
    rotate_rows(rows, U[:, :rank])
    return rows[:rank].T, s[:rank], Vh[:rank].T


def _hutch_plus_plus(product: Product, budget: int, sketch: Tensor, seed: int) -> tuple[float, float, Tensor]:
    count = budget // 3
    sketch = _extend_sketch(product, sketch, count, seed)
    Q, _, _ = _range(sketch, product.eps)
    captured = float(column_dots(Q, product(Q)).sum()) if Q.shape[1] else 0.0

    def deflate(V: Tensor) -> Tensor:
        return V - Q @ row_gram(Q.T, V.T).to(V.dtype)

    probes = budget - count - Q.shape[1]
    rest, stderr = _mean(
        product, column_dots, probes, None, seed, Bar(product, None, False), deflate, OTHER_PROBES * (1 + budget)
    )
    return captured + rest, stderr, sketch


def _xtrace(product: Product, budget: int, sketch: Tensor, seed: int) -> tuple[float, float, Tensor]:
    """Leave-one-out estimates from Omega, Y = A Omega, Z = A Q and matrices of size budget / 2.

    Leaving column i out of Y removes one direction s_i from its range (none if the others span it too), and
    t_i = tr(H) - s_i'H s_i + (omega_i - Q x_i)' A (omega_i - Q x_i),  x_i = (I - s_i s_i') Q' omega_i,  H = Q'AQ.

    The t_i are not independent: omega_j shaped the range that t_i uses, and the other way round. Their spread alone
    misses that covariance, up to half of the variance when the spectrum decays slowly. With h_ij the change of t_i when
    omega_j leaves the range too, Cov(t_i, t_j) is about E[h_ij h_ji], the mean's variance about spread / p + that.
    """
    count = budget // 2
    sketch = _extend_sketch(product, sketch, count, seed)
    Omega = rademacher(product, seed, range(sketch.shape[1]))
    Q, singular, V = _range(sketch, product.eps)
    if not Q.shape[1]:
        return 0.0, 0.0, sketch
    Z = product(Q)
    H = row_gram(Q.T, Z.T).cpu()  # (r, r) Q'AQ
    W = row_gram(Q.T, Omega.T).cpu()  # (r, p) Q'Omega
    T = row_gram(Z.T, Omega.T).cpu()  # (r, p) (AQ)'Omega
    C = singular[:, None] * V.T  # (r, p) Q'A Omega
    S = V.T / singular[:, None]
    S = S / S.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    S = torch.where((V * V).sum(dim=1) > 1 - 1e-8, S, 0.0)
    X = W - S * (S * W).sum(dim=0)
    own = column_dots(Omega, sketch).cpu()
    estimates = H.trace() - (S * (H @ S)).sum(dim=0) + own + (X * (H @ X - T - C)).sum(dim=0)
    value, stderr = _mean_and_error(estimates)
    h = _pair_effects(S, X, H, (H + H.T) @ X - T - C)
    shared = float((h * h.T).sum()) / max(1, count * (count - 1))
    return value, math.sqrt(stderr**2 + max(0.0, shared)), sketch


def _pair_effects(S: Tensor, X: Tensor, H: Tensor, Y: Tensor) -> Tensor:
    """h (p, p): t_i minus the same estimate with column j out of the range as well; zero diagonal.

    Then the unit vector u along s_j - (s_i's_j) s_i is lost too, and t_i changes by
    (a^2 - 1) u'Hu - a u'y_i, a = u'x_i, y_i = (H + H')x_i - (AQ)'omega_i - Q'A omega_i.
    """
    G, K = S.T @ S, S.T @ H @ S
    own = K.diagonal()
    square = (1 - G * G).clamp(min=1e-12)  # ||s_j - (s_i's_j) s_i||^2
    curvature = (own - G * (K + K.T) + G * G * own[:, None]) / square
    a_squared = (X.T @ S) ** 2 / square
    a_times = (X.T @ S) * (Y.T @ S - G * (Y * S).sum(dim=0)[:, None]) / square
    return ((1 - a_squared) * curvature + a_times).fill_diagonal_(0.0)
