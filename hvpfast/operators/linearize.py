"""Derivatives of one batch as linear maps, with the graph kept: products cost no second forward pass.

`f` is the batch's output (or its loss) as a function of the parameters. With a dummy `u` shaped like f, the gradient
graph of `J' u` is built once; it is linear in u, so its own gradient in u is `J v`: forward-mode products by two
reverse passes (no forward-mode formulas needed), 4/3 of a gradient for a whole `J' S J v` once the graph is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Derivative:
    """Vector-Jacobian products of `outputs` in `inputs`, for K vectors at once where that is faster.

    Args:
        outputs: one tensor or several, with their graph. inputs: leaves or graph tensors.
        batched: push K vectors through the graph as one vmapped pass rather than one by one.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], batched: bool):
        self.outputs, self.inputs, self.batched = list(outputs), list(inputs), batched

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """One (K, *output.shape) an output -> one (K, *input.shape) an input, None where it does not depend."""
        k = vectors[0].shape[0]
        if k > 1 and self.batched:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings(
                        "ignore", message=".*performance drop because we have not yet implemented.*"
                    )
                    return list(self._grad(vectors, is_grads_batched=True))
            except RuntimeError as error:
                if "inplace operation" in str(error) or "second time" in str(error):
                    raise
                self.batched = False  # an operation without a batching rule: one by one from now on
        rows = [self._grad([v[j] for v in vectors]) for j in range(k)]
        return [None if parts[0] is None else torch.stack(parts) for parts in zip(*rows, strict=True)]

    def _grad(self, vectors: Sequence[Tensor], **options) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(self.outputs, self.inputs, vectors, retain_graph=True, allow_unused=True, **options)


def vmaps_well(model: nn.Module) -> bool:
    """Whether K vectors go through this model's graph faster together than one by one.

    Measured on a 2-core AVX-512 CPU, 2026-11: an MLP's products are twice as fast a column with 10 columns, a CNN's
    are not (a vmapped convolution becomes a grouped one), and need the memory of all columns.
    """
    convolutions = (nn.modules.conv._ConvNd, nn.RNNBase)
    return not any(isinstance(module, convolutions) for module in model.modules())


def gradient(output: Tensor, inputs: Sequence[Tensor], vector: Tensor | None = None) -> list[Tensor | None]:
    """The gradient with its own graph, None where there is no dependence."""
    return list(torch.autograd.grad(output, list(inputs), vector, create_graph=True, allow_unused=True))


def saved_bytes(roots: Sequence[Tensor]) -> int:
    """Bytes of the tensors that the graph behind `roots` keeps alive, each storage counted once."""
    stack = [x.grad_fn for x in roots if x is not None and x.grad_fn is not None]
    seen, storages = set(stack), {}
    while stack:
        node = stack.pop()
        for name in dir(node):
            if name.startswith("_saved_"):
                try:
                    value = getattr(node, name)
                except RuntimeError:  # freed, or changed in place: the product will say so
                    continue
                for x in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
                        storage = x.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return sum(storages.values())


class Jacobian:
    """J of a batch's output `f` in the parameters: `jvp` and `vjp`, K vectors at once, the graph kept.

    Args:
        f: the output, with its graph. inputs: the parameters.
    """

    def __init__(self, f: Tensor, inputs: Sequence[Tensor], batched: bool):
        self.f, self.inputs = f, list(inputs)
        self._u = torch.zeros_like(f, requires_grad=True)
        self._pulled = gradient(f, self.inputs, self._u)  # J' u, linear in u
        self._batched = batched
        self._vjp = Derivative([f], self.inputs, batched)
        self.reached = [x is not None for x in self._pulled]

    def jvp(self, parts: Sequence[Tensor], only: Sequence[int] | None = None) -> Tensor:
        """J v: one (K, *shape) a parameter -> (K, *f.shape); `only` some parameters' share of it."""
        chosen = range(len(self.inputs)) if only is None else only
        used = [i for i in chosen if self._pulled[i] is not None and self._pulled[i].requires_grad]
        if not used:
            return self.f.new_zeros(parts[0].shape[0], *self.f.shape)
        pull = Derivative([self._pulled[i] for i in used], [self._u], self._batched)
        (result,) = pull([parts[i].to(self._pulled[i].dtype) for i in used])
        return self.f.new_zeros(parts[0].shape[0], *self.f.shape) if result is None else result

    def vjp(self, u: Tensor, only: Sequence[int] | None = None) -> list[Tensor | None]:
        """J' u: (K, *f.shape) -> one (K, *shape) a parameter (None: no dependence), or for the `only` ones."""
        if only is None:
            return self._vjp([u])
        return Derivative([self.f], [self.inputs[i] for i in only], self._batched)([u])

    def bytes(self) -> int:
        """Memory that the kept graph holds."""
        return saved_bytes([self.f, *(x for x in self._pulled if x is not None)])
