"""Rows in another basis, at the precision of statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast import dispatch
from hvpfast.ops.samples import sample_grads

# Rows, and numbers multiplied, from which splitting is worth it, and rows of one product. Samples from which what the rows
# lose, random from one to the next, leaves the second moment within what bf16x3 states: 12e-6 of one sample's, by the root of N.
_ROWS, _PRODUCTS, _TOGETHER, _SAMPLES = 512, 1 << 26, 128, 16


def rotated(x: Tensor, q: Tensor, shift: Tensor | None = None, *, samples: int) -> Tensor:
    """x (..., I), q (I, P), shift (P,) or None -> x q + shift (..., P), for a sum of squares over `samples`.

    In bf16x3 where the precision allows it, the CPU has AMX and samples are not few (relative error at most 5e-6, of the rows
    and of the second moments of both: tests/test_rotation.py); else torch's own product.
    """
    rows, (i, p) = x.flatten(0, -2), q.shape
    whole = rows.shape[0] // _TOGETHER * _TOGETHER
    may = (
        dispatch.precision_in_use() in ("auto", "bf16x3")
        and x.is_cpu
        and x.dtype is q.dtype is torch.float32
        and whole >= _ROWS
        and samples >= _SAMPLES
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
