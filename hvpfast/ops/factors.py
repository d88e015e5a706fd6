"""Kronecker factors: Gram matrices of features, and of the patches that a convolution sees."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvpfast.arguments import floats, output, real, scalars
from hvpfast.dispatch import op
from hvpfast.ops.shared import lower_strips, wide
from hvpfast.patches import geometry, patches


def _check_gram(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, mirror=True):
    if not real(x):
        floats("gram", x=x)
    if type(alpha) is not float or type(beta) is not float:
        scalars("gram", alpha=alpha, beta=beta)
    if x.dim() == 0:
        raise ValueError("gram: x is a scalar; it must be (..., I), its last axis the features")
    if out is not None:
        width = x.shape[-1] + bool(ones_column)
        output("gram", out, (width, width), x)
    elif beta != 0:
        raise ValueError(f"gram: beta is {beta} but there is no out to scale; pass out=, or leave beta at 0")
    elif not mirror:
        raise ValueError("gram: mirror is False but there is no out whose lower triangle to write; pass out=")


@op(check=_check_gram, backends=("cpu", "triton", "cuda"))
def gram(
    x: Tensor,
    *,
    out: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    ones_column: bool = False,
    mirror: bool = True,
) -> Tensor:
    """Gram matrix of the features, `beta * out + alpha * x'x`, summed over every leading axis (no mean is taken).

    Args:
        x: (..., I), any floating dtype and strides.
        out: (I, I) or, with `ones_column`, (I + 1, I + 1), in the result's dtype; overwritten. Not read if beta is 0.
        alpha, beta: factors of the new sum and of what `out` holds: a running average is one call.
        ones_column: append a feature that is 1 in every row: the factor of a layer with a bias, (x 1)'(x 1).
        mirror: if False, only the lower triangle of `out` (diagonal included) is read and written, and what is above keeps
            its values: sums over many calls are mirrored once, when they are read.

    Returns:
        `out`, or a new tensor: (I, I) or (I + 1, I + 1), both triangles; float32, or float64 for float64.

    Raises:
        TypeError: not a real floating tensor, or `out` of another dtype than the result's.
        ValueError: `out` of another shape or device; beta, or mirror=False, without `out`.
    """
    rows = wide(x) if x.dim() == 2 else wide(x).reshape(x.shape[:-1].numel(), x.shape[-1])
    if ones_column:
        rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1)
    apart = out is not None and out.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr()
    if not mirror:
        return _add_lower(out, rows if apart else rows.clone(), alpha, beta)
    if apart:
        return out.addmm_(rows.T, rows, beta=beta, alpha=alpha)
    product = rows.T @ rows
    if out is None:
        return product if alpha == 1 else product * alpha
    if beta == 0:
        return out.copy_(product if alpha == 1 else product.mul_(alpha))
    return out.mul_(beta).add_(product, alpha=alpha)


def _add_lower(out: Tensor, rows: Tensor, alpha: float, beta: float) -> Tensor:
    """The lower triangle of out (I, I) = beta out + alpha rows'rows, a few rows of it at a time."""
    for strip, kept in lower_strips(out):
        features = rows[:, strip]
        out[strip, : strip.start].addmm_(features.T, rows[:, : strip.start], beta=beta, alpha=alpha)
        corner = out[strip, strip]
        blended = torch.addmm(corner, features.T, features, beta=beta, alpha=alpha)
        corner.copy_(torch.where(kept, blended, corner))
    return out


def _check_conv_gram(
    x, kernel_size, *, stride=1, padding=0, dilation=1, groups=1, ones_column=False, kfac_approx="expand",
    out=None, alpha=1.0, beta=0.0,
):  # fmt: skip
    if not real(x):
        floats("conv_gram", x=x)
    if type(alpha) is not float or type(beta) is not float:
        scalars("conv_gram", alpha=alpha, beta=beta)
    asked = (x.shape, kernel_size, stride, padding, dilation, groups, kfac_approx)
    try:  # torch.jit.trace's sizes are tensors, and are not remembered
        width = _remembered_width(*asked) if torch._C._get_tracing_state() is None else _conv_width(*asked)
    except TypeError:  # a list among them, or a symbol of torch.compile's
        width = _conv_width(*asked)
    if out is not None:
        width = width + bool(ones_column)
        output("conv_gram", out, (width, width) if groups == 1 else (groups, width, width), x)
    elif beta != 0:
        raise ValueError(f"conv_gram: beta is {beta} but there is no out to scale; pass out=, or leave beta at 0")


def _conv_width(shape, kernel_size, stride, padding, dilation, groups, kfac_approx) -> int:
    """Features of a patch of one group."""
    if len(shape) not in (3, 4, 5):
        raise ValueError(f"conv_gram: x has shape {tuple(shape)}; it must be (N, C, *spatial) with 1 to 3 spatial axes")
    if groups < 1 or shape[1] % groups:
        raise ValueError(
            f"conv_gram: x has {shape[1]} channels and groups is {groups}; groups must divide the channels"
        )
    if kfac_approx not in ("expand", "reduce"):
        raise ValueError(f"conv_gram: kfac_approx is {kfac_approx!r}; it must be 'expand' or 'reduce'")
    kernel = geometry(shape[2:], kernel_size, stride, padding, dilation).kernel
    return shape[1] // groups * math.prod(kernel)


_remembered_width = functools.lru_cache(1024)(_conv_width)


@op(check=_check_conv_gram, backends=("cpu", "triton"))
def conv_gram(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    ones_column: bool = False,
    kfac_approx: str = "expand",
    out: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """Gram matrix of a convolution's input patches, `beta * out + alpha * P'P`: the input factor of its K-FAC block.

    A patch holds the values under the kernel at one output position, ordered as the weight is, (C / groups, *kernel).

    Args:
        x: (N, C, *spatial), 1 to 3 spatial axes, any floating dtype and strides.
        kernel_size, stride, padding, dilation, groups: as `torch.nn.functional.conv2d` takes them; padding may be
            "same" or "valid".
        ones_column: append a feature that is 1 in every patch: the factor of a layer with a bias.
        kfac_approx: "expand": P has a row per sample and position, N T of them, and the sum runs over all. "reduce":
            a row per sample, the mean of its patches over the positions (Eschenhagen 2023, arXiv:2311.00636, eq. 23).
        out: the result's shape and dtype; overwritten. Not read if beta is 0. alpha, beta: as in `gram`.

    Returns:
        `out`, or a new tensor: (I, I) with I = C prod(kernel), plus 1 with `ones_column`; for groups > 1
        (groups, I / groups, I / groups). A sum over samples (no mean); float32, or float64 for float64.

    Raises:
        TypeError, ValueError: for a dtype, shape or geometry that does not fit.
    """
    shape = geometry(x.shape[2:], kernel_size, stride, padding, dilation)
    rows = patches(wide(x), shape).unflatten(2, (groups, x.shape[1] // groups)).flatten(3)  # (N, T, groups, I)
    rows = rows.mean(1) if kfac_approx == "reduce" else rows.flatten(0, 1)
    if ones_column:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
    product = rows.permute(1, 2, 0) @ rows.transpose(0, 1)  # (groups, I, I)
    product = product if groups > 1 else product[0]
    if out is None:
        return product if alpha == 1 else product * alpha
    if beta == 0:
        return out.copy_(product if alpha == 1 else product.mul_(alpha))
    return out.mul_(beta).add_(product, alpha=alpha)
