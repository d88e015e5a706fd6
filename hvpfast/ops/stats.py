"""Per-sample gradients of what is no linear map - scales and shifts of norm layers, biases, embedding tables - summed over
positions and turned into norms and squares in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hvpfast.arguments import accumulate_dtype, alike, floats
from hvpfast.dispatch import op
from hvpfast.ops.shared import columns, pair, repeat, summed, wide
from hvpfast.untouchable import fits

KINDS = (None, "layer", "rms")


def _check_norm_sample_stats(x, g, *, kind=None, eps=0.0, mean=None, rstd=None):
    name = "norm_sample_stats"
    if not fits("nti,mti", x, g):
        pair(name, x, g)
        if x.shape[2] != g.shape[2]:
            raise ValueError(f"{name}: x has {x.shape[2]} features but g has {g.shape[2]}; they must be the same")
    if kind not in KINDS:
        raise ValueError(f"{name}: kind is {kind!r}; it must be None, 'layer' or 'rms'")
    for label, one in (("mean", mean), ("rstd", rstd)):
        if one is None:
            continue
        if kind is not None:
            raise ValueError(f"{name}: {label} is given and kind is {kind!r}, which computes it; give one of them")
        if not alike(x, one) and not (isinstance(one, Tensor) and one.dtype is accumulate_dtype(x.dtype)):
            floats(name, x=x, **{label: one})
        if one.dim() != 3 or any(size not in (1, full) for size, full in zip(one.shape, x.shape, strict=True)):
            raise ValueError(
                f"{name}: {label} has shape {tuple(one.shape)}; it must be {tuple(x.shape)}, or 1 in place of some of these"
            )


@op(check=_check_norm_sample_stats, backends=("cpu", "triton"))
def norm_sample_stats(
    x: Tensor,
    g: Tensor,
    *,
    kind: str | None = None,
    eps: float = 0.0,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norms and squares of the per-sample gradients of a norm layer's scale and shift, without them: LayerNorm, RMSNorm,
    GroupNorm, BatchNorm in eval mode, a scale alone.

    Row m has the gradients `s_m = sum_t g_mt o x^_nt` and `b_m = sum_t g_mt`, both (I,), with n = m % N and the
    normalised input `x^ = (x - mean) rstd`.

    Args:
        x: (N, T, I), the layer's input. g: (M, T, I), gradients at its output; row m pairs with x[m % N].
        kind: "layer": mean and variance of each position over its features; "rms": their mean square, and no mean; None:
            as `mean` and `rstd` say, x itself without them.
        eps: added to the variance or the mean square, with "layer" and "rms".
        mean, rstd: (N, T, I), or 1 in place of some of these; in the dtype of x or the result's.

    Returns:
        (sum of s_m^2 over I, of b_m^2 over I, sum of s_m^2 over M, of b_m^2 over M): (M,), (M,), (I,), (I,), float32 or
        float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    a, g = wide(x), wide(g)
    if kind == "layer":
        a = F.layer_norm(a, a.shape[2:], eps=eps)
    elif kind == "rms":
        a = F.rms_norm(a, a.shape[2:], eps=eps)
    a = a if mean is None else a - wide(mean)
    a = a if rstd is None else a * wide(rstd)
    scale, shift = (g * repeat(a, g)).sum(1).square(), g.sum(1).square()
    return scale.sum(1), shift.sum(1), scale.sum(0), shift.sum(0)


def _check_bias_sample_stats(g):
    floats("bias_sample_stats", g=g)
    if g.dim() != 3:
        raise ValueError(f"bias_sample_stats: g has shape {tuple(g.shape)}; it must be (M, T, O)")


@op(check=_check_bias_sample_stats, backends=("triton",))
def bias_sample_stats(g: Tensor) -> tuple[Tensor, Tensor]:
    """Norms and squares of a bias's per-sample gradients `b_m = sum_t g_mt`, without an (M, O) array.

    Args:
        g: (M, T, O), gradients at the output of what the bias is added to.

    Returns:
        (sum of b_m^2 over O, sum of b_m^2 over M): (M,), (O,), float32 or float64. Raises TypeError or ValueError.
    """
    squares = wide(g).sum(1).square()
    return squares.sum(1), squares.sum(0)


def _check_lookup(name: str, g: Tensor, indices: Tensor) -> None:
    floats(name, g=g)
    if not isinstance(indices, Tensor) or indices.dtype.is_floating_point or indices.dtype.is_complex:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{name}: indices is {got}; it must be a tensor of an integer dtype")
    if indices.device != g.device:
        raise ValueError(f"{name}: g is on {g.device} but indices is on {indices.device}; move one of them")
    shapes = f"g has shape {tuple(g.shape)} and indices {tuple(indices.shape)}"
    if g.dim() != 3 or indices.dim() != 2 or g.shape[1] != indices.shape[1]:
        raise ValueError(f"{name}: {shapes}; they must be (M, T, D) and (N, T)")
    if (g.shape[0] % indices.shape[0] if indices.shape[0] else g.shape[0]) != 0:
        raise ValueError(f"{name}: {shapes}; M must be a multiple of N (g[m] pairs with indices[m % N])")


def _check_embedding_sample_norms(g, indices):
    _check_lookup("embedding_sample_norms", g, indices)


@op(check=_check_embedding_sample_norms, backends=("triton",))
def embedding_sample_norms(g: Tensor, indices: Tensor) -> Tensor:
    """Squared norms of an embedding table's per-sample gradients: a row of the table gets the sum of g over the positions
    that looked it up. No (M, rows, D) array.

    Args:
        g: (M, T, D), gradients at the embedding's output. indices: (N, T) integers, the rows looked up; g[m] pairs with
            indices[m % N].

    Returns:
        (M,), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    sums, _ = _runs(wide(g), indices)
    return sums.square().sum((1, 2))


def _check_embedding_second_moment(g, indices, rows):
    _check_lookup("embedding_second_moment", g, indices)
    if not isinstance(rows, int) or rows < 0:
        raise ValueError(f"embedding_second_moment: rows is {rows!r}; it must be the number of the table's rows")


@op(check=_check_embedding_second_moment, backends=("triton",))
def embedding_second_moment(g: Tensor, indices: Tensor, rows: int) -> Tensor:
    """Sum over samples of the squared per-sample gradients of an embedding table, elementwise: see `embedding_sample_norms`.

    Args:
        g: (M, T, D). indices: (N, T) integers below `rows`; g[m] pairs with indices[m % N]. rows: of the table.

    Returns:
        (rows, D), float32 or float64: a sum, not a mean. Raises TypeError or ValueError where shapes do not fit.
    """
    sums, index = _runs(wide(g), indices)
    return summed(sums.square().flatten(0, 1), index.flatten(), rows)


def _runs(g: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of g over positions of one sample with one index, (M, T, D), zeros behind a sample's last; and the index of each,
    (M, T). As many as positions, whatever the indices are, so that nothing depends on their values but values."""
    (m, t, d), k = g.shape, columns(indices, g)
    indices = indices.long().repeat(k, 1)
    order = indices.argsort(dim=1, stable=True)
    ordered = indices.gather(1, order)
    first = torch.ones_like(ordered)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = first.cumsum(1) - 1
    place = torch.zeros_like(ordered).scatter(1, order, run) + t * torch.arange(m, device=g.device).unsqueeze(1)
    sums = summed(g.reshape(m * t, d), place.flatten(), m * t)
    return sums.view(m, t, d), torch.zeros_like(run).scatter(1, run, ordered)
