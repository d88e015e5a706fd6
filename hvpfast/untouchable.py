"""Which tensors only the reference may touch: what is differentiated, transformed, traced, or no plain strided tensor.

The questions run on every call of an op, so the CPU extension has them in C too (csrc/cpu/calls.cpp), for the usual case.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch_level = getattr(torch._C._functorch, "maybe_current_level", lambda: None)
_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)  # -1: no backward pass is running
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_jit_trace = getattr(torch._C, "_get_tracing_state", lambda: None)
is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_strided = torch.strided
_Parameter = torch.nn.Parameter
_SCALARS = frozenset((int, float, bool, str, type(None)))

# What the compiled questions ask, by the names that they know.
KNOWN = {
    "tensor": Tensor,
    "parameter": _Parameter,
    "strided": _strided,
    "float32": torch.float32,
    "transform": _functorch_level,
    "modes": _dispatch_modes,
    "tracing": _jit_trace,
    "backward": _graph_task,
    "grad_enabled": _is_grad_enabled,
    "batched": _is_batched,
    "negative": Tensor.is_neg,
    "increment": torch._C._increment_version,
    "threads": torch.get_num_threads,
    "product": torch.mm,
    "autocast": torch._C._is_any_autocast_enabled,
    "forward_ad": vars(forward_ad),
    "exchange": getattr(Tensor, "__dlpack_c_exchange_api__", None),
}
_plain: Callable | None = None
_fits: Callable | None = None


def take_compiled(calls: object, name: str) -> Callable | None:
    """Ask the compiled questions from now on, where `calls` has them. Returns the compiled form of whole calls of `name`."""
    global _plain, _fits
    _plain, _fits = getattr(calls, "plain", None), getattr(calls, "fits", None)
    return getattr(calls, f"{name}_call", None)


def fits(letters: str, *tensors: object) -> bool:
    """Whether all are floating CPU tensors of one dtype whose sizes are as "nti,mto" says, m a multiple of n: the usual case,
    found out without a reason. False also where no compiled kernel has been asked for yet."""
    return _fits is not None and not is_compiling() and _fits(letters, *tensors)


def untouchable(args: tuple, kwargs: dict) -> str | None:
    """Why no kernel may touch these tensors (only the reference can be differentiated, traced or transformed); that a compiler
    traces is asked before."""
    if _plain is not None and _plain(args, kwargs):
        return None
    if _functorch_level() is not None:
        return "the call is inside a torch.func transform (vmap, grad, jvp, ...)"
    if forward_ad._current_level >= 0:
        return "the call is inside forward-mode differentiation"
    if _dispatch_modes():
        return "a torch dispatch mode (make_fx, FakeTensorMode, FlopCounterMode, ...) watches the call"
    if _jit_trace() is not None:
        return "torch.jit.trace is tracing"
    if _graph_task() != -1 and any(isinstance(x, Tensor) and _is_batched(x) for x in (*args, *kwargs.values())):
        return "an argument stands for a batch (torch.autograd.grad with is_grads_batched)"
    graph = _is_grad_enabled()
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if kind is Tensor or kind is _Parameter:  # the common case first: this runs on every call
            if (graph and value.requires_grad) or value.layout is not _strided or value.is_neg():
                return _why_untouchable(value, graph)
        elif kind in _SCALARS:
            continue
        elif kind is list or kind is tuple:
            for one in value:
                reason = _why_untouchable(one, graph)
                if reason is not None:
                    return reason
        elif isinstance(value, Tensor):
            return _why_untouchable(value, graph)
    return None


def _why_untouchable(value: object, graph: bool) -> str | None:
    if not isinstance(value, Tensor):
        return None
    if type(value) not in (Tensor, _Parameter):
        return f"an argument is a {type(value).__name__}, not a plain tensor"
    if graph and value.requires_grad:
        return "an argument requires grad, and only the reference is differentiable"
    if value.layout is not _strided:
        return f"an argument has layout {value.layout}, not torch.strided"
    if value.is_neg():
        return "an argument is a lazily negated view; resolve_neg() makes it plain"
    return None
