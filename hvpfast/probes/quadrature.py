"""Stochastic Lanczos quadrature: spectral density, log-determinant, counts of eigenvalues.

Lanczos from a unit vector v gives nodes theta and weights w, a Gauss rule for v's spectral measure:
sum w theta^k = v' A^k v for k <= 2 steps - 1, sum w = 1. Averaged over random signs v it is the spectrum's.
Sources: Golub & Welsch 1969; Ubaru, Chen & Saad, SIAM J. Matrix Anal. 38 (2017); Lin, Saad & Yang,
SIAM Review 58 (2016).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvpfast.autocast import full_precision
from hvpfast.ops import reorthogonalize
from hvpfast.ops.shared import column_dots

from .krylov import BREAKDOWN
from .product import COLUMNS, Bar, Product, rademacher, require_count
from .results import Density, Estimate, Inertia

BASIS_BYTES = 2 << 30  # memory for reorthogonalisation; if one probe's basis does not fit, there is none
DENSE = 2048  # largest n for which exact answers go through a dense (n, n) eigenproblem


@full_precision
def density(
    A,
    *,
    probes: int = 8,
    steps: int = 64,
    seed: int = 0,
    grid: int | Tensor = 1024,
    width: float | None = None,
    progress: bool = False,
) -> Density:
    """Spectral density of a symmetric A: Gauss rules of `probes` random vectors, broadened by Gaussians.

    All probes' recurrences run together, so a step is one product with up to 8 columns. Vectors are fully
    reorthogonalised while a probe's basis (steps, n) fits in 2 GiB, fewer probes at a time if need be; beyond that not
    at all: nodes then repeat ("ghosts"), with weights that still add up rightly.

    Args:
        A: symmetric (n, n). probes: at least 1 (one leaves the standard error NaN). steps: nodes per probe.
        grid: number of points, laid 6 widths beyond the nodes, or the points (ascending) themselves.
        width: standard deviation of the Gaussians; default 1 % of the span of the nodes. The nodes themselves do not
            depend on it.
        seed: same seed, same probes, on any device.

    Returns:
        Density. On a default grid `values` integrate to 1 (trapezoid); given points get the plain sum of Gaussians.
        `stderr` is across probes; it does not contain the finite resolution of `steps` nodes. A probe whose Krylov
        space ends early has fewer nodes: the places left repeat its last node with weight 0.

    Raises:
        ValueError: sizes out of range, a grid too coarse for the width, A not square or (seen while
        reorthogonalising) not symmetric. FloatingPointError: NaN or inf in a product.
    """
    product = Product(A, "density")
    require_count("density", "probes", probes, 1)
    require_count("density", "steps", steps, 1)
    if width is not None and not width > 0:
        raise ValueError(f"density: width={width!r}; needs a number > 0, or None for 1 % of the span of the nodes")
    given = not isinstance(grid, int)
    if given:
        grid = torch.as_tensor(grid, dtype=torch.float64).cpu()
        if grid.ndim != 1 or grid.numel() == 0:
            raise ValueError(f"density: grid has shape {tuple(grid.shape)}; needs points (g,) or their number")
    else:
        require_count("density", "grid", grid, 2)
    nodes, weights = quadrature(product, probes, steps, seed, progress)
    low, high = float(nodes.min()), float(nodes.max())
    if width is None:
        width = 0.01 * (high - low) or 0.01 * (abs(high) or 1.0)
    if not given:
        points = grid
        grid = torch.linspace(low - 6 * width, high + 6 * width, points, dtype=torch.float64)
        spacing = float(grid[1] - grid[0])
        if spacing > width:
            need = math.ceil((high - low) / width) + 14
            raise ValueError(
                f"density: {points} points lie {spacing:.3g} apart, width={width:.3g}; needs grid >= {need}"
            )
    curves = torch.stack(
        [_gaussians(grid, *rule, width) for rule in zip(nodes, weights, strict=True)]
    )  # (probes, points)
    if not given:
        curves /= torch.trapezoid(curves, grid)[:, None]
    stderr = curves.std(dim=0) / math.sqrt(probes) if probes > 1 else torch.full_like(grid, math.nan)
    return Density(grid, curves.mean(dim=0), stderr, nodes, weights, product.matvecs, float(width), seed)


@full_precision
def logdet(
    A, *, damping: float = 0.0, probes: int = 8, steps: int = 64, seed: int = 0, progress: bool = False
) -> Estimate:
    """log det(A + damping I) of a symmetric A with A + damping I positive definite, with its standard error.

    n times the mean of sum w log(theta + damping) over the probes' Gauss rules. The standard error is across probes;
    the rule's own error falls geometrically with `steps` at a rate set by the condition number of A + damping I, and
    is not in it. Exact (dense, standard error 0) if probes * steps >= n and n <= 2048.

    Args:
        A: symmetric (n, n). damping: added to every eigenvalue. probes: at least 2. steps: products per probe.

    Raises:
        ValueError: a node plus damping is not positive (the message says how much damping is needed).
    """
    product = Product(A, "logdet")
    require_count("logdet", "probes", probes, 2, "for a standard error")
    require_count("logdet", "steps", steps, 1)
    n = product.n
    exact = probes * steps >= n and n <= DENSE
    if exact:
        nodes = torch.linalg.eigvalsh(product.dense())[None]
        weights = torch.full_like(nodes, 1 / n)
    else:
        nodes, weights = quadrature(product, probes, steps, seed, progress)
    least = float(nodes[weights > 0].min())
    if not least + damping > 0:
        raise ValueError(
            f"logdet: A has {'an eigenvalue' if exact else 'a Ritz value'} of {least:.6g}, with damping={damping:g}; "
            f"needs A + damping I positive definite; use a damping above {max(0.0, -least):.6g}"
        )
    per_probe = n * (weights * torch.where(weights > 0, nodes + damping, 1.0).log()).sum(dim=1)
    stderr = 0.0 if exact else float(per_probe.std() / math.sqrt(probes))
    return Estimate(float(per_probe.mean()), stderr, product.matvecs, "exact" if exact else "quadrature", seed)


@full_precision
def inertia(
    A,
    *,
    rtol: float | None = None,
    probes: int = 8,
    steps: int = 64,
    seed: int = 0,
    dense_limit: int = DENSE,
    progress: bool = False,
) -> Inertia:
    """How many eigenvalues of a symmetric A are negative, near zero, positive (the Morse index of a critical point).

    Near zero means |lambda| <= rtol * max|lambda|; the default rtol is 10 sqrt(n) eps of the dtype A multiplies in.
    Up to n = dense_limit (2048) the counts are exact: n products, a dense eigenproblem. Above, they are n times the
    weights of the quadrature nodes on each side, with standard errors across probes. A node stands for all the
    eigenvalues around it, so eigenvalues closer to the threshold than the nodes' spacing are counted on either side.

    Args:
        A: symmetric (n, n). probes, steps: of the estimate, probes >= 2. dense_limit: largest n done exactly.

    Returns:
        Inertia: integers when exact, floats with `stderr` otherwise.
    """
    product = Product(A, "inertia")
    n = product.n
    require_count("inertia", "probes", probes, 2, "for a standard error")
    require_count("inertia", "steps", steps, 1)
    if rtol is None:
        rtol = min(10 * math.sqrt(n) * product.product_eps, 0.1)
    exact = n <= dense_limit
    if exact:
        nodes = torch.linalg.eigvalsh(product.dense())[None]
        weights = torch.full_like(nodes, 1 / n)
    else:
        nodes, weights = quadrature(product, probes, steps, seed, progress)
    threshold = rtol * float(nodes.abs().max())
    sides = (nodes < -threshold, nodes.abs() <= threshold, nodes > threshold)
    if exact:
        negative, zero, positive = (int(side.sum()) for side in sides)
        return Inertia(negative, zero, positive, (0.0, 0.0, 0.0), threshold, True, product.matvecs, seed)
    counts = torch.stack([n * (weights * side).sum(dim=1) for side in sides])  # (3, probes)
    stderr = tuple((counts.std(dim=1) / math.sqrt(probes)).tolist())
    return Inertia(*counts.mean(dim=1).tolist(), stderr, threshold, False, product.matvecs, seed)


def quadrature(product: Product, probes: int, steps: int, seed: int, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Nodes and weights (probes, steps), float64 on the CPU, of the probes' Gauss rules."""
    used = min(steps, product.n)
    column_bytes = used * product.n * torch.finfo(product.dtype).bits // 8
    fits = BASIS_BYTES // column_bytes
    together = min(COLUMNS, fits) if fits else COLUMNS
    nodes = torch.zeros(probes, steps, dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    with Bar(product, probes * used, progress) as bar:
        for first in range(0, probes, together):
            indices = range(first, min(first + together, probes))
            starts = rademacher(product, seed, indices) / math.sqrt(product.n)
            rules = _recurrences(product, starts, used, fits > 0, bar)
            for index, (alphas, betas) in zip(indices, rules, strict=True):
                T = alphas.diag() + betas.diag(1) + betas.diag(-1)
                theta, S = torch.linalg.eigh(T)
                nodes[index] = theta[-1]
                nodes[index, : theta.numel()] = theta
                weights[index, : theta.numel()] = S[0] ** 2
    return nodes, weights


def _recurrences(product: Product, V: Tensor, steps: int, orthogonalise: bool, bar: Bar) -> list[tuple[Tensor, Tensor]]:
    """Lanczos from each unit column of V (n, c), together: alphas (m,) and betas (m - 1,) of each, m <= steps."""
    n, c = V.shape
    v = V.T.contiguous()  # one row a probe that is still going
    basis = torch.empty(c, steps, n, dtype=v.dtype, device=v.device) if orthogonalise else None
    previous, last_beta = torch.zeros_like(v), torch.zeros(c, dtype=torch.float64)
    scale = torch.zeros(c, dtype=torch.float64)
    going = list(range(c))
    alphas: list[list[float]] = [[] for _ in range(c)]
    betas: list[list[float]] = [[] for _ in range(c)]
    for step in range(steps):
        w = product(v.T).T.contiguous()
        scale[going] = torch.maximum(scale[going], torch.linalg.vector_norm(w, dim=1, dtype=torch.float64).cpu())
        alpha = column_dots(v.T, w.T).cpu()
        w -= alpha.to(w)[:, None] * v + last_beta.to(w)[:, None] * previous
        if basis is not None:
            strays = []
            for row, probe in enumerate(going):
                basis[probe, step] = v[row]
                w[row], stray, _ = reorthogonalize(w[row], basis[probe, : step + 1])
                strays.append(stray.abs().max())
            product.require_symmetric(float(torch.stack(strays).max()), float(scale.max()))
        beta = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64).cpu()
        for row, probe in enumerate(going):
            alphas[probe].append(float(alpha[row]))
            betas[probe].append(float(beta[row]))
        bar.update()
        alive = beta > BREAKDOWN * product.eps * scale[going]
        if not bool(alive.any()):
            break
        going = [probe for probe, lives in zip(going, alive.tolist(), strict=True) if lives]
        mask = alive.to(v.device)
        last_beta = beta[alive]
        previous, v = v[mask], w[mask] / last_beta.to(w)[:, None]
    tensors = (torch.tensor(alphas[i], dtype=torch.float64) for i in range(c))
    return [(a, torch.tensor(betas[i][: a.numel() - 1], dtype=torch.float64)) for i, a in enumerate(tensors)]


def _gaussians(grid: Tensor, nodes: Tensor, weights: Tensor, width: float) -> Tensor:
    """Sum over nodes of weight * N(grid; node, width^2)."""
    z = (grid[:, None] - nodes) / width
    return torch.exp(-0.5 * z * z) @ weights / (width * math.sqrt(2 * math.pi))
