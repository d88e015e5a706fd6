"""A convolution's geometry, and the input patches that its kernel sees."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Geometry(NamedTuple):
    """A convolution's geometry, one entry per spatial axis; `padding` holds (before, behind) pairs."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    positions: tuple[int, ...]


def geometry(size: Sequence[int], kernel_size, stride=1, padding=0, dilation=1) -> Geometry:
    """The geometry of a convolution over images of spatial `size`, from arguments as `torch.nn.functional` takes them.

    Remembered: a layer asks for the same one in every step.

    Raises:
        ValueError: wrong lengths, values below 1 (padding: below 0), padding="same" with a stride, or no position left.
    """
    asked = (tuple(size), kernel_size, stride, padding, dilation)
    if torch._C._get_tracing_state() is None:  # torch.jit.trace's sizes are tensors
        try:
            return _remembered(*asked)
        except TypeError:  # a list among them, or a symbol of torch.compile's
            pass
    return _geometry(*asked)


def _geometry(size: Sequence[int], kernel_size, stride, padding, dilation) -> Geometry:
    axes = len(size)

    def each(name: str, value, least: int) -> tuple[int, ...]:
        values = (value,) * axes if isinstance(value, int) else tuple(value)
        if len(values) == 1:
            values = values * axes
        if len(values) != axes or min(values) < least:
            raise ValueError(
                f"convolution: {name} is {value!r}; it must be an int, or {axes} of them (one per spatial axis), "
                f"at least {least}"
            )
        return values

    kernel, steps, spread = (
        each("kernel_size", kernel_size, 1),
        each("stride", stride, 1),
        each("dilation", dilation, 1),
    )
    reach = tuple(d * (k - 1) for k, d in zip(kernel, spread, strict=True))
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(
                f"convolution: padding is {padding!r}; it must be 'same', 'valid', an int or a tuple of ints"
            )
        if padding == "same" and max(steps) > 1:
            raise ValueError(f"convolution: padding='same' needs stride 1, got {stride!r}; give the padding in pixels")
        sides = tuple((r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach)
    else:
        sides = tuple((p, p) for p in each("padding", padding, 0))
    room = tuple(n + a + b - r - 1 for n, (a, b), r in zip(size, sides, reach, strict=True))
    if min(room, default=0) < 0:
        raise ValueError(
            f"convolution: the kernel {kernel} with dilation {spread} does not fit into images of {tuple(size)} padded by "
            f"{sides}; pad more, or take a smaller kernel"
        )
    return Geometry(kernel, steps, sides, spread, tuple(r // s + 1 for r, s in zip(room, steps, strict=True)))


_remembered = functools.lru_cache(1024)(_geometry)


def patches(x: Tensor, shape: Geometry) -> Tensor:
    """x (N, C, *spatial) -> (N, T, C, prod(kernel)): the input values under the kernel at each of the T positions."""
    x = F.pad(x, [side for pair in reversed(shape.padding) for side in pair])
    axes = len(shape.kernel)
    for axis, (k, s, d) in enumerate(zip(shape.kernel, shape.stride, shape.dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.permute(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    return x.reshape(x.shape[0], math.prod(shape.positions), x.shape[1 + axes], math.prod(shape.kernel))
