"""Norms and squares of a bias's per-sample gradients, sum_t g_mt, in Triton: see `norm_sample_stats.py`."""

from __future__ import annotations

from torch import Tensor

from . import norm_sample_stats, tiles


def supports(g: Tensor, *, precision: str = "ieee") -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(g)


def bias_sample_stats(g: Tensor, *, precision: str = "ieee") -> tuple[Tensor, Tensor]:
    """See `hvpfast.ops.bias_sample_stats`; sums and results are float32 under every `precision`."""
    with tiles.on_device(g):
        _, norms, _, squares = norm_sample_stats.launch(None, g)
    return norms, squares
