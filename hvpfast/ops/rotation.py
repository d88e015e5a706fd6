"""Rows in another basis, at the precision of statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast import dispatch
from hvpfast.ops.layers import matmul

# Samples from which what the rows lose, random from one to the next, leaves the second moment within what bf16x3 states:
# 12e-6 of one sample's, by the root of N.
_SAMPLES = 16


def rotated(x: Tensor, q: Tensor, shift: Tensor | None = None, *, samples: int) -> Tensor:
    """x (..., I), q (I, P), shift (P,) or None -> x q + shift (..., P), for a sum of squares over `samples`.

    In bf16x3 where the precision allows it, the CPU has AMX and samples are not few (relative error at most 5e-6, of the rows
    and of the second moments of both: tests/test_rotation.py); else torch's own product.
    """
    rows, forced = x.flatten(0, -2), dispatch.backend_in_use()
    may = samples >= _SAMPLES and forced in (None, "cpu") and x.is_cpu and x.dtype is q.dtype
    if may and matmul.why_not("cpu", rows, q) is None:
        product = matmul(rows, q, bias=shift)
    else:
        product = rows @ q if shift is None else torch.addmm(shift, rows, q)
    return product.view(*x.shape[:-1], q.shape[1])
