"""Double backward of an activation in Triton: phi'(x) o c and phi''(x) o g o c in one pass over x, g and c.

A program owns BLOCK values. One exponential serves both slopes: of -x^2 / 2 for GELU, whose distribution function is that times
a polynomial in t = 1 / (1 + 0.27 |x|), else of -|x|, from which the sigmoids of x and -x come without cancellation. Bytes: x,
g and c read once, 4 bytes written for each value asked for. Sums: none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles

BLOCK, WARPS = 1024, 4  # not yet measured on a GPU
KINDS = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "mish": 3, "softplus": 4}


@triton.jit
def _slopes(given, KIND: tl.constexpr):
    """The first and the second derivative; far out, where both have their limits, those of the nearest x within."""
    far: tl.constexpr = 16.0 if KIND <= 1 else 128.0
    x = tl.where(given > far, far, tl.where(given < -far, -far, given))
    if KIND == 0:
        z, e = tl.abs(x), tl.exp(-0.5 * x * x)
        t = 1.0 / (1.0 + 0.27 * z)
        q = 0.029408782720565796 * t - 0.12868988513946533
        q = q * t + 0.17438653111457825
        q = q * t - 0.07450966536998749
        q = q * t + 0.11149585247039795
        q = q * t + 0.0704902932047844
        q = q * t + 0.10220596939325333
        q = q * t + 0.10748834908008575
        q = q * t + 0.10772377997636795
        below, density = e * t * q, e * 0.3989422804014327  # of -|x|: Phi, and its slope
        first = tl.where(x < 0, below, 1.0 - below) + x * density
        second = density * (2.0 - x * x)
    else:
        if KIND == 1:  # x s(u)
            u = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
            du = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
            ddu = 1.5957691216057308 * 0.26829 * x
        else:
            u = x
        e = tl.exp(-tl.abs(u))
        r = 1.0 / (1.0 + e)
        s, rest, rate = tl.where(u < 0, e * r, r), tl.where(u < 0, r, e * r), e * r * r
        if KIND == 4:
            first, second = tl.where(x > 20.0, 1.0, s), tl.where(x > 20.0, 0.0, rate)
        elif KIND == 3:  # x t, t = w / (w + 2), w = e^2x + 2 e^x
            below = 1.0 / tl.where(x < 0, 2.0 + 2.0 * e + e * e, 1.0 + 2.0 * e + 2.0 * e * e)
            t = tl.where(x < 0, e * (e + 2.0), 1.0 + 2.0 * e) * below
            part = (1.0 + e) * below
            dt = 4.0 * tl.where(x < 0, 1.0, e * e) * part * part * s
            first, second = t + x * dt, 2.0 * dt + x * dt * (rest - 2.0 * t * s)
        elif KIND == 2:
            first, second = s + x * rate, rate * (2.0 + x * (rest - s))
        else:
            first = s + x * rate * du
            second = 2.0 * rate * du + x * rate * ((rest - s) * du * du + ddu)
    odd = given - given  # NaN of inf and NaN
    return first + odd, second + odd


@triton.jit
def _activation_kernel(
    x_ptr, g_ptr, c_ptr, of_g_ptr, of_x_ptr, count, KIND: tl.constexpr, OF_G: tl.constexpr, OF_X: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK values of contiguous x, g and c."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    first, second = _slopes(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), KIND)
    c = tl.load(c_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if OF_G:
        tl.store(of_g_ptr + at, first * c, mask=inside)
    if OF_X:
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_x_ptr + at, second * g * c, mask=inside)


def supports(
    x: Tensor, g: Tensor, c: Tensor, *, activation: str, of: str = "gx", precision: str = "ieee"
) -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    return tiles.unfit(x, g, c)


def worthwhile(
    x: Tensor, g: Tensor, c: Tensor, *, activation: str, of: str = "gx", precision: str = "ieee"
) -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return None  # the reference is ten launches or more, and passes over memory


def activation_rop(
    x: Tensor, g: Tensor, c: Tensor, *, activation: str, of: str = "gx", precision: str = "ieee"
) -> tuple[Tensor, ...]:
    """See `hvpfast.ops.activation_rop`; results are float32 under every `precision`."""
    x, g, c = x.contiguous(), g.contiguous(), c.contiguous()
    made = {letter: x.new_empty(x.shape, dtype=torch.float32) for letter in of}
    if x.numel():
        with tiles.on_device(x):
            _activation_kernel[triton.cdiv(x.numel(), BLOCK),](
                x, g, c, made.get("g", x), made.get("x", x), x.numel(), KIND=KINDS[activation], OF_G="g" in made,
                OF_X="x" in made, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return tuple(made.values())
