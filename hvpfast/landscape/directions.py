"""Directions in parameter space: drawn at random and normalised as Li et al. (2018) do, or given by the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

NORMALISATIONS = ("filter", "layer", "global", "none")
Direction = Tensor | Mapping[str, Tensor] | Sequence[Tensor]


def filters(x: Tensor) -> Tensor:
    """View of a parameter as one row a filter: (O, ...) -> (O, rest).

    A filter of a single weight has only a sign, so a tensor of such filters counts as one filter.
    """
    rows = x.reshape(x.shape[0], -1) if x.dim() > 1 else x.reshape(1, -1)
    return rows if rows.shape[1] > 1 else rows.reshape(1, -1)


def random_pair(params: Mapping[str, Tensor], normalise: str, seed: int, count: int = 2) -> list[dict[str, Tensor]]:
    """Draw `count` (1 or 2) normal directions, orthogonal to one another and normalised.

    The second is made orthogonal within each unit that is then rescaled (filter, tensor or the whole), so that both
    the norms and the orthogonality are exact.

    Args:
        params: the parameters, by name. normalise: one of `NORMALISATIONS`. seed: the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        {name: torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for name, p in params.items()}
        for _ in range(count)
    ]
    if normalise in ("filter", "layer"):
        for each in drawn:
            for name, p in params.items():
                if p.dim() < 2:
                    each[name].zero_()
    if count == 2:
        _orthogonalise(drawn[0], drawn[1], normalise)
    return [normalised(each, params, normalise) for each in drawn]


def normalised(direction: Mapping[str, Tensor], params: Mapping[str, Tensor], normalise: str) -> dict[str, Tensor]:
    """Rescale a direction to the parameters.

    Args:
        direction, params: tensors by name, the same shapes.
        normalise: "filter": each filter (row of a weight, output channel of a convolution) gets the norm of the
            parameter's filter; "layer": each tensor gets the norm of the parameter; in both, parameters with fewer
            than two axes (biases, norm layers) are not perturbed, as in Li et al. (2018), section 4, and their code's
            `ignore="biasbn"`. "global": the whole gets the norm of all parameters. "none": unchanged.

    Raises:
        ValueError: for another name, or if nothing is left to perturb.
    """
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise: got {normalise!r}; it must be one of {', '.join(NORMALISATIONS)}")
    if normalise == "none":
        return {name: d.clone() for name, d in direction.items()}
    if normalise == "global":
        ratio = _norm(params) / max(_norm(direction), torch.finfo(torch.float64).tiny)
        return {name: (d.double() * ratio).to(d.dtype) for name, d in direction.items()}
    if all(p.dim() < 2 for p in params.values()):
        raise ValueError(
            f"normalise={normalise!r} perturbs weights of two axes or more, and every parameter here has fewer; "
            f"use normalise='global'"
        )
    scaled = {}
    for name, d in direction.items():
        if d.dim() < 2:
            scaled[name] = torch.zeros_like(d)
            continue
        rows = filters if normalise == "filter" else _whole
        own, target = rows(d).double(), rows(params[name]).double()
        ratio = target.norm(dim=1, keepdim=True) / own.norm(dim=1, keepdim=True).clamp_min(1e-300)
        scaled[name] = (own * ratio).reshape(d.shape).to(d.dtype)
    return scaled


def named(direction: Direction, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A direction as tensors by name, on the parameters' devices and in their dtypes.

    Args:
        direction: a flat (P,) tensor in the parameters' order, tensors by name, or a sequence of tensors.

    Raises:
        ValueError: if it does not fit the parameters, or holds a NaN or an inf.
    """
    if isinstance(direction, Tensor):
        total = sum(p.numel() for p in params.values())
        if direction.shape != (total,):
            raise ValueError(
                f"direction: got shape {tuple(direction.shape)}; a flat direction must be ({total},), "
                f"one entry a parameter"
            )
        pieces = direction.detach().split([p.numel() for p in params.values()])
        found = {name: piece.reshape(p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}
    elif isinstance(direction, Mapping):
        found = {name: direction[name].detach() for name in params if name in direction}
        if len(found) != len(params) or len(direction) != len(params):
            odd = sorted(set(params) ^ set(direction))
            raise ValueError(
                f"direction: its names and the parameters' differ in {', '.join(odd)}; give one tensor each"
            )
    else:
        if len(direction) != len(params):
            raise ValueError(
                f"direction: got {len(direction)} tensors for {len(params)} parameters; give one tensor each"
            )
        found = {name: d.detach() for name, d in zip(params, direction, strict=True)}
    for name, p in params.items():
        if found[name].shape != p.shape:
            raise ValueError(
                f"direction: {name} has shape {tuple(found[name].shape)}; the parameter has {tuple(p.shape)}"
            )
        found[name] = found[name].to(p.device, p.dtype)
        if not bool(torch.isfinite(found[name]).all()):
            raise ValueError(f"direction: {name} holds a NaN or an inf; give finite entries")
    return found


def flat(direction: Mapping[str, Tensor]) -> Tensor:
    """The direction as one (P,) tensor, in the parameters' order."""
    return torch.cat([d.reshape(-1) for d in direction.values()])


def _whole(x: Tensor) -> Tensor:
    return x.reshape(1, -1)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(sum(float(t.detach().double().square().sum()) for t in tensors.values())) ** 0.5


def _orthogonalise(first: dict[str, Tensor], second: dict[str, Tensor], normalise: str) -> None:
    """Take out of `second`, in place, its component along `first`, within each unit that is rescaled later."""
    if normalise in ("filter", "layer"):
        rows: Callable[[Tensor], Tensor] = filters if normalise == "filter" else _whole
        for name, d in first.items():
            along, rest = rows(d).double(), rows(second[name]).double()
            square = along.square().sum(1, keepdim=True).clamp_min(1e-300)
            for _ in range(2):
                rest = rest - (rest * along).sum(1, keepdim=True) / square * along
            second[name] = rest.reshape(d.shape).to(d.dtype)
        return
    square = max(_norm(first) ** 2, 1e-300)
    for _ in range(2):
        share = sum(float((first[name].double() * second[name].double()).sum()) for name in first) / square
        for name in first:
            second[name] = second[name] - share * first[name]
