"""The Hessian of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hvpfast import ops
from hvpfast.capture.problem import Evaluated, Problem
from hvpfast.capture.torch_losses import CrossEntropy
from hvpfast.dispatch import BackendError
from hvpfast.operators.curvature import Curvature
from hvpfast.operators.linearize import Derivative, go_together, gradient, saved_bytes


class _LossSlope(torch.autograd.Function):
    """Cross-entropy's gradient in the model's output, whose own derivative is `softmax_hvp`: autograd forms it of five arrays
    of the output's size, which for a vocabulary is much of a product."""

    @staticmethod
    def forward(ctx, output, slope, loss, target):
        ctx.save_for_backward(output)
        ctx.product = loss.hessian(output, target)
        return slope

    @staticmethod
    @once_differentiable
    def backward(ctx, c):
        assert ctx.saved_tensors  # raises if the output was changed in place since
        return ctx.product(c.unsqueeze(0)).squeeze(0), None, None, None


def _fused(loss: object, output: object) -> bool:
    """Whether the loss is a cross-entropy of this output and `softmax_hvp` has a kernel that would run."""
    if type(loss) is not CrossEntropy or not isinstance(output, Tensor) or output.dim() < 2:
        return False
    if output.dtype not in (torch.float32, torch.float64) or not output.requires_grad:
        return False
    logits = output.detach().movedim(1, -1)
    try:
        return ops.softmax_hvp.choose(logits, logits).backend != "reference"
    except BackendError:  # another backend is forced
        return False


def _gradient(evaluated: Evaluated, inputs: Sequence[Tensor], problem: Problem) -> list[Tensor | None]:
    """The loss's gradient in the parameters, with its graph."""
    output = evaluated.output
    if not _fused(problem.loss, output):
        return gradient(evaluated.value, inputs)
    (slope,) = torch.autograd.grad(evaluated.value, output)
    return gradient(output, inputs, _LossSlope.apply(output, slope, problem.loss, evaluated.batch.target))


class _Piece:
    """H v of one batch by a second reverse pass through the kept graph of the gradient (Pearlmutter 1994)."""

    def __init__(self, evaluated: Evaluated, inputs: Sequence[Tensor], problem: Problem):
        slope = _gradient(evaluated, inputs, problem)
        self.reached = [x is not None for x in slope]
        self._curved = [i for i, x in enumerate(slope) if x is not None and x.requires_grad]
        self._slope = [slope[i] for i in self._curved]
        self._bytes = saved_bytes(self._slope)
        self._derivative = Derivative(self._slope, inputs, go_together(problem.model, self._bytes))
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
        return _Piece(evaluated, list(self._params.values()), self.problem)
