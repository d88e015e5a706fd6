"""Activations and norm layers whose double backward is one op: what `J v` and `H v` push through them, in one pass over memory.

Autograd makes it of a dozen passes and more: eleven kernels for a GELU, some thirty for a LayerNorm. Taken where a kernel of
`activation_rop` or `norm_rop` is expected to be faster; what is kept for the second derivative is what torch keeps. 16-bit
layers keep their own sums in 16 bits. Not taken: tanh, sigmoid and relu, which torch differentiates from their
results (the inputs would have to be kept as well), and the rest, which are few kernels or rare.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpfast import ops
from hvpfast.capture import stand_in

_aten = torch.ops.aten
_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
}
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda g, x: _aten.gelu_backward(g, x, approximate="tanh"),
    "silu": _aten.silu_backward,
    "mish": _aten.mish_backward,
    "softplus": lambda g, x: _aten.softplus_backward(g, x, 1, 20),
}
# The first derivative alone is as fast or faster in torch: 0.5x and 0.9x of 1M values on two cores with AVX-512, 2026-11-22.
_OWN_SLOPES = ("mish", "softplus")

_HERE = (nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.LayerNorm, nn.RMSNorm)


def wanted(model: nn.Module) -> bool:
    """Whether the model may call any of these: it has such a layer, or code of its own."""
    return any(isinstance(m, _HERE) or not type(m).__module__.startswith("torch.nn.") for m in model.modules()) or any(
        isinstance(m, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) for m in model.modules()
    )


# Activations -----------------------------------------------------------------------------------------------------------


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """`F.gelu`."""
    name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return _activated(name, input) if name and _activates(input) else F.gelu(input, approximate=approximate)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.silu`."""
    return F.silu(input, inplace) if inplace or not _activates(input) else _activated("silu", input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.mish`."""
    return F.mish(input, inplace) if inplace or not _activates(input) else _activated("mish", input)


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """`F.softplus`."""
    usual = beta == 1 and threshold == 20
    return _activated("softplus", input) if usual and _activates(input) else F.softplus(input, beta, threshold)


def _activates(x: Tensor) -> bool:
    if not stand_in.fit(x):
        return False
    with torch.no_grad():
        rows = x.detach()
        return stand_in.runs(ops.activation_rop, rows, rows, rows, activation="gelu")


def _activated(name: str, x: Tensor) -> Tensor:
    return _Activation.apply(x, name)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name):
        ctx.save_for_backward(x)
        ctx.kind = name
        ctx.set_materialize_grads(False)
        return _VALUES[name](x)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return None, None
        (x,) = ctx.saved_tensors
        return (_Slope.apply(g, x, ctx.kind) if torch.is_grad_enabled() else _SLOPES[ctx.kind](g, x)), None


class _Slope(torch.autograd.Function):
    """The first derivative phi'(x) o g."""

    @staticmethod
    def forward(ctx, g, x, name):
        ctx.save_for_backward(g, x)
        ctx.kind = name
        ctx.set_materialize_grads(False)
        return _SLOPES[name](g, x)

    @staticmethod
    def backward(ctx, c):
        of = "".join(letter for which, letter in enumerate("gx") if stand_in.wants(ctx, which))
        if c is None or not of:
            return None, None, None
        g, x = ctx.saved_tensors
        if of == "g" and ctx.kind in _OWN_SLOPES and not torch.is_grad_enabled():
            return _SLOPES[ctx.kind](c, x), None, None
        made = dict(zip(of, stand_in.taken(ops.activation_rop, x, g, c, activation=ctx.kind, of=of), strict=True))
        return made.get("g"), made.get("x"), None


# Norm layers -----------------------------------------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`."""
    if _normalises(input, normalized_shape, weight, bias):
        return _Norm.apply(input, stand_in.apart(weight), stand_in.apart(bias), tuple(normalized_shape), eps, True)
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`F.rms_norm`."""
    if _normalises(input, normalized_shape, weight):
        least = torch.finfo(input.dtype).eps if eps is None else eps
        return _Norm.apply(input, stand_in.apart(weight), None, tuple(normalized_shape), least, False)
    return F.rms_norm(input, normalized_shape, weight, eps)


def _normalises(x: Tensor, shape: list[int], *parameters: Tensor | None) -> bool:
    if not stand_in.fit(x, *parameters) or not x.numel() or tuple(x.shape[x.dim() - len(shape) :]) != tuple(shape):
        return False
    if any(p is not None and p.shape != tuple(shape) for p in parameters):
        return False  # torch says what is wrong
    with torch.no_grad():
        rows = x.detach().reshape(-1, torch.Size(shape).numel())
        return stand_in.runs(ops.norm_rop, rows, rows, rows[:, 0], c=rows, of="gx")


class _Norm(torch.autograd.Function):
    """LayerNorm or, not `centred`, RMSNorm: x (..., *shape), weight and bias (*shape)."""

    @staticmethod
    def forward(ctx, x, weight, bias, shape, eps, centred):
        if centred:
            y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        else:
            mean, rstd = _statistics(x, shape, eps, False)
            y = x * rstd if weight is None else x * rstd * weight
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.shape, ctx.eps = shape, eps
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, g):
        needed = ctx.needs_input_grad[:3]
        if g is None:
            return (None,) * 6
        take = _NormSlope.apply if torch.is_grad_enabled() else _slopes_of_norm
        return *take(g, *ctx.saved_tensors, ctx.shape, ctx.eps, needed), None, None, None


