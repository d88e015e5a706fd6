"""What several references share: widening, and the pairing of gradient rows with inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.arguments import alike, floats


def wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def pair(name: str, a: Tensor, g: Tensor) -> None:
    """Raise unless a (N, T, I) and g (M, T, O) pair as g[m] with a[m % N]."""
    if not alike(a, g):
        floats(name, a=a, g=g)
    if a.dim() != 3 or g.dim() != 3:
        raise ValueError(
            f"{name}: a has shape {tuple(a.shape)} and g {tuple(g.shape)}; they must be (N, T, I) and (M, T, O): "
            f"give a plain Linear's tensors a T axis of size 1 with unsqueeze(1)"
        )
    (n, t, _), (m, positions, _) = a.shape, g.shape
    if (m % n if n else m) != 0:
        raise ValueError(
            f"{name}: a has {n} rows but g has {m}; g must have a multiple of a's rows (g[m] pairs with a[m % N])"
        )
    if t != positions:
        raise ValueError(f"{name}: a has T = {t} positions but g has {positions}; they must be the same")


def columns(a: Tensor, g: Tensor) -> int:
    """K: how many gradient rows pair with each input row."""
    return g.shape[0] // a.shape[0] if a.shape[0] else 1


def repeat(a: Tensor, g: Tensor) -> Tensor:
    """a (N, T, I) -> (M, T, I), row m being a[m % N]; a view where M = N."""
    k = columns(a, g)
    return a if k == 1 else a.expand(k, *a.shape).reshape(g.shape[0], *a.shape[1:])
