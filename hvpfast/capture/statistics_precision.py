"""Linear maps and convolutions of passes whose results are statistics, forward and backward: in bf16x3 where a kernel is faster.

What reaches a Kronecker factor, a norm or a second moment is multiplied in that precision there anyway, and a backward pass is
linear in what it starts from. A forward pass is not: where an activation has a kink, a pre-activation that is off by 4e-6 of its
size takes the other side several times as often as float32's own rounding makes it (`python -m bench.precision`). So the forward
pass is float32's, but of statistics that are random draws themselves. Weights' gradients are formed only where something asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hvpfast import ops
from hvpfast.capture import stand_in
from hvpfast.dispatch import precision_in_use

_LEAST = 24, 48 * 48  # channels or features on either side, and numbers of a weight, from which on it may pay


@contextlib.contextmanager
def statistics_precision(model: nn.Module, drawn: bool = False) -> Iterator[None]:
    """Within the block, graphs of a float32 model on the CPU are made whose backward passes may run in bf16x3, unless `precision`
    says otherwise. `drawn`: the forward pass too, since the statistic's own random error is larger by orders."""
    wanted = precision_in_use() in ("auto", "bf16x3") and _wide(model) > (0 if drawn else 1)
    with _Statistics(drawn) if wanted else contextlib.nullcontext():
        yield


def _wide(model: nn.Module) -> int:
    """Weights that may be worth it. No gradient goes through the first layer's: of one alone only the forward pass is."""
    side, numbers = _LEAST
    return sum(
        p.dim() > 1 and p.dtype is torch.float32 and p.is_cpu and min(p.shape[:2]) >= side and p.numel() >= numbers
        for p in model.parameters()
    )


class _Statistics(TorchFunctionMode):
    def __init__(self, drawn: bool):
        super().__init__()
        self._drawn = drawn

    def __torch_function__(self, func, types, args=(), kwargs=None):
        taken = _REPLACED.get(func)
        return func(*args, **(kwargs or {})) if taken is None else taken(self._drawn, *args, **(kwargs or {}))


def _linear(drawn: bool, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (..., I), w (O, I), b (O,) -> (..., O)."""
    if (
        _asked(drawn, input)
        and stand_in.fit(input, weight, bias)
        and weight.dim() == 2
        and input.dim() > 1
        and input.shape[-1] == weight.shape[1]
    ):
        with torch.no_grad():
            pays = input.is_cpu and stand_in.runs(ops.matmul, _rows(input.detach()), weight.detach().T)
        if pays:
            return _Linear.apply(input, stand_in.apart(weight), stand_in.apart(bias), drawn)
    return F.linear(input, weight, bias)


def _asked(drawn: bool, x: Tensor) -> bool:
    """Whether either pass through a layer may be in bf16x3: backward, there is none to data."""
    return drawn or not isinstance(x, Tensor) or x.requires_grad


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, drawn):
        ctx.save_for_backward(x, w)
        ctx.set_materialize_grads(False)
        if not drawn:
            return F.linear(x, w, b)
        flat = stand_in.taken(ops.matmul, _rows(x), w.T, **({} if b is None else {"bias": b}))
        # Not a view, which an activation in place could not be applied to.
        return flat if x.dim() == 2 else torch.ops.aten._unsafe_view(flat, [*x.shape[:-1], len(w)])

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 4
        x, w = ctx.saved_tensors
        if torch.is_grad_enabled():  # it will be differentiated again
            return g @ w, _rows(g).T @ _rows(x), _rows(g).sum(0), None
        return (
            stand_in.taken(ops.matmul, _rows(g), w).reshape(x.shape) if stand_in.wants(ctx, 0) else None,
            _rows(g).T @ _rows(x) if stand_in.wants(ctx, 1) else None,
            _rows(g).sum(0) if stand_in.wants(ctx, 2) else None,
            None,
        )


def _convolution(axes: int):
    plain = (F.conv1d, F.conv2d)[axes - 1]

    def convolution(
        drawn: bool,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> Tensor:
        """`F.conv1d` or `F.conv2d`."""
        if (
            groups == 1
            and _asked(drawn, input)
            and stand_in.fit(input, weight, bias)
            and input.is_cpu
            and input.dim() == weight.dim() == axes + 2
        ):
            sides = _sides(padding, dilation, weight.shape[2:])
            if sides is not None and input.shape[1] == weight.shape[1]:
                how = {"stride": _each(stride, axes), "padding": sides, "dilation": _each(dilation, axes)}
                with torch.no_grad():
                    try:
                        pays = stand_in.runs(ops.convolve, input.detach(), weight.detach(), **how)
                    except (ValueError, TypeError):  # torch says what is wrong
                        pays = False
                if pays:
                    return _Convolution.apply(input, stand_in.apart(weight), stand_in.apart(bias), how, drawn)
        return plain(input, weight, bias, stride, padding, dilation, groups)

    return convolution


def _each(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes // len(value))


def _sides(
    padding: str | int | tuple[int, ...], dilation: int | tuple[int, ...], kernel: torch.Size
) -> tuple[int, ...] | None:
    """Pixels on either side; None where they differ."""
    if not isinstance(padding, str):
        return _each(padding, len(kernel))
    reach = [d * (k - 1) if padding == "same" else 0 for d, k in zip(_each(dilation, len(kernel)), kernel, strict=True)]
    return None if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, how, drawn):
        ctx.save_for_backward(x, w)
        ctx.how = how
        ctx.set_materialize_grads(False)
        if not drawn:
            return (F.conv1d, F.conv2d)[x.dim() - 3](x, w, b, how["stride"], how["padding"], how["dilation"])
        return stand_in.taken(ops.convolve, x, w, **how, **({} if b is None else {"bias": b}))

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 5
        x, w = ctx.saved_tensors
        again = torch.is_grad_enabled()  # it will be differentiated again
        wanted = [ctx.needs_input_grad[i] if again else stand_in.wants(ctx, i) for i in range(3)]
        of_x = None
        if wanted[0] and not again:
            of_x, wanted[0] = stand_in.taken(ops.convolve, g, w, **ctx.how, size=tuple(x.shape[2:])), False
        rest = (None, None, None)
        if any(wanted):
            how, axes = ctx.how, x.dim() - 2
            shape = [w.shape[0]] if wanted[2] else None
            rest = torch.ops.aten.convolution_backward(
                g, x, w, shape, how["stride"], how["padding"], how["dilation"], False, [0] * axes, 1, wanted
            )
        return rest[0] if of_x is None else of_x, rest[1], rest[2], None, None


_REPLACED = {F.linear: _linear, F.conv1d: _convolution(1), F.conv2d: _convolution(2)}
