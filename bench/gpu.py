"""Validates and times every kernel on this machine's GPU; `bench/gpu.sh` builds first and then runs this.

Order: ceilings measured here (copy bandwidth, matrix products), then each op x backend x dtype at large sizes against its
reference in float64 (poisoned memory, twice for determinism), then times, each with the part of its floor that it reaches and
with baselines in the same run, then odd sizes and layouts: compiling a kernel takes longer than running it, and what a time limit
cuts off should be the last. Writes bench/results/<device>-<date>.json after every step, so that a cut-off run leaves what it had.

    python bench/gpu.py [--sanitize]      # --sanitize: small sizes only and no times, for compute-sanitizer

HVPFAST_GPU_REHEARSAL=1 goes the same way on the CPU with tiny sizes and Triton's interpreter, writes to a temporary
file, and keeps no times: a rehearsal says that this script works, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_cases
import gpu_operators
import torch
from gpu_cases import BACKENDS, DEVICE, REHEARSAL, with_tf32
from torch import Tensor

from hvpfast import dispatch, testing

REPEATS, BUDGET_MS = (1, 1) if REHEARSAL else (100, 200.0)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# (N, T, I, O, K) of the validation: odd ones in every layout, large ones (tiles and splits as in real use) in one.
ODD = ((1, 1, 1, 1, 1), (3, 1, 17, 63, 3), (17, 3, 63, 65, 1), (2, 65, 63, 17, 2), (65, 17, 3, 1, 1), (0, 2, 5, 3, 1))
ALIGNED = (3, 24, 136, 8, 1)  # rows that Hopper's copies take, and a tile that is not on the diagonal
LARGE = (
    ((3, 40, 70, 66, 1),) if REHEARSAL else ((32, 1024, 768, 512, 1), (64, 128, 1024, 1025, 2), (4096, 1, 2048, 512, 1))
)


class Report:
    """The results so far, on disk after every `add`."""

    def __init__(self, keep: bool):
        name = "rehearsal" if REHEARSAL else torch.cuda.get_device_name().replace(" ", "-")
        folder = Path(__file__).parent / "results" if keep else Path(tempfile.mkdtemp(prefix="hvpfast-"))
        folder.mkdir(exist_ok=True)
        self.path = folder / f"{name}-{datetime.date.today().isoformat()}.json"
        self.content = {"rehearsal": REHEARSAL, "machine": machine(), "ceilings": {}, "validation": [], "times": []}

    def add(self, section: str, value: dict) -> None:
        part = self.content[section]
        part.update(value) if isinstance(part, dict) else part.append(value)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def machine() -> dict[str, object]:
    """What the figures depend on."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version,
        "cuda": torch.version.cuda,
    }
    if not REHEARSAL:
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": properties.name, "processors": properties.multi_processor_count}
        facts |= {"capability": f"{properties.major}.{properties.minor}", "memory": properties.total_memory}
    return facts | {"backends": [list(row) for row in dispatch.backends()]}


def synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object]) -> list[float] | None:
    """Times of single runs, in order of size: between events, with the L2 cache overwritten and a backlog before each, so
    that neither the host nor a warm cache is measured. None in a rehearsal."""
    run()
    synchronize()
    if REHEARSAL:
        return None
    start = time.perf_counter()
    run()
    synchronize()
    once = 1e3 * (time.perf_counter() - start)
    repeats = max(5, min(REPEATS, int(BUDGET_MS / max(once, 1e-3))))
    flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in events:
        flush.zero_()
        flush.zero_()
        before.record()
        run()
        after.record()
    synchronize()
    return sorted(before.elapsed_time(after) for before, after in events)


def ceilings() -> dict[str, float | None]:
    """Copy bandwidth in bytes/s (read plus written) and dense products in flop/s, as torch reaches them here."""
    size, side = (1 << 10, 32) if REHEARSAL else (1 << 30, 8192)
    source, target = (torch.randint(0, 99, (size,), dtype=torch.int8, device=DEVICE) for _ in range(2))
    found = {"copy": rate(2 * size, milliseconds(lambda: target.copy_(source)))}
    x = torch.randn(side, side, device=DEVICE)
    for name, y, tf32 in (
        ("bf16", x.bfloat16(), False),
        ("fp16", x.half(), False),
        ("tf32", x, True),
        ("fp32", x, False),
    ):
        found[name] = rate(2 * side**3, milliseconds(with_tf32(tf32, lambda y=y: y @ y)))
    return found


def rate(work: float, times: list[float] | None) -> float | None:
    return None if times is None else work / (statistics.median(times) * 1e-3)


# validation -----------------------------------------------------------------------------------------------------------


def poison_free_memory() -> None:
    """Leaves NaN in the memory that the next outputs and workspaces are likely to get."""
    torch.full((1 << 12 if REHEARSAL else 1 << 26,), float("nan"), device=DEVICE)


