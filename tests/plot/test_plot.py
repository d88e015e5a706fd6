"""Plots, by what their artists hold; no picture is compared."""

import subprocess
import sys

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.collections import LineCollection  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from hvpfast import plot  # noqa: E402
from hvpfast.dynamics import stability_threshold  # noqa: E402
from hvpfast.landscape import Line, Plane  # noqa: E402
from hvpfast.probes import density  # noqa: E402


@pytest.fixture
def ax():
    return Figure(figsize=(5, 4)).add_subplot()


def by_label(ax, start):
    return next(line for line in ax.lines if str(line.get_label()).startswith(start))


def drawn(fig):
    """Draw it: ticks, formatters and mathtext run."""
    fig.canvas.draw()


def plane_of(function, n=11, **changes):
    alphas = np.linspace(-1, 1, n)
    losses = function(alphas[None, :], alphas[:, None])  # row: beta
    directions = {"d1": torch.ones(2), "d2": torch.ones(2), "normalise": "filter"}
    fields = {"alphas": alphas, "betas": alphas, "losses": losses, "centre": 1.0, **directions}
    return Plane(**{**fields, **changes})


def test_nothing_is_chosen_or_imported_at_import():
    code = "import sys, hvpfast.plot; assert not any(m.startswith('matplotlib') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install hvpfast\[plot\]"):
        plot.training([0, 1], [1.0, 0.5])


