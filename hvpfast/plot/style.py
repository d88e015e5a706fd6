"""Colours and axes that all plots share. Nothing here is global: no style sheet, no backend, no `plt.show()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY, INK = "#2f5d8a", "#d9822b", "#4f8a5b", "#b5403a", "#8a8f98", "#22272e"
COLOURS = (BLUE, ORANGE, GREEN, RED, GREY)
LABEL, TICK, LEGEND = 11, 10, 9.5


def axes(ax: Axes | None, size: tuple[float, float] = (6.4, 4.0)) -> tuple[Figure, Axes]:
    """The figure and axes to draw in: those given, or new ones from pyplot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if ax is None:
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError(
                f"hvpfast.plot needs matplotlib ({error}); install it with `pip install hvpfast[plot]`"
            ) from error
        _, ax = plt.subplots(figsize=size, layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(labelsize=TICK, color=GREY, labelcolor=INK)
    ax.set_axisbelow(True)
    ax.grid(True, color="#e3e6ea", linewidth=0.8)
    return ax.figure, ax


def labels(ax: Axes, x: str, y: str, title: str | None = None) -> None:
    """Label both axes, and the plot where a title is given."""
    ax.set_xlabel(x, fontsize=LABEL, color=INK)
    ax.set_ylabel(y, fontsize=LABEL, color=INK)
    if title:
        ax.set_title(title, fontsize=LABEL + 1, color=INK, loc="left", pad=10)


def legend(ax: Axes, **options: object) -> None:
    """A legend without a box's weight."""
    ax.legend(fontsize=LEGEND, frameon=True, framealpha=0.9, edgecolor="#d5d9de", labelcolor=INK, **options)
