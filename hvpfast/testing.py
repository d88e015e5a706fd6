"""How results are held against the truth: one accuracy rule, and inputs for every op. Tests, benches and users share it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hvpfast import dispatch, ops

# Relative errors that the reduced precisions promise for float32 data (Frobenius norm, float32 sums).
STATED_BOUND = {"bf16x3": 5e-6, "bf16": 5e-3}
# One product is off by up to 3 * 2^-18 (bf16x3) or 2^-8 (bf16) of itself, a square by twice that; a single element of few
# terms averages nothing away, so the worst element may be this many times further off than the norm.
_WORST_ELEMENT = 4
LAYOUTS = ("contiguous", "strided", "transposed", "offset")


def pieces(result) -> list[Tensor]:
    """The tensors of what an op returned: one, or those of a tuple or list."""
    return [result] if isinstance(result, Tensor) else [x for part in result for x in pieces(part)]


def error(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative errors of `actual`: in the Frobenius norm, and of the worst element against the largest one.

    A NaN or inf that the truth does not have gives inf.
    """
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    difference = actual - truth
    if truth.numel() == 0:
        return 0.0, 0.0
    if not bool(torch.isfinite(difference).all()):
        return math.inf, math.inf
    norm, largest = float(truth.norm()), float(truth.abs().max())
    if largest == 0:
        return (0.0, 0.0) if float(difference.abs().max()) == 0 else (math.inf, math.inf)
    return float(difference.norm()) / norm, float(difference.abs().max()) / largest


def assert_accurate(
    actual, reference: Callable, *args, precision: str = "ieee", allowance: float = 8.0, **kwargs
) -> None:
    """Raise AssertionError unless a kernel's result is as accurate as its reference in the working dtype may be.

    The truth is the reference on float64 copies of the arguments. The result passes if, in both measures of `error`,
    `err(actual) <= 3 err(reference in the working dtype) + allowance * eps`, eps being that of the dtype that such arguments are
    summed in; for a reduced `precision` and float32 data its stated bound is added (four times for one element).

    Args:
        actual: what the kernel returned; each tensor of a tuple is held. reference: an `Op` (its reference is taken) or a
            function.
        args, kwargs: the arguments that the kernel got; `out` must hold what it held before the call.
        precision: "ieee", "bf16x3" or "bf16", the one in which the kernel ran.
    """
    function = reference.reference if isinstance(reference, dispatch.Op) else reference
    dtype = next(x.dtype for x in args if isinstance(x, Tensor))
    with torch.no_grad():
        truth = function(*_converted(args, torch.float64), **_converted(kwargs, torch.float64))
        working = function(*_converted(args, None), **_converted(kwargs, None))
    eps = torch.finfo(ops.accumulate_dtype(dtype)).eps
    extra = STATED_BOUND.get(precision, 0.0) if dtype is torch.float32 else 0.0
    for found, exact, rounded in zip(*(pieces(x) for x in (actual, truth, working)), strict=True):
        _hold(found, exact, rounded, dtype, allowance * eps, extra)


def _hold(actual: Tensor, truth: Tensor, working: Tensor, dtype: torch.dtype, floor: float, extra: float) -> None:
    if actual.shape != truth.shape:
        raise AssertionError(f"got shape {tuple(actual.shape)}, the reference gives {tuple(truth.shape)}")
    if actual.dtype != working.dtype:
        raise AssertionError(f"got {actual.dtype}, the reference gives {working.dtype}")
    for measure, times, got, own in zip(
        ("Frobenius", "largest element"), (1, _WORST_ELEMENT), error(actual, truth), error(working, truth), strict=True
    ):
        most = floor + times * extra
        if not got <= 3 * own + most:
            raise AssertionError(
                f"relative error ({measure}) {got:.3e} exceeds 3 x {own:.3e} (the reference's own in {dtype}) + {most:.1e}"
            )


