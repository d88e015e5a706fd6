"""Weighted sums of the per-sample gradients, sum_m c_m g_m' a_m, in Triton: see `moments.py` for the two routes.

float32 data by rows. 16-bit data with FEW positions or more a sample by samples, where their products are exact: a third to
a sixth of the tensor cores' work by rows, but K times it where K rows of g share an input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import moments, tables, tiles


def supports(a: Tensor, g: Tensor, c: Tensor, *, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(a, g)


def worthwhile(a: Tensor, g: Tensor, c: Tensor, *, precision: str = "ieee") -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return tables.slower(a, "weighted_grad", a.numel() * g.shape[2], precision)


def weighted_grad(a: Tensor, g: Tensor, c: Tensor, *, precision: str = "ieee") -> Tensor:
    """See `hvpfast.ops.weighted_grad`; `precision` is that of float32 data ("auto" is "bf16x6": as exact as float32)."""
    precision = "bf16x6" if precision == "auto" else precision
    n, t, i = a.shape
    columns = c if c.dim() == 2 else c[:, None]
    out = g.new_empty(columns.shape[1], g.shape[2], i, dtype=torch.float32)
    if 0 in a.shape or 0 in g.shape:
        out.zero_()
    elif out.numel():
        with tiles.on_device(a):
            if a.dtype is not torch.float32 and t >= tiles.FEW and len(g) == n:
                moments.by_samples(a, g, columns, "exact", weighted=out)
            else:
                moments.by_rows(a, g, columns, out, moments.product_by_rows(a.dtype, precision, n * t))
    return out if c.dim() == 2 else out[0]
