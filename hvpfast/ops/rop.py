"""Forward derivatives of layers: Pearlmutter's R-operator, of which products with Hessians and GGN matrices are made."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvpfast.arguments import accumulate_dtype, floats, usual
from hvpfast.dispatch import op
from hvpfast.ops.shared import wide
from hvpfast.untouchable import fits


def _check_linear_rop(x, w, dx, dw, *, db=None):
    name = "linear_rop"
    given = (x, w, dx, dw) if db is None else (x, w, dx, dw, db)
    if usual(*given):
        rows, weight, along, across = x.shape, w.shape, dx.shape, dw.shape
        if len(rows) == len(weight) == 2 and len(along) == 3 and rows[1] == weight[1] and along[1:] == rows:
            if across == (along[0], *weight) and (db is None or db.shape == across[:2]):
                return
    else:
        floats(name, x=x, w=w, dx=dx, dw=dw, **({} if db is None else {"db": db}))
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)} and w {tuple(w.shape)}; they must be (P, I) and (O, I): flatten leading axes"
        )
    if dx.dim() not in (2, 3) or dx.shape[-2:] != x.shape:
        raise ValueError(
            f"{name}: dx has shape {tuple(dx.shape)}; it must be (P, I) or (K, P, I) with (P, I) = {tuple(x.shape)}"
        )
    if dw.shape != (*dx.shape[:-2], *w.shape):
        raise ValueError(
            f"{name}: dw has shape {tuple(dw.shape)}; it must be {(*dx.shape[:-2], *w.shape)}: w's, K of them where dx has K"
        )
    if db is not None and db.shape != dw.shape[:-1]:
        raise ValueError(f"{name}: db has shape {tuple(db.shape)}; it must be {tuple(dw.shape[:-1])}, dw's without I")


@op(check=_check_linear_rop, backends=("triton",))
def linear_rop(x: Tensor, w: Tensor, dx: Tensor, dw: Tensor, *, db: Tensor | None = None) -> Tensor:
    """Derivative of a linear map `y = x w' + b` in a direction: `dx w' + x dw' + db`, as one product over [dx x] [w dw]'.

    Its reverse pass has derivatives of the same form: of `gx = g w` give `w.T` for w, of `gw = g' x` give `g.T` and `x.T`.

    Args:
        x: (P, I) inputs. w: (O, I). dx: (P, I), dw: (O, I), db: (O,) the direction; or with an axis K in front, for K of them.

    Returns:
        (P, O) or (K, P, O), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.

    Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6, 1994.
    """
    x, w, dx, dw = wide(x), wide(w), wide(dx), wide(dw)
    if dx.dim() == 2:
        first = dx @ w.T if db is None else torch.addmm(wide(db), dx, w.T)
        return torch.addmm(first, x, dw.T)
    first = dx @ w.T if db is None else dx @ w.T + wide(db)[:, None]
    return torch.baddbmm(first, x.expand(len(dx), *x.shape), dw.mT)


def _slopes(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The first and the second derivative at x: NaN at inf, as torch's first derivatives are."""
    first, second = _SLOPES[activation](x)
    odd = x - x
    return first + odd, second + odd


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clamp(-40.0, 40.0)  # beyond, both have their limits in every dtype, and squares do not overflow
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * density, density * (2 - x * x)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x s(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3)."""
    x = x.clamp(-40.0, 40.0)
    factor, cube = 2 * math.sqrt(2 / math.pi), 0.044715
    u, du, ddu = factor * (x + cube * x**3), factor * (1 + 3 * cube * x * x), factor * 6 * cube * x
    s, rest = torch.sigmoid(u), torch.sigmoid(-u)
    rate = s * rest
    return s + x * rate * du, 2 * rate * du + x * rate * ((rest - s) * du * du + ddu)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s, rest = torch.sigmoid(x), torch.sigmoid(-x)
    return s + x * s * rest, s * rest * (2 + x * (rest - s))


def _mish(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x t, t = tanh(log(1 + e^x)) = w / (w + 2), w = e^2x + 2 e^x."""
    up = x > 0
    e, s, rest = torch.exp(torch.where(up, -x, x)), torch.sigmoid(x), torch.sigmoid(-x)
    below = torch.where(up, 1 + 2 * e + 2 * e * e, 2 + 2 * e + e * e)
    t = torch.where(up, 1 + 2 * e, e * (e + 2)) / below
    rate = 4 * torch.where(up, e * e, 1.0) * ((1 + e) / below).square() * s  # dt / dx
    return t + x * rate, 2 * rate + x * rate * (rest - 2 * t * s)


