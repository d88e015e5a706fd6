"""What the launchers of the Triton ops ask the compiler for, found without a GPU by running them and recording their launches.

Each op is run on the CPU over odd and large sizes, memory layouts, dtypes, precisions and options, and no kernel is launched. Of
the launches that agree in dtypes, constants, warps and stages two are kept: the one of which the compiler knows the most
(arguments that are divisible by 16, or 1), which is how real layers look, and the one of which it knows the least.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from hvpfast.kernels import tables, tiles
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from hvpfast import dispatch, testing

# (N, T, I, O, K)
SIZES = (
    (1, 1, 1, 1, 1), (3, 1, 17, 63, 3), (17, 3, 63, 65, 1), (2, 65, 63, 17, 2), (65, 17, 3, 1, 1), (3, 24, 136, 8, 1),
    (4, 1, 16, 16, 1), (4, 1, 1024, 512, 1), (40, 64, 64, 128, 1), (8, 256, 1024, 512, 1), (3, 5, 24, 40, 2), (8, 2, 32, 32, 1),
    (8, 4, 128, 256, 1), (16, 8, 256, 128, 1), (5, 32, 768, 768, 1), (33, 64, 768, 768, 1), (64, 1, 2048, 100, 2),
    (2, 2048, 16, 32, 1), (2, 3000, 48, 48, 1), (2, 40, 8200, 9, 1), (300, 1, 10, 10, 1), (40, 1, 4096, 8, 1),
    (8, 7, 600, 600, 1),
)  # fmt: skip
# Many classes: (N, T, I, O, K) of the softmax ops besides, a row of which is held, or split between few or many programs.
CLASSES = tuple((n, 1, 1, o, k) for n, o, k in ((300, 1000, 2), (300, 3000, 1), (300, 8000, 1), (300, 50257, 1), (40, 50257, 1),
    (20, 128256, 1), (8, 128256, 1), (3, 128256, 2), (1, 300000, 1), (1, 20000, 1), (1, 9000, 1)))  # fmt: skip
PAIRS = 48, 64, 64, 64, 1  # of sample_gram: gradients whose products are multiplied whole
FEW = SIZES[1], SIZES[9], SIZES[19], CLASSES[4], CLASSES[8], PAIRS  # those at which options are tried
HALF = SIZES[9], CLASSES[4], PAIRS  # those of float16, whose code is that of bfloat16 but for the instructions' names
# An op's own choice of sizes, and the largest extents where its launches do not depend on them.
MORE = dict.fromkeys(("softmax_hvp", "softmax_root", "softmax_sample"), CLASSES) | {"sample_gram": (PAIRS,)}
MOST = {
    "gram": {"i": 1040}, "conv_gram": {"n": 8, "t": 20, "i": 144, "o": 3}, "sample_grads": {"n": 8},
    "kron_apply": {"i": 300, "o": 300}, "kron_solve": {"i": 300, "o": 300}, "rotated_second_moment": {"n": 8, "i": 600, "o": 600},
}  # fmt: skip
# Keyword arguments in place of those of `testing.make_inputs`.
OPTIONS: dict[str, tuple] = {
    "gram": ({}, {"ones_column": True, "beta": 1.0}, {"mirror": False, "beta": 1.0}),
    "conv_gram": (
        {}, {"beta": 1.0, "ones_column": True}, {"stride": 2}, {"kernel_size": 1, "padding": 0}, {"kernel_size": 5, "padding": 2},
        {"kfac_approx": "reduce"}, {"x": "1d"}, {"x": "3d"}, {"groups": "all"}, {"groups": "two"},
    ),
    "softmax_hvp": ({}, {"weight": None}), "softmax_sample": ({}, {"weight": None}),
    "softmax_root": ({}, {"weight": None}, {"transpose": True}), "linear_rop": ({}, {"db": None}),
    "activation_rop": (*({"activation": name} for name in ("gelu", "gelu_tanh", "silu", "mish", "softplus")),
                       {"of": "g"}, {"of": "x"}),
    "norm_rop": ({}, {"mean": None}, {"weight": None, "c_weight": None, "c_bias": None}, {"of": "g", "c_bias": None},
                 {"of": "g", "mean": None, "c_bias": None}, {"of": "x"}, {"of": "gw", "c": None}),
    "norm_sample_stats": ({}, {"kind": "rms"}, {"kind": None}, {"kind": None, "mean": (0, 2), "rstd": (0, 2)},
                          {"kind": None, "mean": (0, 1), "rstd": (0, 1)}),
    "sample_statistics": ({}, {"c": None}), "sample_gram": ({}, {"a2": "a", "g2": "g"}),
}  # fmt: skip
BY_GENERATION = ("gram",)  # ops whose tiles the tables of GPU generations do not agree on
PRECISIONS = {torch.float32: ("auto", "ieee", "bf16x3", "bf16"), torch.bfloat16: ("auto",), torch.float16: ("auto",)}
NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
         torch.int32: "i32"}  # fmt: skip


class Launch(NamedTuple):
    """What a launch asks of the compiler. types: of the arguments that are no constants; known: to be divisible by 16."""

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    known: tuple[str, ...]
    warps: int
    stages: int

    @property
    def targets(self) -> tuple[int, ...]:
        """The compute capabilities that it is for."""
        return (90, 100) if self.parameters.get("TMA") else (80, 90, 100)

    @property
    def function(self) -> JITFunction:
        return getattr(importlib.import_module(self.module), self.kernel)

    @property
    def parameters(self) -> dict[str, object]:
        """The constants that the kernel declares as such, in capitals, not integers that happen to be 1."""
        return {name: value for name, value in self.constants if name.isupper()}

    @property
    def name(self) -> str:
        """Short, and the same for launches that differ in nothing but what the compiler knows of integers and addresses."""
        dtypes = "-".join(kind[1:] for _, kind in self.types if kind.startswith("*"))
        flags = [k if v is True else f"{k}={v}" for k, v in self.parameters.items() if v is not False]
        module = self.module.rpartition(".")[2]
        return f"{module}.{self.kernel.strip('_')} {dtypes} {','.join(flags)} {self.warps}w{self.stages}s"


def read(function: JITFunction, args: tuple, given: dict) -> Launch:
    """A launch as Triton specialises it."""
    bound = dict(zip(function.arg_names, args, strict=False)) | given
    types, constants, known = [], [], []
    for p in function.params:
        value = bound[p.name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if p.is_constexpr or (whole and value == 1):
            constants.append((p.name, value))
            continue
        if isinstance(value, torch.Tensor):
            types.append((p.name, "*" + NAMES[value.dtype]))
        elif isinstance(value, TensorDescriptor):
            types.append((p.name, f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"))
            continue
        else:
            types.append((p.name, "fp32" if not whole else "i32" if -(1 << 31) <= value < 1 << 31 else "i64"))
        if (value.data_ptr() if isinstance(value, torch.Tensor) else value if whole else 1) % 16 == 0:
            known.append(p.name)
    return Launch(
        function.fn.__module__, function.fn.__name__, tuple(types), tuple(constants), tuple(known),
        given.get("num_warps", 4), given.get("num_stages", 3),
    )  # fmt: skip


def _calls(name: str) -> Iterator[tuple[tuple, dict]]:
    """Arguments of an op, `precision` among them."""
    most = MOST.get(name, {})
    for size, (dtype, precisions), layout in (
        (s, d, at) for s in (*SIZES, *MORE.get(name, ())) for d in PRECISIONS.items() for at in testing.LAYOUTS
    ):
        if dtype is torch.float16 and size not in HALF:
            continue
        extents = {key: min(value, most.get(key, value)) for key, value in zip("ntiok", size, strict=True)}
        args, kwargs = testing.make_inputs(name, **extents, dtype=dtype, layout=layout)
        kwargs.pop("out", None)
        for option in OPTIONS.get(name, ({},)) if size in FEW else ({},):
            asked = _applied(name, args, kwargs, option)
            if asked is not None:
                for precision in precisions:
                    yield asked[0], asked[1] | {"precision": precision}


def _applied(name: str, args: tuple, kwargs: dict, option: dict) -> tuple[tuple, dict] | None:
    """The arguments with an option, or None where it does not go with them."""
    kwargs = kwargs | option
    if name == "conv_gram":
        (x, kernel), groups = args, kwargs.get("groups", 1)
        shape = kwargs.pop("x", "2d")
        if shape != "2d":
            x = x[:, :, :, 0] if shape == "1d" else x.unsqueeze(2)
        groups = {"all": x.shape[1], "two": 2}.get(groups, groups)
        if x.shape[1] % groups:
            return None
        kwargs["groups"], args = groups, (x, kwargs.pop("kernel_size", kernel))
    if name == "norm_sample_stats":  # given by the axes along which they are one number
        given = {key: kwargs[key] for key in ("mean", "rstd") if key in kwargs}
        kwargs |= {key: args[0].float().sum(axes, keepdim=True) for key, axes in given.items()}
    if name == "sample_statistics" and "c" in kwargs:
        args = args[:2]
        kwargs.pop("c")
    if name == "sample_gram" and kwargs.get("a2") == "a":
        args, kwargs = (*args, args[0].clone(), args[1].clone()), {}
    if kwargs.get("beta"):
        kwargs["out"] = dispatch.OPS[name].reference(
            *args, **{k: v for k, v in kwargs.items() if k not in ("beta", "mirror")}
        )
    return args, kwargs


@contextlib.contextmanager
def _recording(made: list[Launch], capability: int) -> Iterator[None]:
    """Puts every launch into `made`, on the CPU as on a GPU of this capability."""

    def run(self, *args, grid, warmup, **given):
        made.append(read(self, args, given))

    def zeros(*shape, generator=None, dtype=None):
        return torch.zeros(shape, dtype=dtype)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(tiles, "unfit", lambda *given: None))  # the tensors are on the CPU
        stack.enter_context(mock.patch.object(torch, "randn", zeros))  # no launcher reads what they hold
        stack.enter_context(mock.patch.object(tiles, "facts", lambda device: tiles.Facts(capability, 132)))
        stack.enter_context(mock.patch.object(tables, "table", lambda device: tables.read(tables.path_for(capability))))
        yield


def launches(names: list[str]) -> dict[str, Launch]:
    """Name -> launch, of all that the launchers of these ops ask for; those that know the least end in "(odd)"."""
    ends: dict[str, tuple[Launch, Launch]] = {}
    made: list[Launch] = []
    for name, capability in ((op, c) for op in names for c in ((90, 80) if op in BY_GENERATION else (90,))):
        module = importlib.import_module(f"hvpfast.kernels.{name}")
        with _recording(made, capability):
            for args, kwargs in _calls(name):
                if module.supports(*args, **kwargs) is None:
                    getattr(module, name)(*args, **kwargs)
                for one in made:
                    most, least = ends.get(one.name, (one, one))
                    ends[one.name] = max(most, one, key=_known), min(least, one, key=_known)
                made.clear()
    found = {}
    for name, (most, least) in ends.items():
        found[name] = most
        # The wide dtypes need the most registers: those that differ in nothing else are spared.
        if _known(least) < _known(most) and (
            "fp16" not in name if "PRECISION" in name else "fp32" in name.split()[1][:4]
        ):
            found[f"{name} (odd)"] = least
    return found


def _known(one: Launch) -> int:
    return len(one.known) + len(one.constants)


def all_ops() -> list[str]:
    return [op.name for op in dispatch.OPS.values() if "triton" in op.backends]


if __name__ == "__main__":
    found = launches(sys.argv[1:] or all_ops())
    print("\n".join(found), f"{len(found)} configurations", sep="\n")
