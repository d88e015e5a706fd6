"""What only the reference may touch: every op under autograd, torch.func's transforms and tracers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from hvpfast import ops
from hvpfast.arguments import real
from hvpfast.dispatch import OPS
from hvpfast.testing import make_inputs, pieces

A = torch.arange(6.0).reshape(3, 2)


def differentiable(name: str, **sizes) -> tuple[tuple, dict]:
    args, kwargs = make_inputs(name, **{"n": 3, "t": 2, "i": 4, "o": 3, **sizes}, dtype=torch.float64)
    kwargs.pop("out", None)
    return args, kwargs


def flat(result) -> Tensor:
    """All that an op returned as one tensor; a single tensor as it is."""
    return result if isinstance(result, Tensor) else torch.cat([x.flatten() for x in pieces(result)])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("sizes", ({}, {"t": 1}, {"k": 2}, {"t": 7}), ids=str)
def test_gradients_flow(name, sizes):
    args, kwargs = differentiable(name, **sizes)
    op = OPS[name]
    leaves = [x.clone().requires_grad_() for x in (*args, *kwargs.values()) if real(x)]

    def call(*xs):
        rest = iter(xs)
        filled = [next(rest) if real(x) else x for x in args]
        return op(*filled, **{key: next(rest) if real(x) else x for key, x in kwargs.items()})

    for backend in op.backends:
        reason = op.why_not(backend) or op.why_not(backend, leaves[0], *args[1:], **kwargs)
        assert reason is not None
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    with torch.no_grad():
        assert not any(x.requires_grad for x in pieces(call(*leaves)))


@pytest.mark.parametrize("name", OPS)
def test_functional_transforms(name):
    args, kwargs = differentiable(name)
    op = OPS[name]
    plain = flat(op.reference(*args, **kwargs))

    def call(x):
        return flat(op(x, *args[1:], **kwargs))

    def total(x):
        return call(x).sin().sum()

    stacked = torch.stack([args[0], 2 * args[0]])
    torch.testing.assert_close(torch.func.vmap(call)(stacked), torch.stack([plain, call(2 * args[0])]))
    leaf = args[0].clone().requires_grad_()
    total(leaf).backward()
    torch.testing.assert_close(torch.func.grad(total)(args[0]), leaf.grad)
    tangent = torch.randn_like(args[0])
    _, slope = torch.func.jvp(total, (args[0],), (tangent,))
    torch.testing.assert_close(slope, (leaf.grad * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[0], tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(total(dual)).tangent, slope)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("name", OPS)
def test_tracing(name):
    args, kwargs = differentiable(name)
    op = OPS[name]

    count = sum(isinstance(x, Tensor) for x in args)
    args, fixed = args[:count], args[count:]

    def call(*xs):
        return op(*xs, *fixed, **kwargs)

    expected = op.reference(*args, *fixed, **kwargs)
    torch._dynamo.reset()
    op._auto.clear(), op._loaded.clear()  # as in a process whose first call of the op is a compiled one
    torch.testing.assert_close(torch.compile(call, backend="eager", fullgraph=True)(*args), expected)
    others = tuple(x + 1 for x in args)
    for graph in (make_fx(call)(*args), torch.jit.trace(call, args, check_trace=False)):
        torch.testing.assert_close(graph(*others), op.reference(*others, *fixed, **kwargs))  # nothing was baked in
    with FlopCounterMode(display=False) as counter:
        call(*args)
    uncounted = (
        "softmax",
        "reorthogonalize",
        "cg_update",
        "activation_",
        "norm_",
        "bias_",
        "embedding_",
    )  # no product of two matrices
    assert name.startswith(uncounted) or counter.get_total_flops() > 0 or args[0].shape[1] == 1


def test_function_modes_pass():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        torch.testing.assert_close(ops.gram(A), A.T @ A)
    assert seen
