"""Dense matrices by plain autograd, written without hvpfast: what every operator is held against."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def call(model: nn.Module, inputs: object) -> Tensor:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def take(item: object, index: slice) -> object:
    """Rows of a batch's input or target."""
    if isinstance(item, Tensor):
        return item[index]
    if isinstance(item, dict):
        return {name: take(value, index) for name, value in item.items()}
    return tuple(take(value, index) for value in item)


def flat_grad(value: Tensor, params: list[Tensor], **options) -> Tensor:
    grads = torch.autograd.grad(value, params, allow_unused=True, **options)
    return torch.cat(
        [torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1) for g, p in zip(grads, params, strict=True)]
    )


def parameters(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def dense_hessian(value: Tensor, params: list[Tensor]) -> Tensor:
    slope = flat_grad(value, params, create_graph=True)
    zero = sum((p * 0).sum() for p in params)  # a loss linear in a parameter still has a Hessian: zeros
    return torch.stack([flat_grad(s + zero, params, retain_graph=True) for s in slope])


def dense_ggn(model: nn.Module, loss, inputs, target) -> Tensor:
    """J' S J over the whole data as one batch."""
    params = parameters(model)
    output = call(model, inputs)
    jacobian = torch.stack([flat_grad(f, params, retain_graph=True) for f in output.reshape(-1)])
    middle = torch.autograd.functional.hessian(lambda f: loss(f, target), output.detach())
    return jacobian.T @ middle.reshape(output.numel(), output.numel()) @ jacobian


def own_gradients(model: nn.Module, loss, inputs, target) -> Tensor:
    """(N, P): the gradient of each sample's own loss, one at a time."""
    params = parameters(model)
    n = target.shape[0]
    return torch.stack(
        [flat_grad(loss(call(model, take(inputs, slice(i, i + 1))), target[i : i + 1]), params) for i in range(n)]
    )


def block_mask(names: list[str], sizes: list[int]) -> Tensor:
    """(P, P) of 0 and 1: 1 where two parameters belong to one module."""
    owner = torch.cat(
        [torch.full((size,), hash(name.rpartition(".")[0])) for name, size in zip(names, sizes, strict=True)]
    )
    return (owner[:, None] == owner[None, :]).double()


def relative(actual: Tensor, truth: Tensor) -> float:
    return float((actual - truth).norm() / truth.norm().clamp(min=1e-300))