def hold(op: dispatch.Op, backend: str, dtype: str, precision: str, sizes: tuple, layouts: tuple) -> dict[str, object]:
    """One op on one backend against its reference: the row of the report."""
    row = {"op": op.name, "backend": backend, "dtype": dtype, "precision": precision, "cases": 0, "failures": []}
    for size in sizes:
        for layout in layouts:
            for label, args, kwargs in variants(op, size, DTYPES[dtype], layout):
                try:
                    with dispatch.precision(precision):
                        reason = op.why_not(backend, *args, **kwargs)
                        if reason is not None:
                            row["refused"] = reason
                            continue
                        twice = [poisoned_run(op.on(backend), args, kwargs) for _ in range(2)]
                    if not all(torch.equal(x, y) for x, y in zip(*map(testing.pieces, twice), strict=True)):
                        raise AssertionError("two runs gave different bits")
                    stated = "bf16x3" if precision == "auto" else precision
                    testing.assert_accurate(twice[0], op, *args, precision=stated, **kwargs)
                    row["cases"] += 1
                except (AssertionError, RuntimeError) as error:
                    row["failures"].append(f"{label}: {type(error).__name__}: {error}")
                    if "CUDA" in str(error):  # the context is lost: nothing after this can be trusted
                        raise
    return row


