"""Sum over samples of an embedding table's squared per-sample gradients, in Triton: see `embedding_sample_norms.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import embedding_sample_norms, tiles


def supports(g: Tensor, indices: Tensor, rows: int, *, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(g)


def embedding_second_moment(g: Tensor, indices: Tensor, rows: int, *, precision: str = "ieee") -> Tensor:
    """See `hvpfast.ops.embedding_second_moment`; sums and results are float32 under every `precision`."""
    out = g.new_empty(rows, g.shape[2], dtype=torch.float32)
    if 0 in g.shape or rows == 0:
        return out.zero_()
    indices = indices.contiguous()
    ordered, order = indices.flatten().sort(stable=True)  # by row of the table, then by sample
    bounds = torch.searchsorted(ordered, torch.arange(rows + 1, dtype=ordered.dtype, device=g.device))
    with tiles.on_device(g):
        embedding_sample_norms.launch(g, order, indices, bounds, out, rows, False)
    return out
