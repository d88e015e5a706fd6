"""The loss along a line and over a plane through the parameters (Li et al. 2018, arXiv:1712.09913)."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hvpfast.capture.problem import chosen_parameters
from hvpfast.landscape.directions import NORMALISATIONS, Direction, flat, named, normalised, random_pair
from hvpfast.landscape.evaluate import DataLoss, evaluating


@dataclass(frozen=True, eq=False, repr=False)
class Line:
    """L(theta + alpha d) on a grid.

    Attributes:
        alphas: (steps,). losses: (steps,), NaN where the loss was not finite. d: (P,), the direction as it was used.
        centre: the loss at alpha = 0. normalise: how d was scaled. seed: of a random d, else None.
    """

    alphas: np.ndarray
    losses: np.ndarray
    d: Tensor
    centre: float
    normalise: str
    seed: int | None = None

    @property
    def mask(self) -> np.ndarray:
        """True where the loss was NaN or inf."""
        return ~np.isfinite(self.losses)

    def __repr__(self) -> str:
        return (
            f"Line({self.alphas.size} points in [{self.alphas[0]:.4g}, {self.alphas[-1]:.4g}], {_range(self.losses)})"
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write every field into one .npz file."""
        np.savez_compressed(
            path,
            alphas=self.alphas,
            losses=self.losses,
            d=_array(self.d),
            centre=self.centre,
            normalise=self.normalise,
            seed=-1 if self.seed is None else self.seed,
        )


@dataclass(frozen=True, eq=False, repr=False)
class Plane:
    """L(theta + alpha d1 + beta d2) on a grid.

    Attributes:
        alphas, betas: (steps,). losses: (steps, steps), `losses[j, i]` at `(alphas[i], betas[j])`: a row is a beta, as
            matplotlib draws it; NaN where the loss was not finite. d1, d2: (P,), the directions as they were used.
        centre: the loss at (0, 0). normalise: how they were scaled. seed: of random directions, else None.
    """

    alphas: np.ndarray
    betas: np.ndarray
    losses: np.ndarray
    d1: Tensor
    d2: Tensor
    centre: float
    normalise: str
    seed: int | None = None

    @property
    def mask(self) -> np.ndarray:
        """True where the loss was NaN or inf."""
        return ~np.isfinite(self.losses)

    @property
    def cosine(self) -> float:
        """Of the angle between d1 and d2; 0 for random directions."""
        d1, d2 = self.d1.double(), self.d2.double()
        return float(d1 @ d2 / (d1.norm() * d2.norm()))

    def __repr__(self) -> str:
        return f"Plane({self.alphas.size} x {self.betas.size} points, {self.normalise}, {_range(self.losses)})"

    def save(self, path: str | os.PathLike) -> None:
        """Write every field into one .npz file."""
        np.savez_compressed(
            path,
            alphas=self.alphas,
            betas=self.betas,
            losses=self.losses,
            d1=_array(self.d1),
            d2=_array(self.d2),
            centre=self.centre,
            normalise=self.normalise,
            seed=-1 if self.seed is None else self.seed,
        )


def line(
    model: nn.Module,
    loss: object,
    data: object,
    direction: Direction | None = None,
    *,
    params: object = None,
    normalise: str | None = None,
    extent: float | tuple[float, float] = 1.0,
    steps: int = 51,
    seed: int = 0,
    progress: bool | Callable = False,
) -> Line:
    """The loss along one direction: `L(theta + alpha d)`.

    The second derivative at 0 is d'Hd. The model is left as it was, whatever happens.

    Args:
        model, loss, data, params: as for `hvpfast.Hessian`; these parameters are moved.
        direction: flat (P,), tensors by name, or a sequence of tensors; None draws one at random.
        normalise, extent, steps, seed, progress: as for `plane`.

    Returns:
        Line. Raises what `plane` raises.
    """
    params = _params(model, params, "line")
    scale = _scale(normalise, direction is None)
    if direction is None:
        d = random_pair(params, scale, seed, count=1)[0]
    else:
        d = normalised(named(direction, params), params, scale)
    alphas = _grid(extent, steps, "line")
    with evaluating(model):
        total = DataLoss(model, loss, data, "line")
        centre = _centre(total, "line")
        losses = np.array([total.at(_moved(params, d, a)) for a in _bar(alphas, progress, "line")])
    return Line(alphas, _masked(losses, "line"), flat(d), centre, scale, seed if direction is None else None)


