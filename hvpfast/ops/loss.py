"""The Hessian of the loss in the logits, its square root, and gradients at labels drawn from the model."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.arguments import floats
from hvpfast.dispatch import op
from hvpfast.ops.shared import wide

_CHUNK = 1 << 22  # elements of the float64 temporaries that labels are drawn with: 32 MB


def _check_softmax(name: str, logits: Tensor, v: Tensor, weight: Tensor | None) -> None:
    dtype, usual = None, False  # the usual case, found out without a call: this is asked on every product
    if type(logits) is Tensor is type(v):
        dtype = logits.dtype
        usual = v.dtype is dtype and logits.is_cpu and v.is_cpu and dtype.is_floating_point
    if not usual:
        floats(name, logits=logits, v=v)
    of, shape = logits.shape, v.shape
    if not of or (shape != of and tuple(shape)[len(shape) - len(of) :] != of):
        raise ValueError(
            f"{name}: logits have shape {tuple(logits.shape)} and v {tuple(v.shape)}; they must be (..., C) and "
            f"(..., C), or (K, ..., C) for K vectors at once"
        )
    if weight is not None and not (usual and type(weight) is Tensor and weight.dtype is dtype and weight.is_cpu):
        floats(name, logits=logits, weight=weight)
    if weight is not None and (*weight.shape, of[-1]) != of:
        _misfit(name, logits, weight)


def _misfit(name: str, logits: Tensor, weight: Tensor) -> None:
    raise ValueError(
        f"{name}: weight has shape {tuple(weight.shape)}; it must be {tuple(logits.shape[:-1])}, one a row"
    )


def _check_softmax_hvp(logits, v, *, weight=None):
    _check_softmax("softmax_hvp", logits, v, weight)


@op(check=_check_softmax_hvp, backends=("cpu", "triton"))
def softmax_hvp(logits: Tensor, v: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Product of softmax cross-entropy's Hessian in the logits with a vector: `weight (diag(p) - p p') v`, row by row.

    Args:
        logits: (..., C). v: (..., C), or (K, ..., C) for K vectors at once. weight: (...,), a factor for each row.

    Returns:
        shaped like v, float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    p, v = torch.softmax(wide(logits), -1), wide(v)
    product = p * (v - (p * v).sum(-1, keepdim=True))
    return product if weight is None else product * wide(weight).unsqueeze(-1)


def _check_softmax_root(logits, v, *, weight=None, transpose=False):
    _check_softmax("softmax_root", logits, v, weight)


@op(check=_check_softmax_root, backends=("triton",))
def softmax_root(logits: Tensor, v: Tensor, *, weight: Tensor | None = None, transpose: bool = False) -> Tensor:
    """Product of a square root R of `softmax_hvp`'s matrix with a vector, row by row: `R R' = weight (diag(p) - p p')`.

    `R = sqrt(weight) (diag(q) - p q')` with q = sqrt(p), C x C: R e_j = sqrt(weight p_j) (e_j - p) is the j-th column.

    Args:
        logits: (..., C). v: (..., C), or (K, ..., C) for K vectors at once. weight: (...,), a factor for each row, not
            negative. transpose: R' v instead of R v.

    Returns:
        shaped like v, float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.

    Source: N. N. Schraudolph, Neural Computation 14, 2002, for the Hessian; the root is (I - p 1') diag(q).
    """
    q, v = torch.softmax(wide(logits) / 2, -1), wide(v)  # not softmax(logits).sqrt(), which has no slope at 0
    q = q / torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    product = q * (v - (q * q * v).sum(-1, keepdim=True) if transpose else v - q * (q * v).sum(-1, keepdim=True))
    return product if weight is None else product * wide(weight).sqrt().unsqueeze(-1)


def _check_softmax_sample(logits, uniform, *, weight=None):
    usual = False  # found out without a call, as above
    if type(logits) is Tensor is type(uniform) and logits.is_cpu and uniform.is_cpu:
        usual = logits.dtype.is_floating_point and uniform.dtype.is_floating_point
    if not usual:
        floats("softmax_sample", logits=logits)
        floats("softmax_sample", uniform=uniform)
        if uniform.device != logits.device:
            raise ValueError(
                f"softmax_sample: logits are on {logits.device} but uniform is on {uniform.device}; move one of them"
            )
    of, shape = logits.shape, uniform.shape
    rows = of[:-1]
    if not of or (shape != rows and shape[1:] != rows) or len(shape) > len(of):
        raise ValueError(
            f"softmax_sample: logits have shape {tuple(of)} and uniform {tuple(shape)}; they must be (..., C) and (...,), "
            f"or (K, ...) for K draws a row"
        )
    if weight is not None:
        if not (usual and type(weight) is Tensor and weight.dtype is logits.dtype and weight.is_cpu):
            floats("softmax_sample", logits=logits, weight=weight)
        if weight.shape != rows:
            _misfit("softmax_sample", logits, weight)


@op(check=_check_softmax_sample, backends=("triton",))
def softmax_sample(logits: Tensor, uniform: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Gradients in the logits at labels drawn from the model: `sqrt(weight) (p - e_y)` with y ~ p, row by row.

    Their second moment over draws is `softmax_hvp`'s matrix: columns of a Monte-Carlo Fisher. y is the first class at
    which the cumulative probability exceeds `uniform`, summed in float64 whatever the logits are, so that every backend
    draws the same labels from the same numbers. A class of probability 0 is not drawn.

    Args:
        logits: (..., C). uniform: (...,) numbers in [0, 1), or (K, ...) for K draws a row, of any floating dtype: with
            many classes float64 or float32. weight: (...,), a factor for each row, not negative.

    Returns:
        (..., C) or (K, ..., C), float32 or float64; differentiable at fixed labels. Raises TypeError or ValueError where
        shapes, dtypes or devices do not fit.
    """
    if not logits.numel() or not uniform.numel():
        return wide(logits).new_zeros(*uniform.shape, logits.shape[-1])
    p = torch.softmax(wide(logits), -1)
    labels = _draw(logits.detach(), uniform.detach())
    drawn = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    u = torch.where(drawn, p - 1, p)
    return u if weight is None else u * wide(weight).sqrt().unsqueeze(-1)


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Labels shaped like `uniform`, int64: few rows at a time."""
    classes = logits.shape[-1]
    rows = logits.reshape(-1, classes)
    numbers = uniform.reshape(-1, rows.shape[0]).T.double()  # (R, K)
    step, labels = max(1, _CHUNK // classes), []
    for x, u in zip(rows.split(step), numbers.split(step), strict=True):
        below = torch.softmax(x.double(), -1).cumsum(-1)
        labels.append(torch.searchsorted(below, (u * below[:, -1:]).contiguous(), right=True))
    return torch.cat(labels).clamp(max=classes - 1).T.reshape(uniform.shape)
