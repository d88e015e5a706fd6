"""The op tests' table: which sizes, variants and backends every op is held against its reference on.

A new kernel needs no new test; a size that reaches one of its regimes (a block boundary, a split) is a row of `SIZES`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from hvpfast import dispatch, ops
from hvpfast.ops.rop import ACTIVATIONS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# dtypes that no kernel of a backend takes, or that of one op does not
LEFT_OUT = {"triton": (torch.float64,), "cuda": (torch.float64,), ("activation_rop", "cpu"): (torch.float64,)}


# Ops whose kernels know bf16x3 only: tests/kernels/test_cpu_layers.py holds them
REDUCED = ("matmul", "convolve")


class Size(NamedTuple):
    """N samples, T positions, I and O features, K columns."""

    n: int
    t: int
    i: int
    o: int
    k: int


SIZES = (
    Size(1, 1, 1, 1, 1),
    Size(3, 1, 17, 3, 1),
    Size(17, 1, 63, 65, 3),
    Size(65, 1, 65, 17, 1),
    Size(63, 1, 3, 63, 3),
    Size(2, 3, 17, 1, 3),
    Size(3, 17, 65, 63, 1),
    Size(5, 65, 17, 3, 1),
    Size(1, 63, 1, 65, 3),
    # nothing to add up, or nowhere to add it
    Size(0, 1, 5, 3, 1),
    Size(0, 4, 5, 3, 3),
    Size(4, 0, 5, 3, 1),
    Size(3, 2, 0, 4, 1),
    Size(3, 2, 4, 0, 1),
)
# Sizes at which kernels block, split or go parallel; in one layout only.
LARGE = (Size(300, 1, 130, 7, 1), Size(2, 129, 33, 70, 2), Size(1, 700, 48, 16, 1), Size(9, 40, 257, 31, 1))
PATCHED = ("conv_gram",)  # nine times the features: left out where I is larger than this
MOST_PATCHED, MOST_INTERPRETED = 70, 60  # of I, of T I
# Triton's interpreter takes up to a second a call: every size and variant in one layout and float32, a few in the others.
INTERPRETED_SIZES = (Size(3, 17, 65, 63, 1), Size(17, 1, 63, 65, 3), Size(0, 4, 5, 3, 3), Size(2, 3, 17, 1, 3))

# What may be passed besides the tensors; a bare `{}` is the plain call.
VARIANTS: dict[str, tuple[dict, ...]] = {
    "gram": (
        {},
        {"ones_column": True},
        {"alpha": 0.25, "beta": 0.5},
        {"alpha": -2.0, "beta": 1.0, "ones_column": True},
        {"alpha": 0.5},
        {"alpha": 0.5, "beta": -1.0, "ones_column": True, "mirror": False},
    ),
    "cg_update": ({}, {"damping": 0.0}),
    "linear_rop": ({}, {"db": None}),
    "activation_rop": tuple(
        {"activation": name, "of": of}
        for name in ACTIVATIONS
        for of in (("gx", "g", "x") if name == "gelu" else ("gx",))
    ),
    "norm_rop": (
        {},
        {"mean": None, "c_bias": None, "of": "xw"},
        {"weight": None, "c_weight": None, "of": "gx"},
        {"c": None, "of": "gx"},
        {"mean": None, "weight": None, "of": "g"},
        {"c_bias": None, "of": "w"},
    ),
    "reorthogonalize": ({}, {"normalize": True}),
    "conv_gram": (
        {},
        {"ones_column": True, "alpha": 0.25, "beta": 0.5},
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        {"padding": "same", "kfac_approx": "reduce", "ones_column": True},
    ),
    "softmax_root": ({}, {"transpose": True}),
}


def fitting(name: str, sizes: tuple[Size, ...], interpreted: bool = False) -> list[Size]:
    """Those of the sizes that a test of an op has time for."""
    if name not in PATCHED:
        return list(sizes)
    return [size for size in sizes if (size.t * size.i <= MOST_INTERPRETED if interpreted else size.i <= MOST_PATCHED)]


def implementations() -> list[tuple[str, str]]:
    """(op, backend) for every backend that an op names, the reference first; whether it can run here is not asked."""
    return [(name, backend) for name, each in dispatch.OPS.items() for backend in ("reference", *each.backends)]


def varied(name: str, args: tuple, kwargs: dict, variant: dict) -> dict:
    """Keyword arguments of one variant: `out` has its shape, poisoned, or readable values where it is read."""
    kwargs = {**kwargs, **variant}
    if "out" not in kwargs:
        return kwargs
    plain = {key: value for key, value in kwargs.items() if key not in ("out", "beta", "mirror")}
    with torch.no_grad():
        shape = dispatch.OPS[name].reference(*args, **plain).shape
    out = torch.full(shape, math.nan, dtype=ops.accumulate_dtype(args[0].dtype), device=args[0].device)
    if kwargs.get("beta", 0) != 0:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        out.copy_(values + values.mT)  # a running average of a symmetric matrix is symmetric
    return {**kwargs, "out": out}
