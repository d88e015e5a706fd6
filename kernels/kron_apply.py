"""left v right of all layers of a model, in Triton: two launches of `grouped.py`, v right and then left times that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import grouped, tiles
from .grouped import Job


def supports(left, v, right, *, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return grouped.supports(v)


def worthwhile(left, v, right, *, precision: str = "ieee") -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return grouped.worthwhile(v, precision)


def kron_apply(
    left: Tensor | Sequence[Tensor], v: Tensor | Sequence[Tensor], right: Tensor | Sequence[Tensor], *,
    precision: str = "ieee",
) -> Tensor | list[Tensor]:  # fmt: skip
    """See `hvpfast.ops.kron_apply`; "auto" is "bf16x6", as exact as float32."""
    results, first, second = [], [], []
    for one, x, other in grouped.each(left, v, right):
        x_wide = grouped.batched(x)
        results.append(torch.empty(x.shape, dtype=torch.float32, device=x.device))
        if x.numel():
            out, between = results[-1].view(x_wide.shape), torch.empty_like(x_wide)
            first.append(Job(x_wide, grouped.batched(other), between))
            second.append(Job(grouped.batched(one), between, out))
    if first:
        with tiles.on_device(first[0].x):
            grouped.run([(first, True, False), (second, True, False)], grouped.product(precision))
    return results[0] if isinstance(v, Tensor) else results
