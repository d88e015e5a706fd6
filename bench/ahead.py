"""Compiles what every Triton launcher asks for, for A100, H100 and B200 without a GPU, and holds what comes out against limits.

    python -m bench.ahead            # table; exit status 1 where a row breaks its limits
    python -m bench.ahead --op gram --op kron_apply --target 90    # some of it
    python -m bench.ahead --write    # widen the limits (bench/ahead.json) to what was found

What is compiled is what `bench/launched.py` records. A row breaks its limits by a spill (more than LITTLE bytes of stack, or any
that its limits do not have), by more registers or shared memory than they say or than every such GPU has, by losing
tensor-core instructions (mma on sm_80, wgmma on sm_90, tcgen05 on sm_100) or TMA copies, or by not compiling. The limits hold for
Triton 3.9 and were widened to what 3.6 gave; whatever has none has to be given them. Registers, stack and spills are read off
the cubin (`cuobjdump` from the triton wheel). All this says that the kernels exist and fit, not that they are fast.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.launched import Launch, all_ops, launches

TARGETS = (80, 90, 100)
CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}
LIMITS = Path(__file__).with_name("ahead.json")
LITTLE = 48  # bytes of stack that a row may have at most: ptxas gives some up to fit two programs on a processor
SHARED = 99 * 1024  # bytes a program may have on every GPU since sm_80, RTX (sm_86, sm_89, sm_120) included


class Row(NamedTuple):
    """What one compilation gave: the numbers in the order of a list in LIMITS."""

    name: str
    target: int
    registers: int
    shared: int
    stack: int
    mma: int
    wgmma: int
    tcgen05: int
    tma: int

    @property
    def limits(self) -> list[int]:
        return list(self[2:])


def compile_for(name: str, one: Launch, target: int) -> Row:
    """Compile a launch for a target and read the result."""
    function, constants, types = one.function, dict(one.constants), dict(one.types)
    signature = {n: "constexpr" if n in constants else types[n] for n in function.arg_names}
    attributes = {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in one.known}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": one.warps, "num_stages": one.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    ptx = compiled.asm["ptx"]
    counts = (ptx.count(text) for text in ("mma.sync.", "wgmma.mma_async", "tcgen05.mma", "cp.async.bulk.tensor"))
    registers, stack = _resources(compiled.asm["cubin"])
    return Row(name, target, registers, compiled.metadata.shared, stack, *counts)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread of the kernel in a cubin, and bytes of its stack, where registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage gave no resources: {done.stdout}{done.stderr}")
    registers, stack, local = map(int, found.groups())
    return registers, max(stack, local)


def wants_cores(one: Launch) -> bool:
    """Whether a kernel multiplies on tensor cores in tiles that wgmma and tcgen05 take as well: 64 rows or more."""
    sides = [value for name, value in one.parameters.items() if name.startswith("SIDE")]
    return one.parameters.get("PRECISION", "ieee") != "ieee" and min(sides) >= 64


def check(rows: list[Row], limits: dict[str, dict[str, list[int]]], found: dict[str, Launch]) -> list[str]:
    """What breaks the rules or its own limits, one sentence each."""
    broken = []
    for row in rows:
        key, limit = f"{row.name} sm_{row.target}", limits.get(row.name, {}).get(str(row.target))
        if row.stack > LITTLE:
            broken.append(f"{key}: {row.stack} bytes of stack: it spills")
        if row.shared > SHARED:
            broken.append(f"{key}: {row.shared} bytes of shared memory; RTX-class GPUs have {SHARED}")
        if wants_cores(found[row.name]) and not getattr(row, CORES[row.target]):
            broken.append(f"{key}: it has no {CORES[row.target]}")
        if found[row.name].parameters.get("TMA") and not row.tma:
            broken.append(f"{key}: it has no TMA copies")
        if limit is None:
            broken.append(f"{key}: no limits; write them with --write")
            continue
        for name, got, bound in zip(Row._fields[2:], row.limits, limit, strict=True):
            if got > bound if name in ("registers", "shared", "stack") else got < bound:
                broken.append(f"{key}: {got} {name}, the limit is {bound}")
    return broken


def gone(limits: dict[str, dict[str, list[int]]], found: dict[str, Launch]) -> list[str]:
    """Limits of what is not asked for any more."""
    return [f"{name}: has limits but no launcher asks for it; use --write" for name in sorted(set(limits) - set(found))]


def widened(limits: dict[str, dict[str, list[int]]], rows: list[Row]) -> dict[str, dict[str, list[int]]]:
    """Limits that the rows keep and that are as wide as those before: what several versions of Triton need."""
    new: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        own = [min(255, -(-row.registers // 8) * 8), *row.limits[1:]]
        old = limits.get(row.name, {}).get(str(row.target), own)
        most = [max(pair) for pair in zip(own[:3], old[:3], strict=True)]
        new.setdefault(row.name, {})[str(row.target)] = most + [
            min(pair) for pair in zip(own[3:], old[3:], strict=True)
        ]
    return new


def targets_of(name: str, one: Launch) -> tuple[int, ...]:
    """What a launch is compiled for: one of which the compiler knows the least, for the first of its targets only, where what
    spills anywhere spills most."""
    return one.targets[:1] if name.endswith("(odd)") else one.targets


def compile_all(
    found: dict[str, Launch], targets: list[int], jobs: int | None = None, seconds: float = math.inf
) -> tuple[list[Row], list[str]]:
    """Rows, and what did not compile; one process a core. After so many seconds the rest is left out, which is said."""
    deadline = time.monotonic() + seconds
    work = [(name, one, target) for name, one in found.items() for target in targets_of(name, one) if target in targets]
    rows: list[Row] = []
    failed: list[str] = []
    with ProcessPoolExecutor(jobs or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        try:
            for row in pool.map(_job, *zip(*work, strict=True), chunksize=4):
                if isinstance(row, Row):
                    rows.append(row)
                    print(table(rows[-1:], header=len(rows) == 1), flush=True)
                else:
                    failed.append(row)
                if time.monotonic() > deadline:
                    pool.shutdown(cancel_futures=True)
                    print(f"the time is over: {len(work) - len(rows) - len(failed)} of {len(work)} were not compiled")
                    break
        except BrokenProcessPool:
            name, _, target = work[len(rows) + len(failed)]
            raise SystemExit(
                f"bench.ahead: the compiler crashed, not before {name} sm_{target}; with --jobs 1 it is that or one of the next 3"
            ) from None
    return rows, failed


def _job(name: str, one: Launch, target: int) -> Row | str:
    try:
        return compile_for(name, one, target)
    except Exception as error:  # of whatever kind: it is the answer
        return f"{name} sm_{target}: it does not compile: {type(error).__name__}: {error}"


def table(rows: list[Row], header: bool = True) -> str:
    """The rows as text, one a line, the name last."""
    names = Row._fields[1:]
    lines = ["".join(f"{name:<10}" for name in names) + "name"] if header else []
    return "\n".join([*lines, *("".join(f"{getattr(row, name):<10}" for name in names) + row.name for row in rows)])


def main() -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.ahead", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="widen the limits to what was found")
    parser.add_argument(
        "--op",
        action="append",
        choices=all_ops(),
        metavar="OP",
        help="only what this op's launcher asks for; may be repeated",
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="only what matches")
    parser.add_argument("--target", action="append", type=int, choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="leave the rest out after this long")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit("bench.ahead: TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    limits = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
    asked = launches(arguments.op or all_ops())
    found = {name: one for name, one in asked.items() if re.search(arguments.only, name)}
    if not found:
        raise SystemExit(f"bench.ahead: nothing matches {arguments.only!r}; names look like {min(asked)!r}")
    whole = not (arguments.op or arguments.only or arguments.target)
    targets = arguments.target or TARGETS
    print(f"{len(found)} configurations for {len(targets)} targets", flush=True)
    rows, broken = compile_all(found, targets, arguments.jobs, arguments.seconds)
    if arguments.write:
        new = widened(limits, rows)
        limits = new if whole else limits | {name: limits.get(name, {}) | new[name] for name in new}
        lines = (f" {json.dumps(name)}: {json.dumps(limits[name])}" for name in sorted(limits))
        LIMITS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    broken += check(rows, limits, found) + (gone(limits, found) if whole else [])
    spilled = sum(row.stack > 0 for row in rows)
    print(f"{len(rows)} compilations with triton {triton.__version__}, {spilled} with some stack, {len(broken)} broken")
    print("\n".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
