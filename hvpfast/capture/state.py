"""The model's state is after a call what it was before it, whatever happens in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from hvpfast.capture import linear_twice, rows_twice
from hvpfast.capture.errors import StateError
from hvpfast.capture.modules import named_modules, parameters
from hvpfast.ops.shared import summed, wide

_measuring = 0  # how many `preserved` blocks are open


def measuring() -> bool:
    """Whether the model is being run by this package, within `preserved`: such passes are no part of the user's training."""
    return _measuring > 0


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Within the block the model may be run and differentiated; after it everything is as it was.

    Restored, also after an exception: train/eval of every submodule, buffers (values and identity), `.grad`,
    `requires_grad`, and the random state of the CPU and of the model's CUDA devices. Grad mode is on inside, also
    under `torch.no_grad()` or `torch.inference_mode()`. Inside, buffers are copies: a graph made there does not see the
    originals' versions, and nothing has to be written back. Embeddings have their true gradients inside, dense and not
    scaled by frequency (`sparse=True`, `scale_grad_by_freq=True` are about optimisers, not about the loss).

    Raises:
        StateError: an activation that a gradient needs was changed in place (autograd's own error, with what to do).
    """
    named = named_modules(model)
    modules = [module for _, module in named]
    modes = [(module, module.training) for module in modules]
    buffers = [(module, name, tensor) for module in modules for name, tensor in module._buffers.items()]
    leaves = [(p, p.grad, p.requires_grad) for p in {id(p): p for _, p in parameters(named)}.values()]
    devices = sorted({p.device.index for p, _, _ in leaves if p.device.type == "cuda"})
    random, cuda = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]
    copies: dict[int, torch.Tensor] = {}
    tables = [module for module in modules if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    options = [(module, module.sparse, module.scale_grad_by_freq) for module in tables]
    global _measuring
    _measuring += 1
    try:
        for module in tables:
            module.sparse = module.scale_grad_by_freq = False
        with torch.inference_mode(False), torch.enable_grad():
            for module, name, tensor in buffers:
                if tensor is not None:
                    copies.setdefault(id(tensor), tensor.detach().clone().requires_grad_(tensor.requires_grad))
                    module._buffers[name] = copies[id(tensor)]
            yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise StateError(
            f"an activation of {type(model).__name__} was changed in place after an operation had kept it for its "
            f"gradient: replace the in-place operation in the model's forward. ({str(error).split('. Hint')[0]})"
        ) from error
    finally:
        _measuring -= 1
        for module, training in modes:
            module.training = training
        for module, sparse, scaled in options:
            module.sparse, module.scale_grad_by_freq = sparse, scaled
        for module, name, tensor in buffers:
            module._buffers[name] = tensor
        for p, grad, requires_grad in leaves:
            if p.grad is not grad:
                p.grad = grad
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
        torch.set_rng_state(random)
        for device, state in zip(devices, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


@contextlib.contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Take implementations that can be differentiated twice: the math kernel of scaled dot-product attention, recurrent
    layers without their fused library calls, which have a first derivative only, bags of embeddings by plain ops for the same
    reason, weight normalisation by plain ops (torch's fused one takes the norms for constants in its second derivative, so
    that its Hessian is wrong), and activations, norm layers and, on GPUs, linear maps whose double backward is one op."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_without_onednn())
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if (
            linear_twice.wanted(model)
            or rows_twice.wanted(model)
            or any(_weight_normed(module) or isinstance(module, nn.EmbeddingBag) for module in model.modules())
        ):
            stack.enter_context(_PlainOps())
        yield


def _weight_normed(module: nn.Module) -> bool:
    """By a parametrisation, or by the older hook before the forward."""
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, nn.utils.parametrizations._WeightNorm) or any(
        isinstance(hook, WeightNorm) for hook in hooks
    )


class _PlainOps(TorchFunctionMode):
    """Functions of torch whose second derivative is wrong, missing or slower than need be, by others that have one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        if func is F.linear:
            return linear_twice.linear(*args, **(kwargs or {}))
        if func is F.embedding_bag:
            return _embedding_bag(*args, **(kwargs or {}))
        return rows_twice.REPLACED.get(func, func)(*args, **(kwargs or {}))


def _embedding_bag(
    indices: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """`F.embedding_bag`: bags (B, D), each the sum, mean or largest of its rows of weight (V, D)."""
    with torch.no_grad():  # raises what it raises, and renormalises the weight where that is asked for
        value = F.embedding_bag(
            indices,
            weight,
            offsets,
            max_norm,
            norm_type,
            False,
            mode,
            False,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    if indices.dim() == 2:
        width = indices.shape[1]
        starts = torch.arange(0, indices.numel(), max(width, 1), device=indices.device)[: indices.shape[0]]
        indices, factors = (
            indices.reshape(-1),
            per_sample_weights if per_sample_weights is None else per_sample_weights.reshape(-1),
        )
    else:
        starts, factors = offsets[:-1] if include_last_offset else offsets, per_sample_weights
    places = torch.arange(indices.numel(), device=indices.device)
    bag = torch.searchsorted(starts.contiguous(), places, right=True) - 1
    kept = torch.ones_like(indices, dtype=torch.bool)
    if padding_idx is not None:
        kept = indices != padding_idx % weight.shape[0]
    rows = F.embedding(
        indices, weight
    )  # whose gradient is summed in one order; weight[indices]'s is not, by several threads
    if mode == "max":  # of equal rows the first; the one in a bag's gradient is in no other's, so nothing is summed
        with torch.no_grad():
            largest = (rows == value[bag]) & kept.unsqueeze(1)
            first = torch.full_like(value, indices.numel(), dtype=torch.int64)
            candidates = torch.where(largest, places.unsqueeze(1), indices.numel())
            first = first.scatter_reduce(0, bag.unsqueeze(1).expand_as(rows), candidates, "amin")
        padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return padded.gather(0, first)
    rows = wide(rows) * (kept if factors is None else kept * factors).unsqueeze(1)
    total = summed(rows, bag, starts.numel())
    if mode == "mean":
        total = total / summed(kept.long(), bag, starts.numel()).clamp(min=1).unsqueeze(1)
    return total.to(weight.dtype)


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def refuse_dropout(model: nn.Module, who: str) -> None:
    """Raise StateError if a dropout layer is active, naming it."""
    active = [
        name or type(module).__name__
        for name, module in named_modules(model)
        if module.training
        and (
            (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
            or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0)
            or (isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1)
        )
    ]
    if active:
        raise StateError(
            f"{who}: dropout is active in {_listed(active)}: every product would belong to another random network. "
            f"Call model.eval(), or set p = 0"
        )


def refuse_batch_statistics(model: nn.Module, who: str) -> None:
    """Raise StateError if a BatchNorm layer normalises by the batch's own statistics, naming it."""
    active = [
        name or type(module).__name__
        for name, module in named_modules(model)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]
    if active:
        raise StateError(
            f"{who}: BatchNorm uses batch statistics in {_listed(active)}: one sample's output depends on the others, "
            f"so there are no per-sample quantities. Call model.eval() (or eval() of these layers), with "
            f"track_running_stats=True"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
