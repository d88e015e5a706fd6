"""Square root of softmax cross-entropy's Hessian in the logits times vectors, in Triton: see `softmax_hvp.py`."""

from __future__ import annotations

from torch import Tensor

from . import softmax_hvp, tiles


def supports(
    logits: Tensor, v: Tensor, *, weight: Tensor | None = None, transpose: bool = False, precision: str = "ieee"
) -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(logits, v)


def softmax_root(
    logits: Tensor, v: Tensor, *, weight: Tensor | None = None, transpose: bool = False, precision: str = "ieee"
) -> Tensor:
    """See `hvpfast.ops.softmax_root`; sums and results are float32 under every `precision`."""
    return softmax_hvp.product(logits, v, weight, softmax_hvp.TRANSPOSE if transpose else softmax_hvp.ROOT)
