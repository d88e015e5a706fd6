"""What the probes return: frozen records that print as one line and turn into plain dictionaries."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor


def _plain(value):
    """Tensors to nested lists, NaN to None, so that json.dumps takes the answer."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Result:
    """Shared by the records below: `summary`, `repr` and `to_dict`."""

    def summary(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"

    def to_dict(self) -> dict:
        """The fields as numbers, strings, lists and None (for NaN): what `json.dumps` takes."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


@dataclass(frozen=True, eq=False, repr=False)
class Eigs(Result):
    """Eigenpairs.

    values (k,) float64; vectors (n, k) orthonormal columns in the working dtype; residuals (k,) float64, the true
    ||A v - value v||; pairs_converged (k,) bool; converged: every pair is, and completeness was not left open;
    verified: True if missed copies of wanted eigenvalues were ruled out, False if the budget ended before that,
    None if nobody asked; matvecs: columns multiplied, everything included.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    matvecs: int
    pairs_converged: Tensor
    verified: bool | None = None
    which: str = "LA"
    seed: int = 0

    def summary(self) -> str:
        shown = [f"{value:.6g}" for value in self.values.tolist()]
        if len(shown) > 6:
            shown = [*shown[:3], "...", *shown[-2:]]
        state = "converged" if self.converged else "NOT converged"
        return (
            f"{self.which}: {', '.join(shown)}; worst residual {float(self.residuals.max()):.2g}, {state}, "
            f"{self.matvecs} matvecs"
        )

    def to_dict(self, *, vectors: bool = False) -> dict:
        """As every result's; the (n, k) vectors only on request."""
        plain = {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name != "vectors"
        }
        if vectors:
            plain["vectors"] = _plain(self.vectors)
        return plain


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Result):
    """A number, or an (n,) tensor, with its standard error (one standard deviation of the estimator; 0 if exact)."""

    value: float | Tensor
    stderr: float | Tensor
    matvecs: int
    method: str = ""
    seed: int = 0

    def __float__(self) -> float:
        return float(self.value)

    def summary(self) -> str:
        how = f"{self.method}, {self.matvecs} matvecs, seed {self.seed}"
        if isinstance(self.value, Tensor):
            shape = tuple(self.value.shape)
            return f"value {shape}, median standard error {float(self.stderr.median()):.3g}; {how}"
        return f"{self.value:.6g} +/- {self.stderr:.2g}; {how}"


@dataclass(frozen=True, eq=False, repr=False)
class Density(Result):
    """Spectral density of A, total mass 1.

    grid (points,); values (points,) per unit of eigenvalue; stderr (points,) across probes (NaN for one probe);
    nodes, weights (probes, steps): each probe's Gauss rule, weights of a probe sum to 1, unused places have weight 0;
    width: standard deviation of the Gaussians that broaden the nodes. All float64 on the CPU.
    """

    grid: Tensor
    values: Tensor
    stderr: Tensor
    nodes: Tensor
    weights: Tensor
    matvecs: int
    width: float = 0.0
    seed: int = 0

    def cdf(self, points) -> Tensor:
        """Share of the spectrum at or below each point, from the nodes (not broadened), averaged over the probes."""
        points = torch.as_tensor(points, dtype=torch.float64)
        below = self.nodes.reshape(-1) <= points.reshape(-1, 1)  # (points, probes * steps)
        share = below.double() @ self.weights.reshape(-1) / self.nodes.shape[0]
        return share.reshape(points.shape)

    def moment(self, power: int) -> Estimate:
        """tr(A^power) / n with its standard error; free of quadrature error for power <= 2 * steps - 1."""
        per_probe = (self.weights * self.nodes**power).sum(dim=1)
        probes = per_probe.numel()
        stderr = float(per_probe.std() / probes**0.5) if probes > 1 else math.nan
        return Estimate(float(per_probe.mean()), stderr, self.matvecs, "quadrature", self.seed)

    def summary(self) -> str:
        probes, steps = self.nodes.shape
        low, high = float(self.nodes.min()), float(self.nodes.max())
        return f"{probes} probes x {steps} steps, nodes in [{low:.4g}, {high:.4g}], {self.matvecs} matvecs"


@dataclass(frozen=True, eq=False, repr=False)
class Inertia(Result):
    """Counts of eigenvalues below -threshold, within it, and above it; integers and stderr 0 when exact."""

    negative: float
    zero: float
    positive: float
    stderr: tuple[float, float, float]
    threshold: float
    exact: bool
    matvecs: int
    seed: int = 0

    def summary(self) -> str:
        if self.exact:
            counts = f"negative {self.negative}, near zero {self.zero}, positive {self.positive}; exact"
        else:
            counts = (
                f"negative {self.negative:.1f} +/- {self.stderr[0]:.2g}, near zero {self.zero:.1f} +/- "
                f"{self.stderr[1]:.2g}, positive {self.positive:.1f} +/- {self.stderr[2]:.2g}; estimated"
            )
        return f"{counts}, threshold {self.threshold:.2g}, {self.matvecs} matvecs"


@dataclass(frozen=True, eq=False, repr=False)
class Solution(Result):
    """x with (A + damping I) x = b.

    x shaped like b, in the working dtype; residual: the true ||b - (A + damping I) x|| / ||b||, a float for b (n,), a
    (K,) float64 tensor for b (n, K); iterations: of the slowest column; converged: every residual <= tol.
    """

    x: Tensor
    residual: float | Tensor
    iterations: int
    converged: bool
    matvecs: int = 0
    damping: float = 0.0

    def summary(self) -> str:
        worst = float(self.residual.max()) if isinstance(self.residual, Tensor) else self.residual
        state = "converged" if self.converged else "NOT converged"
        return f"x {tuple(self.x.shape)}, relative residual {worst:.2g}, {self.iterations} iterations, {state}"
