"""Pictures of spectra: the density, and single eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hvpfast.plot.style import BLUE, GREY, INK, ORANGE, axes, labels, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hvpfast.probes import Density


def density(
    found: Density, *, nodes: bool = True, title: str | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Spectral density on a logarithmic axis, with its standard error as a band and the Ritz nodes as stems.

    A stem's height is the peak of the Gaussian that its node contributes, so stems and curve share one unit.

    Args:
        found: from `hvpfast.density`. nodes: draw the stems. title: of the plot. ax: drawn in; None makes a figure.

    Returns:
        (fig, ax). Raises ImportError without matplotlib.
    """
    fig, ax = axes(ax)
    grid, values = _array(found.grid), _array(found.values)
    heights = np.zeros(0)
    probes = found.nodes.shape[0]
    if found.width > 0:
        heights = _array(found.weights).ravel() / (probes * found.width * np.sqrt(2 * np.pi))
    places = _array(found.nodes).ravel()[: heights.size]
    floor, ceiling = _range(values)
    if nodes and heights.size:
        seen = heights > floor
        ax.vlines(places[seen], floor, heights[seen], color=ORANGE, linewidth=0.6, alpha=0.3)
        ax.plot(places[seen], heights[seen], "o", color=ORANGE, markersize=2.2, alpha=0.6, label="Ritz nodes")
    spread = _array(found.stderr)
    tiny = floor * 1e-6  # below the axis: a logarithm needs something there
    if probes > 1 and np.isfinite(spread).all():
        low, high = np.clip(values - spread, tiny, None), np.clip(values + spread, tiny, None)
        ax.fill_between(grid, low, high, color=BLUE, alpha=0.25, linewidth=0, label="± standard error")
    ax.plot(grid, np.clip(values, tiny, None), color=BLUE, linewidth=1.7, label=f"density ({probes} probes)")
    ax.set_yscale("log")
    ax.set_ylim(floor, ceiling)
    ax.set_xlim(grid.min(), grid.max())
    ax.axvline(0, color=GREY, linewidth=0.8, linestyle=(0, (2, 3)))
    labels(ax, "eigenvalue λ", "density (1 / unit of λ)", title)
    legend(ax)
    return fig, ax


def eigenvalues(
    values: Sequence[float],
    *,
    residuals: Sequence[float] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Eigenvalues as stems over their rank, largest first; negative ones in another colour.

    Args:
        values: tensor or sequence, (k,). residuals: ||A v - value v||, (k,), drawn as error bars: each holds an
            eigenvalue. title: of the plot. ax: drawn in; None makes a figure.

    Returns:
        (fig, ax). Raises ImportError without matplotlib.
    """
    fig, ax = axes(ax)
    values = _array(values)
    order = np.argsort(-values, kind="stable")
    values = values[order]
    ranks = np.arange(1, values.size + 1)
    for chosen, colour, name in ((values >= 0, BLUE, "λ ≥ 0"), (values < 0, ORANGE, "λ < 0")):
        if chosen.any():
            ax.vlines(ranks[chosen], 0, values[chosen], color=colour, linewidth=1.6, alpha=0.6)
            ax.plot(ranks[chosen], values[chosen], "o", color=colour, markersize=5, label=name)
    if residuals is not None:
        ax.errorbar(ranks, values, yerr=_array(residuals)[order], fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    labels(ax, "rank", "eigenvalue λ", title)
    if (values < 0).any() and (values >= 0).any():
        legend(ax)
    return fig, ax


def _range(values: np.ndarray) -> tuple[float, float]:
    """Vertical limits: from well under the lowest peak, which is about one eigenvalue, to over the highest."""
    top = float(values.max())
    inner = values[1:-1]
    peaks = inner[(inner >= values[:-2]) & (inner > values[2:]) & (inner > top * 1e-12)]
    lowest = float(peaks.min()) if peaks.size else top
    return 10.0 ** np.floor(np.log10(min(lowest / 30, top / 1e3))), top * 4


def _array(x: object) -> np.ndarray:
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    return np.asarray(x, dtype=np.float64)