def variants(op: dispatch.Op, size: tuple, dtype: torch.dtype, layout: str) -> Iterator[tuple[str, tuple, dict]]:
    """Arguments of the op for one size: plain, and for gram also a running average with a ones column."""
    label = " ".join(f"{name}={value}" for name, value in zip("NTIOK", size, strict=True)) + f" {layout}"
    named = dict(zip("ntiok", size, strict=True))
    if op.name == "sample_grads":  # N I O numbers in float64
        named["n"] = min(named["n"], 256)
    if op.name == "conv_gram":  # nine features a channel, and its reference forms the patches
        named |= {"n": min(named["n"], 32), "t": min(named["t"], 40), "i": min(named["i"], 8 if REHEARSAL else 130)}
    if op.name == "reorthogonalize":  # vectors of N T I elements, O + K of them, made orthonormal on the CPU
        named |= {"n": min(named["n"], 64), "t": min(named["t"], 16), "o": min(named["o"], 40)}
    args, kwargs = testing.make_inputs(op.name, **named, dtype=dtype, device=DEVICE, layout=layout)
    yield label, args, kwargs
    if op.name == "gram":
        out = torch.randn(size[2] + 1, size[2] + 1, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        yield f"{label} blended", args, {"out": out, "alpha": 0.3, "beta": 0.7, "ones_column": True}


def poisoned_run(run: Callable, args: tuple, kwargs: dict) -> Tensor | tuple[Tensor, ...]:
    """The result of one run; `out` is copied first, and the memory that is free holds NaN."""
    kwargs = {name: value.clone() if name == "out" else value for name, value in kwargs.items()}
    poison_free_memory()
    return run(*args, **kwargs)


def validate(report: Report, sizes: tuple, layouts: tuple, only: str, until: float) -> int:
    """Every op x backend x dtype x precision, none begun after `until`; returns the count of failures."""
    failures, left_out = 0, 0
    for op in dispatch.OPS.values():
        for backend in BACKENDS:
            if backend not in op.backends or not re.search(only, op.name):
                continue
            for dtype in DTYPES:
                for precision in ("ieee", "bf16x3", "bf16") if dtype == "fp32" else ("auto",):
                    if time.monotonic() > until:
                        left_out += 1
                        continue
                    row = hold(op, backend, dtype, precision, sizes, layouts)
                    report.add("validation", row)
                    said = row.get("refused", "ok") if not row["failures"] else f"FAILED {row['failures']}"
                    print(
                        f"{op.name:<24}{backend:<8}{dtype:<6}{precision:<8}{row['cases']:>4} cases  {said}", flush=True
                    )
                    failures += len(row["failures"])
    if left_out:
        print(f"the time is over; {left_out} rows of this validation are left out")
    return failures


def validate_eigh(report: Report, only: str) -> int:
    """The batched eigensolver, where torch loads it, against the matrices in float64; returns the count of failures."""
    from hvpfast.kernels import eigh_batched

    if not re.search(only, "eigh"):
        return 0
    row = {"op": "eigh", "backend": "cusolver", "cases": 0, "failures": []}
    if REHEARSAL or isinstance(eigh_batched._library(), str):
        row["refused"] = "rehearsed" if REHEARSAL else eigh_batched._library()
    else:
        solver, stream = eigh_batched._solver(torch.cuda.current_device()), torch.cuda.current_stream().cuda_stream
        for dtype, batch, n in (
            (d, b, n) for d in (torch.float32, torch.float64) for b, n in ((1, 1), (3, 33), (500, 65))
        ):
            x = torch.randn(batch, n, n, dtype=dtype, device=DEVICE)
            a = x + x.mT
            poison_free_memory()
            values, vectors = (y.double() for y in solver.eigh(a, stream))
            off = (vectors * values[:, None]) @ vectors.mT - a.double()
            skew = vectors.mT @ vectors - torch.eye(n, dtype=torch.float64, device=DEVICE)
            worst = max(float(off.norm() / a.double().norm()), float(skew.abs().max()))
            row["cases"] += 1
            if not worst < 10 * n**0.5 * torch.finfo(dtype).eps:
                row["failures"].append(f"{dtype} B={batch} n={n}: error {worst:.2e}")
    report.add("validation", row)
    said = row.get("refused", "ok") if not row["failures"] else f"FAILED {row['failures']}"
    print(f"{'eigh':<22}{'cusolver':<21}{row['cases']:>4} cases  {said}", flush=True)
    return len(row["failures"])


def validate_graphs(report: Report, only: str) -> int:
    """Operators' products from CUDA graphs against those without; returns the count of failures."""
    if not re.search(only, "cuda_graphs"):
        return 0
    poison_free_memory()
    cases, failures = gpu_operators.graphs_hold()
    report.add("validation", {"op": "cuda_graphs", "backend": "cuda", "cases": cases, "failures": failures})
    print(f"{'cuda_graphs':<22}{'cuda':<21}{cases:>4} cases  {f'FAILED {failures}' if failures else 'ok'}", flush=True)
    return len(failures)


# times ----------------------------------------------------------------------------------------------------------------


def measure(report: Report, roof: dict[str, float | None], deadline: float, only: str) -> None:
    """Times of every case, each with the share of its floor: max(flops / ceiling, bytes / bandwidth)."""
    runs = (*gpu_cases.ALL, (gpu_operators.operator_times, gpu_operators.SHAPES))
    for late in (False, True):  # what torch.compile takes its time for comes last
        for make, shape in ((make, shape) for make, shapes in runs for shape in shapes):
            for case in make(*shape):
                if ("compiled" in case.name) != late or not re.search(only, case.group):
                    continue
                if time.monotonic() > deadline:
                    print("the time is over; the cases after this one are left out")
                    return
                try:
                    times = milliseconds(case.run)
                except Exception as error:
                    if "CUDA error" in str(error):  # the context is lost
                        raise
                    report.add(
                        "times", {"group": case.group, "name": case.name, "failed": f"{type(error).__name__}: {error}"}
                    )
                    print(f"{case.group:<48}{case.name:<32}failed: {type(error).__name__}", flush=True)
                    continue
                row = {"group": case.group, "name": case.name, "flops": case.flops * case.products, "bytes": case.bytes}
                line = "rehearsed"
                if times is not None:
                    floor = 1e3 * max(row["flops"] / roof[case.ceiling], case.bytes / roof["copy"])
                    cuts = statistics.quantiles(times, n=5)
                    row |= {"ms": statistics.median(times), "p20": cuts[0], "p80": cuts[-1], "floor_ms": floor}
                    line = f"{row['ms']:9.4f} ms  {100 * floor / row['ms']:5.1f} % of its floor"
                report.add("times", row)
                print(f"{case.group:<48}{case.name:<32}{line}", flush=True)


def main() -> int:
    """Returns 1 if a kernel disagrees with its reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", action="store_true", help="small sizes only, no times: for compute-sanitizer")
    parser.add_argument("--seconds", type=float, default=420.0, help="begin nothing after this long (default 420)")
    parser.add_argument("--only", default="", metavar="REGEX", help="only ops and groups that match")
    arguments = parser.parse_args()
    only = arguments.only
    start, seconds = time.monotonic(), arguments.seconds
    if not REHEARSAL and not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py: torch sees no CUDA device; HVPFAST_GPU_REHEARSAL=1 rehearses on the CPU")
    report = Report(keep=not REHEARSAL and not arguments.sanitize)
    if arguments.sanitize:
        few = (*ODD[:4], ALIGNED)
        return 1 if validate(report, few, ("contiguous", "offset"), only, start + seconds) else 0
    roof = ceilings()
    report.add("ceilings", roof)
    print("ceilings:", {name: "rehearsed" if value is None else f"{value:.3e}" for name, value in roof.items()})
    failures = validate(report, LARGE, ("contiguous",), only, start + 0.4 * seconds) + validate_eigh(report, only)
    failures += validate_graphs(report, only)
    measure(report, roof, start + 0.8 * seconds, only)
    odd, layouts = (ODD[:3], ("contiguous",)) if REHEARSAL else ((*ODD, ALIGNED), testing.LAYOUTS)
    failures += validate(report, odd, layouts, only, start + seconds)
    print(f"{failures} failures; wrote {report.path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
