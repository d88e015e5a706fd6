"""Rows in another basis, at the precision of statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast import dispatch
from hvpfast.ops.samples import sample_grads

# Rows, and numbers multiplied, from which halves are worth splitting into, and a statistic's error is an average over many
# products: measured on a 2-core AVX-512 + AMX machine, 2026-11-21, 1.8x to 2.1x for 2048 x 256 to 8192 x 1024 rows.
_ROWS, _PRODUCTS, _TOGETHER = 512, 1 << 26, 128


def rotated(x: Tensor, q: Tensor, shift: Tensor | None = None) -> Tensor:
    """x (..., I), q (I, P), shift (P,) or None -> x q + shift (..., P), for sums of squares over many rows.

    In bf16x3 where the precision allows it and the CPU has AMX (relative error about 4e-6, which is random from row to row:
    second moments over hundreds of rows keep float32's accuracy within 1e-6); else torch's own product.
    """
    rows, (i, p) = x.flatten(0, -2), q.shape
    whole = rows.shape[0] // _TOGETHER * _TOGETHER
    may = (
        dispatch.precision_in_use() in ("auto", "bf16x3")
        and x.is_cpu
        and x.dtype is q.dtype is torch.float32
        and whole >= _ROWS
    )
    if may and whole * i * p >= _PRODUCTS:
        # A product is the "gradient" of a sample whose positions are the features: outputs x', inputs q, which all share.
        parts, basis = rows[:whole].view(-1, _TOGETHER, i).mT, q.unsqueeze(0)
        with dispatch.precision("bf16x3"):
            if sample_grads.choose(basis, parts).backend == "cpu":
                out = x.new_empty(rows.shape[0], p)
                sample_grads(basis, parts, out=out[:whole].view(-1, _TOGETHER, p))
                torch.mm(rows[whole:], q, out=out[whole:])
                return (out if shift is None else out.add_(shift)).view(*x.shape[:-1], p)
    product = rows @ q if shift is None else torch.addmm(shift, rows, q)
    return product.view(*x.shape[:-1], p)
