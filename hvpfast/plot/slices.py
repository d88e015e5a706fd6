"""Pictures of the loss: over a plane, and along a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hvpfast.plot.style import BLUE, INK, LABEL, ORANGE, TICK, axes, labels, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hvpfast.landscape import Line, Plane

_AXIS = {
    "filter": "direction {} (filter-normalised)",
    "layer": "direction {} (layer-normalised)",
    "global": "direction {} (in units of ‖θ‖)",
    "none": "direction {}",
}


def plane(
    found: Plane,
    *,
    log: bool = True,
    levels: int = 24,
    path: Sequence[Sequence[float]] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Filled contours of the loss over a plane; a star marks the parameters, cells without a finite loss stay grey.

    Args:
        found: from `hvpfast.landscape.plane`; `losses[j, i]` is drawn at x = alphas[i], y = betas[j].
        log: levels and colours by the logarithm of the loss, where all losses are positive. levels: how many.
        path: (alpha, beta) points of a trajectory, drawn over it. title: of the plot. ax: drawn in; None makes one.

    Returns:
        (fig, ax). Raises ImportError without matplotlib.
    """
    fig, ax = axes(ax, (5.8, 4.8))
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator

    ax.grid(False)
    ax.set_facecolor("#d5d9de")
    losses = np.ma.masked_invalid(found.losses)
    low, high = float(losses.min()), float(losses.max())
    if not high > low:
        high = low + max(abs(low), 1.0) * 1e-6
    log = log and low > 0
    edges = np.geomspace(low, high, levels) if log else np.linspace(low, high, levels)
    edges[0], edges[-1] = low, high  # so that rounding leaves no cell out
    norm = LogNorm(low, high) if log else Normalize(low, high)
    filled = ax.contourf(found.alphas, found.betas, losses, levels=edges, norm=norm, cmap="YlGnBu_r")
    ax.contour(found.alphas, found.betas, losses, levels=edges[2::3], colors="white", linewidths=0.5, alpha=0.6)
    if path is not None:
        points = np.asarray(path, dtype=np.float64)
        ax.plot(points[:, 0], points[:, 1], "-o", color=ORANGE, linewidth=1.2, markersize=3, label="path")
    ax.plot([0], [0], marker="*", color="#f4b942", markeredgecolor=INK, markersize=15, linestyle="none")
    halo = [withStroke(linewidth=2, foreground=INK, alpha=0.6)]
    ax.annotate(
        f"{found.centre:.3g}",
        (0, 0),
        (9, 7),
        textcoords="offset points",
        fontsize=TICK,
        color="white",
        path_effects=halo,
    )
    ax.set_aspect("equal")
    bar = fig.colorbar(filled, ax=ax, shrink=0.92, pad=0.02)
    ticks = _log_ticks(low, high) if log else MaxNLocator(6).tick_values(low, high)
    bar.set_ticks([tick for tick in ticks if low <= tick <= high])
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=TICK, labelcolor=INK)
    bar.set_label("loss" + (", logarithmic" if log else ""), fontsize=LABEL, color=INK)
    bar.outline.set_visible(False)
    name = _AXIS.get(found.normalise, _AXIS["none"])
    labels(ax, "α, " + name.format("1"), "β, " + name.format("2"), title)
    return fig, ax


def line(
    found: Line, *, curvature: float | None = None, title: str | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """The loss along a line, with the parabola of a given curvature through the parameters.

    Args:
        found: from `hvpfast.landscape.line`. curvature: d'Hd; the parabola also takes the slope measured at 0.
        title: of the plot. ax: drawn in; None makes a figure.

    Returns:
        (fig, ax). Raises ImportError without matplotlib.
    """
    fig, ax = axes(ax)
    ax.plot(found.alphas, found.losses, color=BLUE, linewidth=1.9, label="loss")
    if curvature is not None:
        slope = float(np.interp(0, found.alphas, np.gradient(found.losses, found.alphas)))
        parabola = found.centre + slope * found.alphas + 0.5 * curvature * found.alphas**2
        view = ax.get_ylim()
        ax.plot(found.alphas, parabola, color=ORANGE, linewidth=1.5, linestyle=(0, (4, 2)), label="quadratic model")
        ax.set_ylim(view)
        legend(ax)
    ax.plot([0], [found.centre], marker="*", color="#f4b942", markeredgecolor=INK, markersize=13, linestyle="none")
    labels(ax, "α, " + _AXIS.get(found.normalise, _AXIS["none"]).format("").replace("  ", " "), "loss", title)
    return fig, ax


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers: few a decade where the range is wide, more where it is narrow."""
    decades = np.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1.2 else (1, 2, 5) if decades < 3 else (1,)
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    ticks = [step * 10.0**e for e in range(first, last + 1) for step in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 2 else list(np.geomspace(low, high, 5))