def test_own_figure_and_given_axes(ax, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    fig, own = plot.training([0, 1], [1.0, 0.5])
    assert own.figure is fig
    import matplotlib.pyplot as plt

    plt.close(fig)
    assert plot.training([0, 1], [1.0, 0.5], ax=ax) == (ax.figure, ax)


def test_density(ax):
    values = torch.cat([torch.linspace(-0.1, 0.1, 60), torch.tensor([1.0, 2.0])]).double()
    found = density(torch.diag(values), probes=4, steps=20, seed=0)
    fig, same = plot.density(found, title="spectrum", ax=ax)
    drawn(fig)
    assert same is ax and ax.get_yscale() == "log" and ax.get_title(loc="left") == "spectrum"
    curve = by_label(ax, "density")
    np.testing.assert_allclose(curve.get_xdata(), found.grid)
    floor = ax.get_ylim()[0]
    seen = found.values.numpy() > floor
    np.testing.assert_allclose(curve.get_ydata()[seen], found.values.numpy()[seen])
    nodes = by_label(ax, "Ritz")
    stems = next(c for c in ax.collections if isinstance(c, LineCollection))
    assert len(stems.get_segments()) == len(nodes.get_xdata()) > 0
    assert set(np.round(nodes.get_xdata(), 9)) <= set(np.round(found.nodes.flatten().tolist(), 9))
    for place in (1.0, 2.0):  # both outliers have a stem whose top is at most the curve
        near = np.abs(nodes.get_xdata() - place) < 1e-6
        assert near.any()
        assert (nodes.get_ydata()[near] <= np.interp(place, found.grid, found.values) * 1.01).all()
    assert len(plot.density(found, nodes=False, ax=Figure().add_subplot())[1].lines) == 2
    assert "λ" in ax.get_xlabel() and "1 / unit" in ax.get_ylabel()


def test_plane_draws_alpha_to_the_right_and_beta_up(ax):
    found = plane_of(lambda a, b: 1 + (a + 1) ** 2 * 10 + (b + 1) * 0.1)
    fig, _ = plot.plane(found, path=[(-0.5, 0.5), (0, 0)], ax=ax)
    drawn(fig)
    filled = next(c for c in ax.collections if type(c).__name__ == "QuadContourSet")
    assert filled.norm.vmin == pytest.approx(found.losses.min()) and type(filled.norm).__name__ == "LogNorm"
    corners = {}
    levels = filled.levels
    for level, path in zip(levels, filled.get_paths(), strict=False):
        for x, y in ((-0.97, 0.9), (0.97, -0.9)):
            if path.contains_point((x, y)):
                corners[x] = level
    assert corners[0.97] > corners.get(-0.97, levels[0])  # steep in alpha, which is x
    stars = [line for line in ax.lines if line.get_marker() == "*"]
    assert [tuple(map(float, star.get_xydata()[0])) for star in stars] == [(0.0, 0.0)]
    assert ax.get_aspect() == 1.0
    assert (
        ax.get_xlabel().startswith("α") and "filter-normalised" in ax.get_xlabel() and ax.get_ylabel().startswith("β")
    )
    np.testing.assert_allclose(by_label(ax, "path").get_xydata(), [(-0.5, 0.5), (0, 0)])


def test_plane_with_masked_negative_or_constant_losses():
    rough = plane_of(lambda a, b: np.where(a + b > 1.5, np.nan, a + b))
    fig, ax = plot.plane(rough, ax=Figure().add_subplot())
    drawn(fig)
    filled = next(c for c in ax.collections if type(c).__name__ == "QuadContourSet")
    assert type(filled.norm).__name__ == "Normalize"  # negative losses: no logarithm
    drawn(plot.plane(plane_of(lambda a, b: np.ones_like(a + b)), ax=Figure().add_subplot())[0])


def test_line_with_its_parabola(ax):
    alphas = np.linspace(-1, 1, 21)
    found = Line(alphas, 2 + 0.3 * alphas + 2.5 * alphas**2, torch.ones(1), 2.0, "none")
    fig, _ = plot.line(found, curvature=5.0, ax=ax)
    drawn(fig)
    np.testing.assert_allclose(by_label(ax, "quadratic").get_ydata(), found.losses, atol=1e-9)


def test_sharpness_with_a_threshold_far_above(ax):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    fig, _ = plot.sharpness(
        [0, 1, 2], [0.5, 0.8, 0.4], [-0.2, -0.1, -0.01], threshold=stability_threshold(optimizer), ax=ax
    )
    drawn(fig)
    np.testing.assert_allclose(by_label(ax, "$λ_{max}").get_xydata(), [(0, 0.5), (1, 0.8), (2, 0.4)])
    np.testing.assert_allclose(by_label(ax, "$λ_{min}").get_ydata(), [-0.2, -0.1, -0.01])
    line = by_label(ax, "stability threshold")
    np.testing.assert_allclose(line.get_ydata(), 38)
    assert line.get_label() == r"stability threshold $(2+2\beta)/\eta = 38$"
    assert ax.get_yscale() == "symlog" and ax.get_ylim()[1] > 38 and "logarithmic" in ax.get_ylabel()


def test_sharpness_with_a_threshold_within_reach(ax):
    drawn(plot.sharpness([0, 10], [1.0, 1.9], threshold=2.0, xlabel="step", ax=ax)[0])
    assert ax.get_yscale() == "linear" and ax.get_xlabel() == "step"
    assert by_label(ax, "stability").get_label() == "stability threshold 2"


def test_training(ax):
    fig, _ = plot.training([0, 1, 2], [2.3, 0.4, 0.1], [0.1, 0.9, 0.97], ax=ax)
    drawn(fig)
    right = next(other for other in fig.axes if other is not ax)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2.3, 0.4, 0.1])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [10, 90, 97])
    assert ax.get_yscale() == "log" and right.get_ylabel() == "test accuracy (%)"


def test_eigenvalues(ax):
    fig, _ = plot.eigenvalues(torch.tensor([-0.5, 3.0, 1.0]), residuals=[0.1, 0.2, 0.3], ax=ax)
    drawn(fig)
    np.testing.assert_allclose(by_label(ax, "λ ≥ 0").get_xydata(), [(1, 3), (2, 1)])
    np.testing.assert_allclose(by_label(ax, "λ < 0").get_xydata(), [(3, -0.5)])
