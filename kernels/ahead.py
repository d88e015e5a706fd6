"""Compiles every Triton kernel for A100, H100 and B200 without a GPU, and holds what comes out against limits.

    python -m hvpfast.kernels.ahead            # table; exit status 1 where a row breaks its limits
    python -m hvpfast.kernels.ahead --only "gram fp32 bf16x3.* sm_90"    # those whose name matches
    python -m hvpfast.kernels.ahead --write    # widen the limits (kernels/limits.json) to what was found

The limits hold for Triton 3.9. All but those of float16 and of narrow layers were widened to what 3.6 gave on 2026-11-21, with
which some variants spill a few registers all the same, most of them those that know nothing of their strides. A row breaks them
by a spill (of more than LITTLE where a tile is cut down to a narrow layer: the compiler then trades registers for programs), by
more registers or shared memory than its limit or the smallest target allows, or by losing tensor-core instructions: mma on sm_80,
wgmma on sm_90, tcgen05 on sm_100. Registers, stack and spills are read off the cubin (`cuobjdump` from the triton wheel). All
this says that the kernels exist and fit, not that they are fast.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .ahead_cases import Case, cases

TARGETS = (80, 90, 100)
LIMITS = Path(__file__).with_name("limits.json")
LITTLE = 32  # bytes of stack of a tile cut down to a narrow layer
SHARED = 99 * 1024  # bytes a program may have on every GPU since sm_80, RTX (sm_86, sm_89, sm_120) included


class Row(NamedTuple):
    """What one compilation gave."""

    kernel: str
    dtype: str
    config: str
    target: str
    registers: int
    stack: int
    spills: int  # local loads and stores in the machine code
    shared: int
    wgmma: int
    mma: int
    tcgen05: int
    tma: int
    cp_async: int

    @property
    def key(self) -> str:
        return " ".join((self.kernel, self.dtype, self.config, self.target))


def compile_case(case: Case, target: int) -> Row:
    """Compile one case for one target and read the result."""
    function, constants = case.function, case.constants
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else case.types.get(n, "i32") for n in names}
    known = [n for n in names if n not in constants and (signature[n].startswith("*") or n in case.known)]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in known}
    constants = {name: value for name, value in constants.items() if name in names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, stack, spills = _resources(compiled.asm["cubin"])
    return Row(
        case.kernel, case.dtype, case.config, f"sm_{target}", registers, stack, spills, compiled.metadata.shared,
        ptx.count("wgmma.mma_async"), ptx.count("mma.sync."), ptx.count("tcgen05.mma"),
        ptx.count("cp.async.bulk.tensor"), len(re.findall(r"cp\.async\.c[ag]", ptx)),
    )  # fmt: skip


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers a thread, stack bytes, and local loads and stores of the kernel in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        environment = {
            **os.environ,
            "PATH": f"{Path(_tool('nvdisasm')).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        usage, code = (
            subprocess.run(
                [_tool("cuobjdump"), flag, str(path)], capture_output=True, text=True, check=True, env=environment
            )
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage gave no resources: {usage.stdout}{usage.stderr}")
    return int(found[1]), int(found[2]), len(re.findall(r"\b(?:LDL|STL)\b", code.stdout))


COLUMNS = Row._fields


def check(rows: list[Row], limits: dict[str, dict[str, int]]) -> list[str]:
    """What breaks the rules or its own limits, one sentence each."""
    broken = []
    needs_cores = {case.key(target): case.tensor_cores for case in cases() for target in TARGETS}
    for row in rows:
        limit = limits.get(row.key)
        if row.stack > (LITTLE if "-narrow" in row.config else 0) or (row.spills and not row.stack):
            broken.append(f"{row.key}: {row.spills} local loads and stores, {row.stack} bytes of stack: it spills")
        if row.shared > SHARED:
            broken.append(f"{row.key}: {row.shared} bytes of shared memory; RTX-class GPUs have {SHARED}")
        cores = {"sm_80": row.mma, "sm_90": row.wgmma, "sm_100": row.tcgen05}[row.target]
        if needs_cores[row.key] and not cores:
            broken.append(f"{row.key}: it lost its tensor-core instructions")
        if limit is None:
            broken.append(f"{row.key}: no limits; write them with --write")
            continue
        for name in ("registers", "shared"):
            if getattr(row, name) > limit[name]:
                broken.append(f"{row.key}: {getattr(row, name)} {name}, the limit is {limit[name]}")
        count = max(row.mma, row.wgmma, row.tcgen05)  # narrow tiles take mma everywhere
        if count < limit["tensor"]:
            broken.append(f"{row.key}: {count} tensor-core instructions, the least is {limit['tensor']}")
    gone = set(limits) - set(needs_cores)
    return broken + [f"{key}: has limits but is not compiled any more; use --write" for key in sorted(gone)]


def widened(limits: dict[str, dict[str, int]], rows: list[Row]) -> dict[str, dict[str, int]]:
    """Limits that the rows keep and that are as wide as those before: what several versions of Triton need."""
    new = {}
    for row in rows:
        least = max(row.wgmma, row.mma, row.tcgen05)
        old = limits.get(row.key, {"registers": 0, "shared": 0, "tensor": least})
        new[row.key] = {
            "registers": max(old["registers"], min(255, -(-row.registers // 8) * 8)),
            "shared": max(old["shared"], row.shared),
            "tensor": min(old["tensor"], least),
        }
    return new


def compile_all(only: str = "", progress: bool = False) -> list[Row]:
    """Compile every case for every target (those whose name matches `only`), one process a core."""
    jobs = [(i, target) for i, case in enumerate(cases()) for target in TARGETS if re.search(only, case.key(target))]
    if not jobs:
        raise ValueError(f"compile_all: nothing is called {only!r}; names look like {cases()[0].key(90)!r}")
    rows: list[Row] = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(_compile_job, *zip(*jobs, strict=True)):
            rows.append(row)
            if progress:
                print(table(rows[-1:], header=len(rows) == 1), flush=True)
    return rows


def _compile_job(index: int, target: int) -> Row:
    return compile_case(cases()[index], target)


def table(rows: list[Row], header: bool = True) -> str:
    """The rows as text, one a line."""
    widths = (13, 6, 29, 7, *(9,) * (len(COLUMNS) - 4))
    lines = [COLUMNS] if header else []
    return "\n".join(
        "".join(str(value).ljust(width) for value, width in zip(line, widths, strict=True)) for line in (*lines, *rows)
    )


def main() -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m hvpfast.kernels.ahead", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="widen the limits to what was found")
    parser.add_argument("--only", default="", metavar="REGEX", help="compile only what matches")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit(
            "hvpfast.kernels.ahead: TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it"
        )
    rows = compile_all(arguments.only, progress=True)
    limits = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
    if arguments.write:
        limits = widened(limits, rows) if not arguments.only else limits | widened(limits, rows)
        lines = (f" {json.dumps(key)}: {json.dumps(limits[key])}" for key in sorted(limits))
        LIMITS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    broken = check(rows, limits)
    print(f"{len(rows)} compilations with triton {triton.__version__}, {len(broken)} broken")
    print("\n".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
