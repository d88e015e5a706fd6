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
from torch.autograd.function import BackwardCFunction


class Derivative:
    """Vector-Jacobian products of `outputs` in `inputs`, for K vectors.

    Args:
        outputs: one tensor or several, with their graph. inputs: leaves or graph tensors.
        together: push K vectors through the graph as one vmapped pass rather than one by one.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], together: bool):
        self.outputs, self.inputs, self.together = list(outputs), list(inputs), together

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """One (K, *output.shape) an output -> one (K, *input.shape) an input, None where it does not depend."""
        k = vectors[0].shape[0]
        if k > 1 and self.together:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings(
                        "ignore", message=".*performance drop because we have not yet implemented.*"
                    )
                    return list(self._grad(vectors, is_grads_batched=True))
            except RuntimeError as error:
                if "inplace operation" in str(error) or "second time" in str(error):
                    raise
                self.together = False  # an operation without a batching rule: one by one from now on
        rows = [self._grad([v[j] for v in vectors]) for j in range(k)]
        if k == 1:
            return [None if part is None else part.unsqueeze(0) for part in rows[0]]
        return [None if parts[0] is None else torch.stack(parts) for parts in zip(*rows, strict=True)]

    def _grad(self, vectors: Sequence[Tensor], **options) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(self.outputs, self.inputs, vectors, retain_graph=True, allow_unused=True, **options)


# Bytes of a graph up to which K vectors go through it faster together than one by one on a CPU. Measured on two cores
# with AVX-512, 2026-11-21, one thread, 16 columns, time a column against one by one: MLP 16-32-10 on 64 samples 0.38
# (Hessian) and 0.37 (GGN); 64-128-10 on 256 samples 1.3 and 0.8; 64-512-10 on 1024 samples 3.3 and 1.9.
_TOGETHER_BYTES = 1 << 18


def go_together(model: nn.Module, graph_bytes: int) -> bool:
    """Whether K vectors go through this model's graph faster as one vmapped pass than one by one.

    A vmapped convolution becomes a grouped one, recurrent layers have no batching rule, and on a CPU columns only share
    the overhead of calls: beyond small graphs their temporaries leave the cache.
    """
    if any(isinstance(module, (nn.modules.conv._ConvNd, nn.RNNBase)) for module in model.modules()):
        return False
    device = next(model.parameters()).device.type
    return device != "cpu" or graph_bytes <= _TOGETHER_BYTES


def gradient(output: Tensor, inputs: Sequence[Tensor], vector: Tensor | None = None) -> list[Tensor | None]:
    """The gradient with its own graph, None where there is no dependence."""
    return list(torch.autograd.grad(output, list(inputs), vector, create_graph=True, allow_unused=True))


def saved_bytes(roots: Sequence[Tensor]) -> int:
    """Bytes of the tensors that the graph behind `roots` keeps alive, each storage counted once."""
    stack = [x.grad_fn for x in roots if x is not None and x.grad_fn is not None]
    seen, storages = set(stack), {}
    while stack:
        node = stack.pop()
        names = [name for name in dir(node) if name.startswith("_saved_")]
        for name in (*names, *(("saved_tensors",) if isinstance(node, BackwardCFunction) else ())):
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
        f: the output, with its graph. inputs: the parameters. model: decides how K vectors go through the graph.
    """

    def __init__(self, f: Tensor, inputs: Sequence[Tensor], model: nn.Module):
        self.f, self.inputs = f, list(inputs)
        self._u = torch.zeros_like(f, requires_grad=True)
        self._pulled = gradient(f, self.inputs, self._u)  # J' u, linear in u
        self.reached = [x is not None for x in self._pulled]
        self.bytes = saved_bytes([f, *(x for x in self._pulled if x is not None)])  # that the kept graph holds
        self._together = go_together(model, self.bytes)
        self._vjp = Derivative([f], self.inputs, self._together)

    def jvp(self, parts: Sequence[Tensor], only: Sequence[int] | None = None) -> Tensor:
        """J v: one (K, *shape) a parameter -> (K, *f.shape); `only` some parameters' share of it."""
        chosen = range(len(self.inputs)) if only is None else only
        used = [i for i in chosen if self._pulled[i] is not None and self._pulled[i].requires_grad]
        if not used:
            return self.f.new_zeros(parts[0].shape[0], *self.f.shape)
        pull = Derivative([self._pulled[i] for i in used], [self._u], self._together)
        (result,) = pull([parts[i].to(self._pulled[i].dtype) for i in used])
        return self.f.new_zeros(parts[0].shape[0], *self.f.shape) if result is None else result

    def vjp(self, u: Tensor, only: Sequence[int] | None = None) -> list[Tensor | None]:
        """J' u: (K, *f.shape) -> one (K, *shape) a parameter (None: no dependence), or for the `only` ones."""
        if only is None:
            return self._vjp([u])
        return Derivative([self.f], [self.inputs[i] for i in only], self._together)([u])
