"""Compiles, without a GPU, every kernel as its launcher asks for it: `python -m bench.launched`, about half an hour on one core.

The launchers of all Triton ops are run on the CPU over odd and large sizes, layouts, dtypes and precisions, their launches
recorded instead of made, and what was asked for (dtypes, constants, warps and stages; integers as they first came) is compiled
for every target. It must compile, fit in the shared memory of every GPU since sm_80, and spill no more than ahead.LITTLE bytes.
The configurations that matter most have limits of their own, which CI holds: `python -m hvpfast.kernels.ahead`.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
import triton
from hvpfast.kernels import ahead, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hvpfast import dispatch, testing

# (N, T, I, O, K)
SIZES = (
    (1, 1, 1, 1, 1), (3, 1, 17, 63, 3), (17, 3, 63, 65, 1), (2, 65, 63, 17, 2), (65, 17, 3, 1, 1), (3, 24, 136, 8, 1),
    (4, 1, 16, 16, 1), (4, 1, 1024, 512, 1), (40, 64, 64, 128, 1), (8, 256, 1024, 512, 1), (3, 5, 24, 40, 2), (8, 2, 32, 32, 1),
    (8, 4, 128, 256, 1), (16, 8, 256, 128, 1), (5, 32, 768, 768, 1), (33, 64, 768, 768, 1), (64, 1, 2048, 100, 2),
    (2, 2048, 16, 32, 1), (2, 3000, 48, 48, 1), (2, 40, 8200, 9, 1), (300, 1, 10, 10, 1), (40, 1, 4096, 8, 1),
    (8, 7, 600, 600, 1),
)  # fmt: skip
PRECISIONS = {torch.float32: ("auto", "ieee", "bf16x3", "bf16"), torch.bfloat16: ("auto",), torch.float16: ("auto",)}
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
            torch.int64: "*i64", torch.int32: "*i32"}  # fmt: skip


class Launch(NamedTuple):
    """What a launch asks of the compiler; names and kinds of the arguments that are no constants, and those known to be
    divisible by 16."""

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    known: tuple[str, ...]
    warps: int
    stages: int


def read(function: JITFunction, args: tuple, given: dict) -> Launch:
    """A launch as Triton specialises it."""
    bound = dict(zip(function.arg_names, args, strict=False)) | given
    types, constants, known = [], [], []
    for p in function.params:
        value = bound[p.name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if p.is_constexpr or (whole and value == 1):
            constants.append((p.name, value))
        elif isinstance(value, torch.Tensor):
            types.append((p.name, POINTERS[value.dtype]))
        else:
            types.append((p.name, "fp32" if not whole else "i32" if -(1 << 31) <= value < 1 << 31 else "i64"))
        place = value.data_ptr() if isinstance(value, torch.Tensor) else value if whole else 1
        if types and types[-1][0] == p.name and place % 16 == 0:
            known.append(p.name)
    return Launch(
        function.fn.__module__, function.fn.__name__, tuple(types), tuple(constants), tuple(known),
        given.get("num_warps", 4), given.get("num_stages", 3),
    )  # fmt: skip


def launches(names: list[str], sizes: tuple = SIZES) -> Iterator[Launch]:
    """One launch for each combination of kernel, dtypes, constants, warps and stages that the ops' launchers ask for."""
    made, seen = [], set()
    before = JITFunction.run, tiles.unfit
    JITFunction.run = lambda self, *args, grid, warmup, **given: made.append(read(self, args, given))
    tiles.unfit = lambda *given: None  # the tensors are on the CPU
    try:
        for name, size, (dtype, precisions), layout in (
            (n, s, d, at) for n in names for s in sizes for d in PRECISIONS.items() for at in testing.LAYOUTS
        ):
            module, extents = importlib.import_module(f"hvpfast.kernels.{name}"), dict(zip("ntiok", size, strict=True))
            if name == "conv_gram":
                extents |= {"n": min(extents["n"], 16), "t": min(extents["t"], 40), "i": min(extents["i"], 300)}
            if name == "sample_grads":
                extents["n"] = min(extents["n"], 8)
            args, kwargs = testing.make_inputs(name, **extents, dtype=dtype, layout=layout)
            for precision in precisions if module.supports(*args, **kwargs) is None else ():
                getattr(module, name)(*args, **kwargs, precision=precision)
            while made:
                one = made.pop()
                names_of = {p.name for p in getattr(sys.modules[one.module], one.kernel).params if p.is_constexpr}
                key = one._replace(
                    types=tuple(pair for pair in one.types if pair[1].startswith("*")),
                    constants=tuple(pair for pair in one.constants if pair[0] in names_of), known=(),
                )  # fmt: skip
                if key not in seen:
                    seen.add(key)
                    yield one
    finally:
        JITFunction.run, tiles.unfit = before


def compiled(one: Launch, target: int) -> str | None:
    """What is wrong with a launch on a target, or None."""
    function = getattr(importlib.import_module(one.module), one.kernel)
    constants, types = dict(one.constants), dict(one.types)
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in one.known}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": one.warps, "num_stages": one.stages, "enable_fp_fusion": True}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:  # of whatever kind: it is the answer
        return f"sm_{target} {one}: {type(error).__name__}: {error}"
    registers, stack, _ = ahead._resources(made.asm["cubin"])
    if stack > ahead.LITTLE or made.metadata.shared > ahead.SHARED:
        return (
            f"sm_{target} {one}: {registers} registers, {stack} bytes of stack, {made.metadata.shared} of shared memory"
        )
    return None


def main() -> int:
    """Returns 1 if something does not compile or fit."""
    parser = argparse.ArgumentParser(prog="python -m bench.launched", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--target", action="append", type=int, help="only this one, like 90; may be repeated")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="only so many of the sizes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit("bench.launched: TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    names = arguments.op or [op.name for op in dispatch.OPS.values() if "triton" in op.backends]
    found = list(launches(names, SIZES[: arguments.sizes]))
    jobs = [(one, target) for one in found for target in arguments.target or ahead.TARGETS]
    print(f"{len(found)} configurations of {len(names)} ops, {len(jobs)} compilations", flush=True)
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        broken = [said for said in pool.map(compiled, *zip(*jobs, strict=True), chunksize=4) if said is not None]
    print("\n".join([*broken, f"{len(broken)} of {len(jobs)} do not compile or do not fit"]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
