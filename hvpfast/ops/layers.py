"""Layers' linear maps and their transposes, for passes whose results are statistics: what reaches a factor, a norm or a second
moment need be no more precise than the products that it is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hvpfast.arguments import floats, usual
from hvpfast.dispatch import op
from hvpfast.ops.shared import wide
from hvpfast.patches import geometry


def _check_bias(name, bias, features):
    if bias is not None and bias.shape != (features,):
        raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}; it must be ({features},)")


def _check_matmul(x, w, *, bias=None):
    given = (x, w) if bias is None else (x, w, bias)
    if not usual(*given):
        floats("matmul", x=x, w=w, **({} if bias is None else {"bias": bias}))
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(
            f"matmul: x has shape {tuple(x.shape)} and w {tuple(w.shape)}; they must be (R, I) and (I, O): flatten leading axes"
        )
    _check_bias("matmul", bias, w.shape[1])


@op(check=_check_matmul, backends=("cpu",))
def matmul(x: Tensor, w: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`x w + bias`: a linear layer (w its weight transposed), or with its weight as it is its input's gradient.

    Under precision "auto" and "bf16x3" the kernel splits float32 in bf16 halves (relative error about 4e-6): for statistics, not
    for a gradient that is asked for.

    Args:
        x: (R, I). w: (I, O), any strides. bias: (O,).

    Returns:
        (R, O), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    x, w = wide(x), wide(w)
    return x @ w if bias is None else torch.addmm(wide(bias), x, w)


def _check_convolve(x, w, *, bias=None, stride=1, padding=0, dilation=1, size=None):
    name = "convolve"
    given = (x, w) if bias is None else (x, w, bias)
    if not usual(*given):
        floats(name, x=x, w=w, **({} if bias is None else {"bias": bias}))
    axes = x.dim() - 2
    if axes not in (1, 2, 3) or w.dim() != x.dim():
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)} and w {tuple(w.shape)}; they must be (N, C, *size) and (O, C, *kernel) "
            f"with one to three spatial axes"
        )
    channels, features = (w.shape[1], w.shape[0]) if size is None else (w.shape[0], w.shape[1])
    if x.shape[1] != channels:
        raise ValueError(
            f"{name}: x has {x.shape[1]} channels but w, of shape {tuple(w.shape)}, takes {channels}; groups are not taken"
        )
    _check_bias(name, bias, features)
    if isinstance(padding, str):
        raise ValueError(f"{name}: padding is {padding!r}; it must be an int or a tuple of ints")
    spatial = x.shape[2:] if size is None else tuple(size)
    if len(spatial) != axes:
        raise ValueError(f"{name}: size is {size}; it must have {axes} extents, as x has")
    positions = geometry(spatial, tuple(w.shape[2:]), stride, padding, dilation).positions
    if size is not None and positions != tuple(x.shape[2:]):
        raise ValueError(
            f"{name}: a convolution of {tuple(size)} has {tuple(positions)} positions but x has {tuple(x.shape[2:])}"
        )


@op(check=_check_convolve, backends=("cpu",))
def convolve(
    x: Tensor,
    w: Tensor,
    *,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    size: tuple[int, ...] | None = None,
) -> Tensor:
    """A convolution, or with `size` its transpose: the gradient of an input of that size, for x the one at the output.

    Under precision "auto" and "bf16x3" the kernel splits float32 in bf16 halves (relative error about 4e-6) and forms no
    patches: for statistics, not for a gradient that is asked for.

    Args:
        x: (N, C, *positions), one to three spatial axes. w: (O, C, *kernel), of the transpose (C, O, *kernel). bias: (O,).
        stride, padding, dilation: the convolution's, ints or one an axis. size: spatial extents of the transpose's result.

    Returns:
        (N, O, *positions) or (N, O, *size), float32 or float64. Raises TypeError or ValueError where shapes, dtypes, devices or
        the geometry do not fit.
    """
    x, w, axes = wide(x), wide(w), x.dim() - 2
    bias = None if bias is None else wide(bias)
    if size is None:
        return (F.conv1d, F.conv2d, F.conv3d)[axes - 1](x, w, bias, stride, padding, dilation)
    shape = geometry(tuple(size), tuple(w.shape[2:]), stride, padding, dilation)
    padding = tuple(p for p, _ in shape.padding)
    last = (
        (n - 1) * s - 2 * p + d * (k - 1) + 1  # pixels that a position sees at all
        for n, s, p, d, k in zip(shape.positions, shape.stride, padding, shape.dilation, shape.kernel, strict=True)
    )
    unseen = tuple(extent - seen for extent, seen in zip(size, last, strict=True))
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
    return transposed(x, w, bias, shape.stride, padding, unseen, 1, shape.dilation)
