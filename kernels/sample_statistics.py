"""Squared norms, a weighted sum and the second moment of the per-sample gradients g_m' a_m, in Triton: see `moments.py`.

By samples all three come from one launch, which multiplies every gradient once and stores none; for T = 1 the three closed
forms, each one pass over a and g, cost less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import moments, sample_norms_squared, tables, tiles


def supports(a: Tensor, g: Tensor, c: Tensor | None = None, *, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(a, g)


def worthwhile(a: Tensor, g: Tensor, c: Tensor | None = None, *, precision: str = "ieee") -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return tables.slower(a, "second_moment", g.numel() * a.shape[2], precision, plain=a.shape[1] == 1)


def sample_statistics(
    a: Tensor, g: Tensor, c: Tensor | None = None, *, precision: str = "ieee"
) -> tuple[Tensor, Tensor, Tensor]:
    """See `hvpfast.ops.sample_statistics`; `precision` is that of float32 data ("auto" is "bf16x3")."""
    (n, t, i), (m, _, o) = a.shape, g.shape
    weighted, squares = g.new_empty(2, o, i, dtype=torch.float32)
    if 0 in a.shape or 0 in g.shape:
        return g.new_zeros(m, dtype=torch.float32), weighted.zero_(), squares.zero_()
    column = (g.new_ones(m) if c is None else c).unsqueeze(1)
    with tiles.on_device(a):
        if t == 1:
            product = moments.product_by_rows(a.dtype, precision, n)
            moments.by_rows(a, g, column, weighted[None], product)
            moments.by_rows(a, g, None, squares[None], product)
            return sample_norms_squared.launch_outer(a, g), weighted, squares
        terms = t if m >= 8 else 0  # as for the second moment alone
        product = tiles.product_of_few(a.dtype, precision, terms)
        product = "bf16x3" if product == "bf16" else product  # whose tile with all three sums spills on sm_100
        norms = moments.by_samples(a, g, column, product, squares=squares, weighted=weighted[None], norms=True)
    return norms, weighted, squares