def _statistics(x: Tensor, shape: tuple[int, ...], eps: float, centred: bool) -> tuple[Tensor | None, Tensor]:
    """Mean (None: it is not taken out) and 1 / sqrt(variance + eps), (..., 1)."""
    axes = tuple(range(x.dim() - len(shape), x.dim()))
    mean = x.mean(axes, keepdim=True) if centred else None
    rest = x if mean is None else x - mean
    return mean, (rest.pow(2).mean(axes, keepdim=True) + eps).rsqrt()


def _slopes_of_norm(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    shape,
    eps,
    needed,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias, those that are needed."""
    if mean is not None:
        made = _aten.native_layer_norm_backward(g, x, shape, mean, rstd, weight, bias, list(needed))
        return tuple(y if need else None for y, need in zip(made, needed, strict=True))
    axes = tuple(range(x.dim() - len(shape), x.dim()))
    z, s = x * rstd, g if weight is None else g * weight
    return (
        rstd * (s - z * (s * z).mean(axes, keepdim=True)) if needed[0] else None,
        (g * z).reshape(-1, *shape).sum(0) if needed[1] else None,
        None,
    )


class _NormSlope(torch.autograd.Function):
    """The first derivatives, linear in g."""

    @staticmethod
    def forward(ctx, g, x, weight, bias, mean, rstd, shape, eps, needed):
        ctx.save_for_backward(g, x, weight, mean, rstd)
        ctx.shape, ctx.eps = shape, eps
        ctx.set_materialize_grads(False)
        return _slopes_of_norm(g, x, weight, bias, mean, rstd, shape, eps, needed)

    @staticmethod
    def backward(ctx, c, c_weight, c_bias):
        g, x, weight, mean, rstd = ctx.saved_tensors
        letters = "gx" if weight is None else "gxw"
        of = "".join(letter for which, letter in enumerate(letters) if stand_in.wants(ctx, which))
        given = {"c": c, "c_weight": c_weight, "c_bias": c_bias}
        if not of or all(y is None for y in given.values()):
            return (None,) * 9
        if torch.is_grad_enabled():  # a third derivative may be asked for: they are functions of x
            mean, rstd = _statistics(x, ctx.shape, ctx.eps, mean is not None)
        size = torch.Size(ctx.shape).numel()
        flat = {
            name: y if y is None else y.reshape(-1, size) if name == "c" else y.reshape(-1) for name, y in given.items()
        }
        flat["mean"], flat["weight"] = (y if y is None else y.reshape(-1) for y in (mean, weight))
        rows = x.reshape(-1, size), g.reshape(-1, size), rstd.reshape(-1)
        made = stand_in.taken(ops.norm_rop, *rows, of=of, **flat)
        found = dict(zip(of, made, strict=True))
        shapes = {"g": g, "x": x, "w": weight}
        return *(found[a].reshape(shapes[a].shape) if a in found else None for a in "gxw"), *(None,) * 6


REPLACED = {
    F.gelu: gelu,
    F.silu: silu,
    F.mish: mish,
    F.softplus: softplus,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
}
