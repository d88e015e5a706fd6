"""The Hessian of the loss in the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.arguments import floats
from hvpfast.dispatch import op
from hvpfast.ops.shared import wide


def _check_softmax_hvp(logits, v, *, weight=None):
    dtype, usual = None, False  # the usual case, found out without a call: this is asked on every product
    if type(logits) is Tensor is type(v):
        dtype = logits.dtype
        usual = v.dtype is dtype and logits.is_cpu and v.is_cpu and dtype.is_floating_point
    if not usual:
        floats("softmax_hvp", logits=logits, v=v)
    of, shape = logits.shape, v.shape
    if not of or (shape != of and tuple(shape)[len(shape) - len(of) :] != of):
        raise ValueError(
            f"softmax_hvp: logits have shape {tuple(logits.shape)} and v {tuple(v.shape)}; they must be (..., C) and "
            f"(..., C), or (K, ..., C) for K vectors at once"
        )
    if weight is not None:
        if not (usual and type(weight) is Tensor and weight.dtype is dtype and weight.is_cpu):
            floats("softmax_hvp", logits=logits, weight=weight)
        if (*weight.shape, of[-1]) != of:
            raise ValueError(
                f"softmax_hvp: weight has shape {tuple(weight.shape)}; it must be {tuple(logits.shape[:-1])}, one a row"
            )


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
