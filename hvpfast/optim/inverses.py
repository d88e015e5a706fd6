"""New inverses of a preconditioner's layers: factors of one size together, and a layer that fails keeps its last one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hvpfast.operators.factor import Dense
from hvpfast.operators.spectral import cholesky_inverses, eigendecompose, pi
from hvpfast.optim.layers import KroneckerLayer, Layer, RowLayer


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
    inverses = dict(zip(dense, cholesky_inverses([factors[i] for i in dense], [shifts[i] for i in dense]), strict=True))
    for i, factor in enumerate(factors):
        if i not in inverses:
            inverses[i] = (factor.data + shifts[i][:, None]).reciprocal()
    for number, layer in enumerate(layers):
        layer.set_inverses(inverses[2 * number], inverses[2 * number + 1])


def _rows(layers: Sequence[RowLayer], damping: float, tolerance: float) -> None:
    whole = [layer for layer in layers if layer.running.values[0].dim() == 2]
    factors = [Dense(layer.running.values[0].unsqueeze(0)) for layer in whole]
    for layer, inverse in zip(whole, cholesky_inverses(factors, [damping] * len(factors)), strict=True):
        layer.set_inverse(inverse)
    for layer in layers:
        if layer.running.values[0].dim() == 1:
            layer.set_inverse(layer.running.values[0].clone())