def _softplus(x: Tensor) -> tuple[Tensor, Tensor]:
    s, rest, far = torch.sigmoid(x), torch.sigmoid(-x), x > 20  # where torch's is x
    return torch.where(far, 1.0, s), torch.where(far, 0.0, s * rest)


_SLOPES = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu, "mish": _mish, "softplus": _softplus}
ACTIVATIONS = tuple(_SLOPES)  # torch's, with its default options


_GX, _GXW = frozenset(("gx", "g", "x")), frozenset(("gxw", "gx", "gw", "xw", "g", "x", "w"))


def _which(name: str, of: str, letters: str) -> None:
    raise ValueError(
        f"{name}: of is {of!r}; it must be letters of {letters!r} in that order: whose cotangents are wanted"
    )


def _check_activation_rop(x, g, c, *, activation, of="gx"):
    if not usual(x, g, c):
        floats("activation_rop", x=x, g=g, c=c)
    if not x.shape == g.shape == c.shape:
        raise ValueError(
            f"activation_rop: x has shape {tuple(x.shape)}, g {tuple(g.shape)} and c {tuple(c.shape)}; they must be the same"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation_rop: activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if of not in _GX:
        _which("activation_rop", of, "gx")


@op(check=_check_activation_rop, backends=("cpu", "triton"))
def activation_rop(x: Tensor, g: Tensor, c: Tensor, *, activation: str, of: str = "gx") -> tuple[Tensor, ...]:
    """Double backward of an activation: with its first, `gx = phi'(x) o g`, and c the cotangent of gx, those of g and x,
    `phi'(x) o c` and `phi''(x) o g o c`.

    Args:
        x: its input, g: the gradient at its output, c: shaped like x. activation: "gelu", "gelu_tanh", "silu", "mish" or
            "softplus", with torch's default options. of: "gx", or "g" or "x" alone; nothing else is computed.

    Returns:
        A tuple of what `of` names, shaped like x, float32 or float64. Raises TypeError or ValueError where shapes, dtypes or
        devices do not fit, or for other names.

    Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6, 1994.
    """
    x, g, c = wide(x), wide(g), wide(c)
    first, second = _slopes(x, activation)
    return tuple(first * c if letter == "g" else second * g * c for letter in of)


def _check_norm_tensors(name, x, g, rstd, c, mean, weight, c_weight, c_bias):
    each = {"x": x, "g": g, "c": c, "weight": weight, "c_weight": c_weight, "c_bias": c_bias}
    floats(name, **{label: y for label, y in each.items() if y is not None})
    floats(name, rstd=rstd, **({} if mean is None else {"mean": mean}))
    if rstd.device != x.device:
        raise ValueError(f"{name}: x is on {x.device} but rstd is on {rstd.device}; move one of them")
    if rstd.dtype not in (x.dtype, accumulate_dtype(x.dtype)):
        raise TypeError(
            f"{name}: rstd is {rstd.dtype}; for x in {x.dtype} it must be that or {accumulate_dtype(x.dtype)}"
        )
    shape = x.shape
    if len(shape) != 2:
        raise ValueError(
            f"{name}: x has shape {tuple(shape)}; it must be (P, I): flatten what is normalised over, and the rest"
        )
    rows, features = shape[:1], shape[1:]
    for label, y, needed in (
        ("g", g, shape), ("c", c, shape), ("rstd", rstd, rows), ("mean", mean, rows), ("weight", weight, features),
        ("c_weight", c_weight, features), ("c_bias", c_bias, features),
    ):  # fmt: skip
        if y is not None and y.shape != needed:
            raise ValueError(
                f"{name}: {label} has shape {tuple(y.shape)}; for x {tuple(shape)} it must be {tuple(needed)}"
            )


def _check_norm_rop(x, g, rstd, *, c=None, mean=None, weight=None, c_weight=None, c_bias=None, of="gxw"):
    name, given, letters = "norm_rop", [x, g, rstd], "pi,pi,p"
    if c is not None:
        given.append(c)
        letters += ",pi"
    if mean is not None:
        given.append(mean)
        letters += ",p"
    for y in (weight, c_weight, c_bias):
        if y is not None:
            given.append(y)
            letters += ",i"
    if not fits(letters, *given):  # the usual case, found out without a reason
        _check_norm_tensors(name, x, g, rstd, c, mean, weight, c_weight, c_bias)
    if of not in _GXW:
        _which(name, of, "gxw")
    if c is None and c_weight is None and c_bias is None:
        raise ValueError(f"{name}: c, c_weight and c_bias are all None; give at least one cotangent")
    if "w" in of and weight is None:
        raise ValueError(f"{name}: of is {of!r} but weight is None: there is nothing for 'w'; leave it out")


@op(check=_check_norm_rop, backends=("cpu", "triton"))
def norm_rop(
    x: Tensor,
    g: Tensor,
    rstd: Tensor,
    *,
    c: Tensor | None = None,
    mean: Tensor | None = None,
    weight: Tensor | None = None,
    c_weight: Tensor | None = None,
    c_bias: Tensor | None = None,
    of: str = "gxw",
) -> tuple[Tensor, ...]:
    """Double backward of LayerNorm and RMSNorm, `y = w o z + b` with z = (x - mean) rstd row by row.

    The first backward gives `gx = R(w o g)`, `R h = rstd (h - <h> - z <h o z>)` (<> the mean of a row; without `mean`
    RMSNorm's: no <h>), gw = sum_p g o z and gb = sum_p g. From their cotangents come those of

    - g: `w o R c + c_weight o z + c_bias`
    - x: `R h - rstd^2 z (<c o w o g> - <c> <w o g> - <c o z> <w o g o z>)`,
      h = c_weight o g - rstd (w o g <c o z> + c <w o g o z>)
    - w: `sum_p g o R c`

    Args:
        x: (P, I) input, g: (P, I) the gradient at the output. rstd, mean: (P,) the row's, of x's dtype or the result's; mean
            None: RMSNorm. weight: (I,), None for ones.
        c: (P, I) cotangent of gx, c_weight, c_bias: (I,) of gw and gb; None for zeros.
        of: letters of "gxw", in that order: which cotangents are wanted; nothing else is computed.

    Returns:
        A tuple of what `of` names, (P, I), (P, I) and (I,), float32 or float64. Raises TypeError or ValueError where shapes,
        dtypes or devices do not fit.

    Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6, 1994.
    """
    x, g, c, mean, rstd = (y if y is None else wide(y) for y in (x, g, c, mean, rstd))
    weight, c_weight, c_bias = (y if y is None else wide(y) for y in (weight, c_weight, c_bias))
    inverse = rstd.unsqueeze(1)
    z = (x if mean is None else x - mean.unsqueeze(1)) * inverse
    c = torch.zeros_like(x) if c is None else c

    def average(h: Tensor) -> Tensor:
        return h.mean(1, keepdim=True)

    def apply(h: Tensor) -> Tensor:
        rest = h if mean is None else h - average(h)
        return inverse * (rest - z * average(h * z))

    made = {}
    if "g" in of or "w" in of:
        pushed = apply(c)
        made["w"] = (g * pushed).sum(0)
        made["g"] = pushed if weight is None else pushed * weight
        if c_weight is not None:
            made["g"] = made["g"] + c_weight * z
        if c_bias is not None:
            made["g"] = made["g"] + c_bias
    if "x" in of:
        scaled = g if weight is None else g * weight
        along_c, along_g = average(c * z), average(scaled * z)
        h = -inverse * (scaled * along_c + c * along_g)
        spread = average(c * scaled) - along_c * along_g
        if mean is not None:
            spread = spread - average(c) * average(scaled)
        made["x"] = apply(h if c_weight is None else h + c_weight * g) - inverse.square() * z * spread
    return tuple(made[letter] for letter in of)
