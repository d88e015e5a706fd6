"""What layers that stand in for torch's ask before they do, and of the pass that differentiates them."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.dispatch import BackendError, Op
from hvpfast.untouchable import is_compiling

_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore: None)
_will_execute = getattr(torch._C, "_will_engine_execute_node", lambda node: True)


def fit(*tensors: Tensor | None) -> bool:
    """Whether a graph is made, in full precision, and nobody watches what it keeps: checkpoints make it again, and compare."""
    if is_compiling():
        return False
    there = [x for x in tensors if x is not None]
    return (
        all(isinstance(x, Tensor) and x.dtype is there[0].dtype for x in there)
        and there[0].dtype in (torch.float32, torch.float64)
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in there)
        and not torch.is_autocast_enabled(there[0].device.type)
        and _top_hooks(True) is None
    )


def runs(op: Op, *args, **kwargs) -> bool:
    """Whether a kernel would run."""
    try:
        return op.choose(*args, **kwargs).backend != "reference"
    except BackendError:
        return False


def wants(ctx, which: int) -> bool:
    """Whether the backward pass that runs now needs the gradient of a tensor argument."""
    node = ctx.next_functions[which][0] if ctx.needs_input_grad[which] else None
    try:
        return node is not None and _will_execute(node)
    except RuntimeError:  # it cannot tell of a leaf
        return True


def taken(op: Op, *args, **kwargs) -> tuple[Tensor, ...]:
    try:
        return op(*args, **kwargs)
    except BackendError:  # another backend is forced, which has no kernel for it
        return op.reference(*args, **kwargs)


def apart(p: Tensor | None) -> Tensor | None:
    """A view: of a leaf, the engine does not tell whether its gradient is wanted."""
    return p.view_as(p) if p is not None and p.requires_grad and p.is_leaf else p