def plane(
    model: nn.Module,
    loss: object,
    data: object,
    *,
    params: object = None,
    directions: tuple[Direction, Direction] | None = None,
    normalise: str | None = None,
    extent: float | tuple[float, float] = 1.0,
    steps: int = 21,
    seed: int = 0,
    progress: bool | Callable = False,
) -> Plane:
    """The loss over a two-dimensional slice, `L(theta + alpha d1 + beta d2)`.

    Nothing of the model is changed: its parameters are replaced in the call, not written; buffers, modes, random state
    and `.grad` are as before, also after an exception. Cells whose loss is not finite become NaN, with one warning.

    Args:
        model, loss, data, params: as for `hvpfast.Hessian`; these parameters are moved.
        directions: two directions, each a flat (P,) tensor (an eigenvector, say), tensors by name, or a sequence of
            tensors; they are not made orthogonal. None: random, orthogonal ones.
        normalise: "filter" (default for random directions), "layer", "global" or "none" (default for given ones); see
            `hvpfast.landscape.normalised`. With "filter" and "layer", biases and norm layers are not moved.
        extent: the grid runs over [-extent, extent] in both axes, or over [low, high].
        steps: points an axis; odd, so that (0, 0) is a cell, if extent is one number.
        seed: of random directions. progress: True for a bar, or a callable that wraps an iterable, like tqdm.

    Returns:
        Plane, with `losses[j, i]` the loss at `(alphas[i], betas[j])`.

    Raises:
        ValueError: a direction or a grid that does not fit. FloatingPointError: the loss at (0, 0) is not finite.
        hvpfast.capture.errors.StateError: dropout is active, or a large loader gives other batches in every pass.
    """
    params = _params(model, params, "plane")
    scale = _scale(normalise, directions is None)
    if directions is None:
        d1, d2 = random_pair(params, scale, seed)
    else:
        if isinstance(directions, (Tensor, Mapping)) or len(directions) != 2:
            raise ValueError(
                "plane: directions must be a pair (d1, d2), each a flat tensor, a dict or a sequence of tensors"
            )
        d1, d2 = (normalised(named(each, params), params, scale) for each in directions)
    alphas = _grid(extent, steps, "plane")
    losses = np.empty((steps, steps))
    with evaluating(model):
        total = DataLoss(model, loss, data, "plane")
        centre = _centre(total, "plane")
        cells = [(j, i) for j in range(steps) for i in range(steps)]
        row, base = None, params
        for j, i in _bar(cells, progress, "plane"):
            if j != row:
                row, base = j, _moved(params, d2, alphas[j])
            losses[j, i] = total.at(_moved(base, d1, alphas[i]))
    losses = _masked(losses, "plane")
    return Plane(alphas, alphas.copy(), losses, flat(d1), flat(d2), centre, scale, seed if directions is None else None)


def _params(model: nn.Module, params: object, who: str) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in chosen_parameters(model, params, who).items()}


def _scale(normalise: str | None, drawn: bool) -> str:
    if normalise is None:
        return "filter" if drawn else "none"
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise: got {normalise!r}; it must be one of {', '.join(NORMALISATIONS)}")
    return normalise


def _grid(extent: float | tuple[float, float], steps: int, who: str) -> np.ndarray:
    """Grid points; a symmetric grid is exactly symmetric, with an exact 0 in the middle if `steps` is odd."""
    if not isinstance(steps, int) or steps < 2:
        raise ValueError(f"{who}: steps is {steps!r}; it must be an integer of at least 2")
    if isinstance(extent, (tuple, list)):
        low, high = (float(x) for x in extent)
    else:
        low, high = -float(extent), float(extent)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{who}: extent is {extent!r}; it must be a positive number or a pair (low, high)")
    if low == -high:
        return high * (2 * np.arange(steps) - (steps - 1)) / (steps - 1)
    return np.linspace(low, high, steps)


def _centre(total: DataLoss, who: str) -> float:
    value = total.here()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{who}: the loss at the model's own parameters is {value}; check data and parameters for NaN or inf"
        )
    return value


def _moved(params: Mapping[str, Tensor], d: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    return {name: torch.add(p, d[name], alpha=float(by)) for name, p in params.items()}


def _masked(losses: np.ndarray, who: str) -> np.ndarray:
    bad = ~np.isfinite(losses)
    if bad.any():
        warnings.warn(
            f"{who}: the loss is NaN or inf in {int(bad.sum())} of {losses.size} cells, which are masked (NaN); use a "
            f"smaller extent, normalise='filter', or a wider dtype",
            RuntimeWarning,
            stacklevel=3,
        )
    return np.where(bad, np.nan, losses)


def _bar(items: Iterable, progress: bool | Callable, who: str) -> Iterable:
    if not progress:
        return items
    if callable(progress):
        return progress(items)
    try:
        from tqdm.auto import tqdm
    except ImportError:  # the bar is an extra, the numbers are not
        return items
    return tqdm(items, desc=who, unit="cell", leave=False)


def _range(losses: np.ndarray) -> str:
    finite = losses[np.isfinite(losses)]
    return f"loss {finite.min():.4g} to {finite.max():.4g}" if finite.size else "no finite loss"


def _array(x: Tensor) -> np.ndarray:
    x = x.detach().cpu()
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
