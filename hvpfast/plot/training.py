"""Pictures of a training run: loss and accuracy, and sharpness with the threshold of stability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hvpfast.plot.style import BLUE, GREEN, GREY, LABEL, ORANGE, RED, TICK, axes, labels, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hvpfast.dynamics import Threshold

FAR = 4.0  # a threshold that many times above the curves is drawn on an axis that is logarithmic up there


def sharpness(
    steps: Sequence[float],
    lambda_max: Sequence[float],
    lambda_min: Sequence[float] | None = None,
    *,
    threshold: Threshold | float | None = None,
    xlabel: str = "epoch",
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Ends of the Hessian's spectrum over training, with the threshold of stability and its formula in the legend.

    Args:
        steps, lambda_max, lambda_min: one entry a measurement. threshold: from `hvpfast.dynamics.stability_threshold`,
            or a number. xlabel: what steps count. title: of the plot. ax: drawn in; None makes a figure.

    Returns:
        (fig, ax). The vertical axis is logarithmic away from 0 where the threshold lies far above the curves. Raises
        ImportError without matplotlib.
    """
    fig, ax = axes(ax)
    steps, top = np.asarray(steps, float), np.asarray(lambda_max, float)
    ax.plot(steps, top, "-o", color=BLUE, linewidth=1.8, markersize=5, label="$λ_{max}$")
    shown = [top]
    if lambda_min is not None:
        bottom = np.asarray(lambda_min, float)
        shown.append(bottom)
        ax.plot(steps, bottom, "-s", color=ORANGE, linewidth=1.8, markersize=4.5, label="$λ_{min}$")
    ax.axhline(0, color=GREY, linewidth=0.8)
    name = "eigenvalue of the Hessian"
    if threshold is not None and np.isfinite(float(threshold)):
        value = float(threshold)
        symbol = getattr(threshold, "symbol", "")
        text = f"stability threshold ${symbol} = {value:.4g}$" if symbol else f"stability threshold {value:.4g}"
        ax.axhline(value, color=RED, linewidth=1.5, linestyle=(0, (6, 3)), label=text)
        unit = _far_axis(ax, np.concatenate(shown), value)
        if unit:
            name += f"\n(logarithmic beyond ±{unit:g})"
    _whole_numbers(ax, steps)
    labels(ax, xlabel, name, title)
    legend(ax)
    return fig, ax


def training(
    steps: Sequence[float],
    loss: Sequence[float],
    accuracy: Sequence[float] | None = None,
    *,
    xlabel: str = "epoch",
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Training loss on a logarithmic axis, and test accuracy in per cent on the right one.

    Args:
        steps, loss: one entry a measurement. accuracy: fractions in [0, 1]. xlabel: what steps count.
        title: of the plot. ax: drawn in; None makes a figure.

    Returns:
        (fig, ax), ax the axes of the loss. Raises ImportError without matplotlib.
    """
    fig, ax = axes(ax)
    steps, loss = np.asarray(steps, float), np.asarray(loss, float)
    lines = ax.plot(steps, loss, "-o", color=BLUE, linewidth=1.8, markersize=5, label="training loss")
    finite = loss[np.isfinite(loss)]
    if finite.size and (finite > 0).all() and finite.max() > 3 * finite.min():
        from matplotlib.ticker import LogLocator, NullLocator

        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    labels(ax, xlabel, "training loss", title)
    if accuracy is not None:
        right = ax.twinx()
        lines += right.plot(
            steps,
            100 * np.asarray(accuracy, float),
            "-s",
            color=GREEN,
            linewidth=1.8,
            markersize=4.5,
            label="test accuracy",
        )
        right.set_ylabel("test accuracy (%)", fontsize=LABEL, color=GREEN)
        right.tick_params(labelsize=TICK, color=GREY, labelcolor=GREEN)
        right.spines[["top", "left", "bottom"]].set_visible(False)
        right.spines["right"].set_color(GREY)
        right.set_ylim(0, 102)
        ax.set_ylabel("training loss", fontsize=LABEL, color=BLUE)
        ax.tick_params(axis="y", labelcolor=BLUE)
        legend(ax, handles=lines, loc="center right")
    _whole_numbers(ax, steps)
    return fig, ax


def _far_axis(ax: Axes, shown: np.ndarray, threshold: float) -> float:
    """Logarithmic away from 0 if the threshold would flatten the curves, from the returned value on; else linear (0)."""
    shown = shown[np.isfinite(shown)]
    if not shown.size or threshold <= FAR * max(float(np.abs(shown).max()), 1e-300):
        return 0.0
    from matplotlib.ticker import FixedLocator, NullLocator

    unit = 10.0 ** np.ceil(np.log10(max(float(np.abs(shown).max()), 1e-300) / 10))  # linear up to here
    ax.set_yscale("symlog", linthresh=unit, linscale=1.0)
    low = float(shown.min())
    ax.set_ylim(min(1.6 * low, -0.2 * unit), 2.2 * threshold)
    powers = unit * 10.0 ** np.arange(0, np.ceil(np.log10(threshold / unit)) + 1)
    below = [-p for p in powers if -p >= 1.6 * low] + ([-unit / 2] if -unit < low < 0 else [])
    ax.yaxis.set_major_locator(FixedLocator(sorted([*below, 0, *powers])))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return unit


def _whole_numbers(ax: Axes, steps: np.ndarray) -> None:
    if steps.size and (steps == np.round(steps)).all():
        ax.xaxis.get_major_locator().set_params(integer=True)
