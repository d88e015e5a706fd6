"""New inverses of a preconditioner's layers: factors of one size together, and a layer that fails keeps its last one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvpfast.operators.eigen import require_finite
from hvpfast.operators.factor import Dense
from hvpfast.operators.spectral import cholesky_inverses, eigendecompose, newton_schulz_inverses, pi
from hvpfast.optim.layers import KroneckerLayer, Layer, RowLayer

OFF = 1e-3  # of a residual: an inverse by products that leaves more is taken through Cholesky


def invert(layers: Sequence[Layer], damping: float, tolerance: float) -> dict[str, str]:
    """New inverses of all these layers, factors of one size together; the reason for each that had to keep its old one.

    Waits for the device: LAPACK's verdicts are looked at.
    """
    fine = [layer for layer in layers if layer.running is not None and bool(layer.running.started)]
    failed: dict[str, str] = {}
    for function in (_eigenbases, _factored, _rows):
        mine = [layer for layer in fine if function is _method(layer)]
        try:
            function(mine, damping, tolerance)
        except ValueError:  # the index in the message is of the batch: find the layer
            for layer in mine:
                try:
                    function([layer], damping, tolerance)
                except ValueError as error:
                    failed[layer.label] = str(error)
    return failed


def _method(layer: Layer):
    if isinstance(layer, RowLayer):
        return _rows
    return _eigenbases if layer.method == "eigen" else _factored


def _eigenbases(layers: Sequence[KroneckerLayer], damping: float, tolerance: float) -> None:
    factors = [factor for layer in layers for factor in layer.factors]
    before = [eigen if tolerance else None for layer in layers for eigen in (layer.eigen or (None, None))]
    found = eigendecompose(factors, previous=before, tolerance=tolerance)
    for layer, a, g in zip(layers, found[::2], found[1::2], strict=True):
        layer.set_eigen(a, g)


def _factored(layers: Sequence[KroneckerLayer], damping: float, tolerance: float) -> None:
    factors, shifts = [], []
    for layer in layers:
        a, g = layer.factors
        ratio = pi(a, g)
        factors += [a, g]
        shifts += [math.sqrt(damping) * ratio, math.sqrt(damping) / ratio]
    dense = [i for i, factor in enumerate(factors) if isinstance(factor, Dense)]
    invert_all = _by_products if layers and layers[0].method == "newton-schulz" else cholesky_inverses
    inverses = dict(zip(dense, invert_all([factors[i] for i in dense], [shifts[i] for i in dense]), strict=True))
    for i, factor in enumerate(factors):
        if i not in inverses:
            inverses[i] = (factor.data + shifts[i][:, None]).reciprocal()
    for number, layer in enumerate(layers):
        layer.set_inverses(inverses[2 * number], inverses[2 * number + 1])


def _by_products(factors: Sequence[Dense], shifts: Sequence[Tensor]) -> list[Tensor]:
    """Newton-Schulz inverses; those that are off, asked of one vector z, `|(A + d) X z - z| > OFF |z|`, through Cholesky."""
    require_finite("newton_schulz_inverses", factors)
    found = newton_schulz_inverses(factors, shifts, precision="bf16x3")
    gaps = []
    for factor, d, x in zip(factors, shifts, found, strict=True):
        z = torch.arange(1, factor.size + 1, dtype=x.dtype, device=x.device).cos()[:, None]
        y = x @ z
        gap = torch.linalg.vector_norm(factor.data @ y + d[:, None, None] * y - z, dim=(-2, -1))
        gaps.append((gap / torch.linalg.vector_norm(z)).amax())
    off = [i for i, gap in enumerate(torch.stack(gaps).tolist() if gaps else ()) if not gap <= OFF]  # NaN is off too
    again = cholesky_inverses([factors[i] for i in off], [shifts[i] for i in off])
    for i, x in zip(off, again, strict=True):
        found[i] = x
    return found


def _rows(layers: Sequence[RowLayer], damping: float, tolerance: float) -> None:
    whole = [layer for layer in layers if layer.running.values[0].dim() == 2]
    factors = [Dense(layer.running.values[0].unsqueeze(0)) for layer in whole]
    for layer, inverse in zip(whole, cholesky_inverses(factors, [damping] * len(factors)), strict=True):
        layer.set_inverse(inverse)
    for layer in layers:
        if layer.running.values[0].dim() == 1:
            layer.set_inverse(layer.running.values[0].clone())
