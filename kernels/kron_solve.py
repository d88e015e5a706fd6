"""qg ((qg' v qa) / (eigenvalues + damping)) qa' of all layers of a model, in Triton: four launches of `grouped.py`, the
division in the second one's epilogue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import grouped, tiles
from .grouped import Job


def supports(v, qg, qa, eigenvalues, damping, *, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return grouped.supports(v)


def worthwhile(v, qg, qa, eigenvalues, damping, *, precision: str = "ieee") -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return grouped.worthwhile(v, precision)


def kron_solve(
    v: Tensor | Sequence[Tensor], qg: Tensor | Sequence[Tensor], qa: Tensor | Sequence[Tensor],
    eigenvalues: Tensor | Sequence[Tensor], damping: float | Sequence[float], *, precision: str = "ieee",
) -> Tensor | list[Tensor]:  # fmt: skip
    """See `hvpfast.ops.kron_solve`; "auto" is "bf16x6", as exact as float32."""
    layers = grouped.each(v, qg, qa, eigenvalues)
    shares = damping if isinstance(damping, (list, tuple)) else [damping] * len(layers)
    results: list[Tensor] = []
    stages: list[list[Job]] = [[], [], [], []]
    for (x, left, right, values), share in zip(layers, shares, strict=True):
        results.append(torch.empty(x.shape, dtype=torch.float32, device=x.device))
        if x.numel() == 0:
            continue
        x, left, right, values = (grouped.batched(z) for z in (x, left, right, values))
        once, twice = torch.empty_like(x), torch.empty_like(x)
        stages[0].append(Job(x, right, once))
        stages[1].append(Job(left, once, twice, values, float(share)))
        stages[2].append(Job(twice, right, once))
        stages[3].append(Job(left, once, results[-1].view(x.shape)))
    if stages[0]:
        by_k = ((True, False), (False, False), (True, True), (True, False))
        with tiles.on_device(stages[0][0].x):
            grouped.run([(jobs, *how) for jobs, how in zip(stages, by_k, strict=True)], grouped.product(precision))
    return results[0] if isinstance(v, Tensor) else results
