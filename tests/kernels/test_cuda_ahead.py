"""The CUDA kernels compiled for GPUs that are not here: no warnings, no spills, registers within limits, and the instructions
that each kernel is there for in its machine code."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which(os.environ.get("HVPFAST_NVCC", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


class Limit(NamedTuple):
    """Of one kernel in all its variants on one target: registers a thread, and instructions: least counts of each variant."""

    registers: int
    instructions: dict[str, int]


COMMON = {
    "partial_kernel<16>": Limit(240, {"HMMA.16816.F32": 32}),
    "partial_kernel<32>": Limit(144, {"FFMA": 1024}),
    "add_kernel": Limit(56, {}),
    "pass_kernel": Limit(128, {"DFMA": 16}),  # four rows of four columns at once
    "scale_kernel": Limit(32, {}),
    "cg_kernel": Limit(64, {}),
    "split_kernel": Limit(24, {"F2FP": 2}),
}
LIMITS = {
    "sm_80": COMMON | {"tile_kernel": Limit(8, {})},  # empty: it is Hopper's
    "sm_100": COMMON | {"tile_kernel": Limit(8, {}), "split_kernel": Limit(32, {"F2FP": 2})},
    "sm_90a": COMMON
    | {"tile_kernel": Limit(160, {"HGMMA.64x128x16.F32": 8, "tnspA.tnspB": 8, "UTMALDG.2D": 6, "SYNCS.PHASECHK": 6})},
}


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return found


def family(mangled: str) -> str:
    """tile_kernel of ...11tile_kernelILNS_5DtypeE2ELi3EEE...; partial_kernel's by the bits of its data."""
    name = re.search(r"\d+([a-z_]+_kernel)", mangled)[1]
    return f"{name}<{32 if 'partial_kernelIf' in mangled else 16}>" if name == "partial_kernel" else name


@pytest.fixture(scope="module", params=sorted(LIMITS))
def compiled(request, tmp_path_factory):
    """(target, {mangled name: (registers, stack bytes, machine code)}) of all sources."""
    if NVCC is None:
        pytest.skip("there is no nvcc")
    target, folder, kernels = request.param, tmp_path_factory.mktemp("cubins"), {}
    path = os.pathsep.join((str(Path(tool("nvdisasm")).parent), os.environ.get("PATH", "")))
    for stem in SOURCES:
        cubin = folder / f"{stem}.cubin"
        command = [NVCC, "-cubin", f"csrc/cuda/{stem}.cu", "-o", str(cubin), "-O3", "-std=c++17", "-Icsrc/include"]
        command += ["-Werror=all-warnings", "-Xcompiler", "-Wall", f"-arch={target}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stdout + done.stderr
        usage, code = (
            subprocess.run(
                [tool("cuobjdump"), flag, str(cubin)],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "PATH": path},
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
        bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.DOTALL))
        for name, registers, stack in re.findall(r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+)", usage):
            kernels[name] = int(registers), int(stack), bodies[name]
    return target, kernels


def test_every_kernel_keeps_its_limits(compiled):
    target, kernels = compiled
    assert {family(name) for name in kernels} == set(LIMITS[target])
    for name, (registers, stack, code) in kernels.items():
        limit = LIMITS[target][family(name)]
        assert stack == 0 and not re.search(r"\b(LDL|STL)\b", code), f"{target} {name} spills"
        assert registers <= limit.registers, f"{target} {name}: {registers} registers, the limit is {limit.registers}"
        for instruction, least in limit.instructions.items():
            assert code.count(instruction) >= least, f"{target} {name}: {code.count(instruction)} {instruction}"


def test_rows_on_16_bytes_are_read_so(compiled):
    _, kernels = compiled
    whole = [code for name, (*_, code) in kernels.items() if re.search(r"pass_kernelILN\S*PassE\dELb1E[fd]", name)]
    assert len(whole) == 6 and all("LDG.E.128" in code for code in whole)


def test_three_products_of_halves_and_one_of_16_bit_data(compiled):
    target, kernels = compiled
    counts = {name: code.count("HGMMA") for name, (_, _, code) in kernels.items() if family(name) == "tile_kernel"}
    assert len(counts) == 3
    if target == "sm_90a":
        one, other, three = sorted(counts.values())
        assert one == other and three == 3 * one
        # a group stays under way while the next is issued
        assert all("WARPGROUP.DEPBAR.LE gsb0, 0x1" in kernels[name][2] for name in counts)
    else:
        assert set(counts.values()) == {0}
