"""The Hessian of the loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hvpfast.capture.problem import Evaluated
from hvpfast.operators.curvature import Curvature
from hvpfast.operators.linearize import Derivative, go_together, gradient, saved_bytes


class _Piece:
    """H v of one batch by a second reverse pass through the kept graph of the gradient (Pearlmutter 1994)."""

    def __init__(self, evaluated: Evaluated, inputs: Sequence[Tensor], model: nn.Module):
        slope = gradient(evaluated.value, inputs)
        self.reached = [x is not None for x in slope]
        self._curved = [i for i, x in enumerate(slope) if x is not None and x.requires_grad]
        self._slope = [slope[i] for i in self._curved]
        self._bytes = saved_bytes(self._slope)
        self._derivative = Derivative(self._slope, inputs, go_together(model, self._bytes))
        self._count = len(inputs)

    def product(self, parts: Sequence[Tensor]) -> list[Tensor | None]:
        if not self._slope:  # the loss is linear in every parameter
            return [None] * self._count
        return self._derivative([parts[i] for i in self._curved])

    def bytes(self) -> int:
        return self._bytes


class Hessian(Curvature):
    """Hessian of the loss in the parameters, matrix-free and exact: the second derivative of the very scalar trained on.

    Args:
        model: a `torch.nn.Module`. In train mode BatchNorm normalises each batch by itself, and that is differentiated;
            its running statistics are put back. Dropout must be off.
        loss: a torch.nn loss, a torch.nn.functional loss or any callable(output, target) -> scalar. Over several batches
            means are weighted by what they are means over (valid targets, class weights, elements), sums are added.
        data: one (X, y) batch, a list of batches, or a DataLoader that gives the same batches in every pass.
        params: None for every parameter that requires grad; or a list of names or Parameters, or a dict of them.

    `H @ v`: (P,) -> (P,), (P, K) -> (P, K), or dicts and lists of tensors like the parameters; in their dtype and scale
    (mean or sum) of the loss. Each batch's gradient graph is kept between products while all fit in
    `HVPFAST_CACHE_BYTES` (default 2 GiB), so that further products cost no forward pass; changed parameters, buffers or
    modes are noticed and the graphs built anew.

    Raises:
        StateError: active dropout, a random model, data that change between products, activations changed in place.
        NonFiniteError: NaN or inf in the loss or a product. ValueError, TypeError: arguments that do not fit;
        parameters that no data reach.

    Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6, 1994.
    """

    _per_sample = False

    def _linearised(self, evaluated: Evaluated) -> _Piece:
        return _Piece(evaluated, list(self._params.values()), self.problem.model)
