"""Second moment of the per-sample gradients in rotated coordinates, sum_m (qg' g_m' a_m qa)^2, in Triton.

Two products rotate the rows of a and g (float32, the workspace: N T I + M T O elements), then `moments.py` takes the second
moment of what they give: 2 T (N I^2 + M O^2 + M I O) flops, where rotating each gradient takes 2 M I O (T + I + O).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import second_moment as plain
from . import tiles
from .products import product


def supports(
    a: Tensor, g: Tensor, qa: Tensor, qg: Tensor, *, out: Tensor | None = None, precision: str = "ieee"
) -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(a, g)  # out is written when all of them have been read


def worthwhile(
    a: Tensor, g: Tensor, qa: Tensor, qg: Tensor, *, out: Tensor | None = None, precision: str = "ieee"
) -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return plain.worthwhile(a, g, precision=precision)


def rotated_second_moment(
    a: Tensor, g: Tensor, qa: Tensor, qg: Tensor, *, out: Tensor | None = None, precision: str = "ieee"
) -> Tensor:
    """See `hvpfast.ops.rotated_second_moment`; `precision` is that of float32 data ("auto" is "bf16x3").

    The rotations are as exact as float32 wherever bf16x3 is asked for: three errors of it in a row would exceed its bound. For
    16-bit data, rotated into float32, everything is.
    """
    name = tiles.product(a.dtype, precision)
    finer = {"exact": "bf16x6", "bf16x3": "bf16x6", "bf16": "bf16x3"}.get(name, name)
    with tiles.on_device(a):
        a, g = (
            _rotated(x, q, "exact" if x.dtype is q.dtype is not torch.float32 else finer) for x, q in ((a, qa), (g, qg))
        )
    return plain.second_moment(a, g, out=out, precision=finer if name == "exact" else precision)


def _rotated(x: Tensor, q: Tensor, name: str) -> Tensor:
    """x (N, T, F) times q (F, F), float32."""
    rows = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
    return product(rows.T, q, name).reshape(x.shape)
