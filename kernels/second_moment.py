"""Sum over samples of the squared per-sample gradients, in Triton: see `moments.py` for the two routes.

T = 1: (g o g)'(a o a), one product of squares. Else sample by sample, the squares added in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import moments, tables, tiles


def supports(a: Tensor, g: Tensor, *, out: Tensor | None = None, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    if tiles.shares_memory(out, a, g):
        return "out shares memory with a or g, which the kernel still reads when it writes out"
    return tiles.unfit(a, g)


def worthwhile(a: Tensor, g: Tensor, *, out: Tensor | None = None, precision: str = "ieee") -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return tables.slower(a, "second_moment", g.numel() * a.shape[2], precision, plain=a.shape[1] == 1)


def second_moment(a: Tensor, g: Tensor, *, out: Tensor | None = None, precision: str = "ieee") -> Tensor:
    """See `hvpfast.ops.second_moment`; `precision` is that of float32 data ("auto" is "bf16x3")."""
    t = a.shape[1]
    if out is None:
        out = g.new_empty(g.shape[2], a.shape[2], dtype=torch.float32)
    if out.numel() == 0:
        return out
    if len(g) == 0 or t == 0:
        return out.zero_()
    with tiles.on_device(a):
        if t == 1:
            moments.by_rows(a, g, None, out[None], moments.product_by_rows(a.dtype, precision, len(a)))
        else:
            terms = t if len(g) >= 8 else 0  # a square has twice the product's error; few samples do not average it
            moments.by_samples(a, g, None, tiles.product_of_few(a.dtype, precision, terms), squares=out)
    return out
