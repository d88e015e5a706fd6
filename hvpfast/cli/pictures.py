"""The demo's pictures, drawn without pyplot: no window, no backend chosen."""

from __future__ import annotations

from pathlib import Path

DPI = 130


def new_axes(width: float = 6.4, height: float = 4.0):
    """Axes of a figure that pyplot does not know of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def draw(rows: list[dict], threshold, density, plane, out: Path) -> dict[str, str]:
    """Write the PNGs; returns their file names by subject."""
    from hvpfast import plot

    epochs = [row["epoch"] for row in rows]
    drawn = {
        "training": plot.training(
            epochs,
            [row["loss"] for row in rows],
            [row["test_accuracy"] for row in rows],
            title="Training",
            ax=new_axes(),
        ),
        "sharpness": plot.sharpness(
            epochs,
            [row["lambda_max"] for row in rows],
            [row["lambda_min"] for row in rows],
            threshold=threshold,
            title="Sharpness over training",
            ax=new_axes(),
        ),
        "density": plot.density(density, title="Spectral density of the Hessian", ax=new_axes()),
        "landscape": plot.plane(plane, title="Loss around the trained network", ax=new_axes(5.8, 4.8)),
    }
    names = {}
    for subject, (fig, _) in drawn.items():
        names[subject] = f"{subject}.png"
        fig.savefig(out / names[subject], dpi=DPI)
    return names