def _converted(values, dtype: torch.dtype | None):
    """Copies of tensors (floating ones in `dtype` where given), inside tuples, lists and dicts too; anything else unchanged."""
    if isinstance(values, Tensor):
        whole = dtype is None or not values.is_floating_point()
        return values.detach().clone() if whole else values.detach().to(dtype, copy=True)
    if isinstance(values, dict):
        return {name: _converted(value, dtype) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_converted(value, dtype) for value in values)
    return values


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout: one of `LAYOUTS`."""
    if layout == "contiguous" or x.dim() == 0:
        return x.contiguous()
    if layout == "strided":  # every second element of the last axis
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), _poison(x))
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "transposed":  # the last axis is the slowest
        return x.permute(-1, *range(x.dim() - 1)).contiguous().permute(*range(1, x.dim()), 0)
    if layout == "offset":  # rows longer than they need be, and a base address off every alignment
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), _poison(x))
        wide[..., 1 : 1 + x.shape[-1]] = x
        return wide[..., 1 : 1 + x.shape[-1]]
    raise ValueError(f"laid_out: got {layout!r}; it must be one of {', '.join(LAYOUTS)}")


def _poison(x: Tensor) -> float | int:
    """What nobody should read."""
    return math.nan if x.is_floating_point() else -(1 << 40)


def make_inputs(
    name: str,
    *,
    n: int = 4,
    t: int = 1,
    i: int = 5,
    o: int = 3,
    k: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layout: str = "contiguous",
    seed: int = 0,
) -> tuple[tuple, dict]:
    """Random arguments for the op called `name`: (args, kwargs) for N = n, T = t, I = i, O = o, K = k.

    Normal values; half of `a` is rectified, as activations are. The same on every device for one seed.
    """
    generator, wide = torch.Generator().manual_seed(seed), ops.accumulate_dtype(dtype)

    def draw(*shape: int) -> Tensor:
        return laid_out(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device), layout)

    def uniform(*shape: int) -> Tensor:
        return laid_out(torch.rand(*shape, generator=generator, dtype=torch.float64).to(device), layout)

    def pair() -> tuple[Tensor, Tensor]:
        a = torch.randn(n, t, i, generator=generator, dtype=torch.float64)
        a[:, :, : i // 2].clamp_(min=0)
        return laid_out(a.to(dtype).to(device), layout), draw(k * n, t, o)

    def krylov() -> tuple[tuple, dict]:
        length = n * t * i
        basis = torch.randn(length, min(o + k, length // 2), generator=generator, dtype=torch.float64)
        return (draw(length), laid_out(torch.linalg.qr(basis)[0].T.to(dtype).to(device), layout)), {}

    def iteration() -> tuple[tuple, dict]:
        x, r, p = (draw(n * t, k + 2) for _ in range(3))
        q = (0.5 + torch.rand(n * t, 1, generator=generator, dtype=torch.float64)).to(dtype).to(
            device
        ) * p  # A is diagonal
        return (x, r, p, laid_out(q, layout), r.double().square().sum(0)), {"damping": 0.5}

    def rop() -> tuple[tuple, dict]:
        return (draw(n * t, i), draw(o, i), draw(k, n * t, i), draw(k, o, i)), {"db": draw(k, o)}

    def norm() -> tuple[tuple, dict]:
        x, weight = draw(n * t, i).div_(4), draw(i)  # small, so that RMSNorm too has some eps > 0
        mean = x.to(wide).sum(1) / max(i, 1)
        rstd = (1 + (x.to(wide) - mean[:, None]).square().sum(1) / max(i, 1)).rsqrt()  # eps = 1
        slopes = {"c": draw(n * t, i), "c_weight": draw(i), "c_bias": draw(i)}
        return (x, draw(n * t, i), laid_out(rstd, layout)), {"mean": laid_out(mean, layout), "weight": weight, **slopes}

    def lookup() -> tuple[Tensor, Tensor]:
        found = torch.randint(0, max(1, i), (n, t), generator=generator)
        return draw(k * n, t, o), laid_out(found.to(device), layout)

    recipes: dict[str, Callable[[], tuple[tuple, dict]]] = {
        "gram": lambda: ((draw(n, t, i),), {}),
        "sample_grads": lambda: (pair(), {}),
        "sample_norms_squared": lambda: (pair(), {}),
        "sample_dots": lambda: ((*pair(), draw(k, o, i)), {}),
        "weighted_grad": lambda: ((*pair(), draw(k * n, 2)), {}),
        "second_moment": lambda: (pair(), {}),
        "sample_statistics": lambda: ((*pair(), draw(k * n)), {}),
        "conv_gram": lambda: ((draw(n, i, t + 2, 5), 3), {"padding": 1}),
        "rotated_second_moment": lambda: ((*pair(), draw(i, i), draw(o, o)), {}),
        "sample_gram": lambda: (pair(), {}),
        "kron_apply": lambda: ((draw(o, o), draw(k, o, i), draw(i, i)), {}),
        "kron_solve": lambda: ((draw(k, o, i), draw(o, o), draw(i, i), draw(o, i).square(), 0.5), {}),
        "softmax_hvp": lambda: ((draw(n, t, o), draw(k, n, t, o)), {"weight": draw(n, t)}),
        "norm_sample_stats": lambda: ((draw(n, t, i), draw(k * n, t, i)), {"kind": "layer", "eps": 1e-3}),
        "bias_sample_stats": lambda: ((draw(n, t, o),), {}),
        "embedding_sample_norms": lambda: (lookup(), {}),
        "embedding_second_moment": lambda: ((*lookup(), i + 1), {}),
        "matmul": lambda: ((draw(n * t, i), draw(i, o)), {"bias": draw(o)}),
        "convolve": lambda: ((draw(n, max(i, 1), t + 2, 5), draw(max(o, 1), max(i, 1), 3, 2)), {"padding": 1}),
        "cg_update": iteration,
        "linear_rop": rop,
        "activation_rop": lambda: (tuple(3 * draw(n, t, i) for _ in range(3)), {"activation": "gelu"}),
        "norm_rop": norm,
        "reorthogonalize": krylov,
        "softmax_root": lambda: ((draw(n, t, o), draw(k, n, t, o)), {"weight": draw(n, t).abs_()}),
        "softmax_sample": lambda: ((draw(n, t, o), uniform(k, n, t)), {"weight": draw(n, t).abs_()}),
    }
    if name not in recipes:
        raise ValueError(f"make_inputs: no recipe for {name!r}; add one beside those for {', '.join(recipes)}")
    args, kwargs = recipes[name]()
    if "out" in inspect.signature(dispatch.OPS[name].reference).parameters:
        with torch.no_grad():
            shape = dispatch.OPS[name].reference(*args, **kwargs).shape
        kwargs["out"] = torch.full(
            shape, math.nan, dtype=wide, device=device
        )  # poisoned: every element must be written
    return args, kwargs
