"""Validates and times every kernel on this machine's GPU; `bench/gpu.sh` builds first and then runs this.

Order: ceilings measured here (copy bandwidth, matrix products), then each op x backend x dtype at large sizes against its
reference in float64 (poisoned memory, twice for determinism), then times, each with the part of its floor that it reaches and
with baselines in the same run, then odd sizes and layouts, which a time limit cuts off first. Compiling a kernel takes longer
than running it, so validation is the work of several processes (--jobs); times are taken by one, alone. Writes
bench/results/<device>-<date>.json after every step, so that a cut-off run leaves what it had.

    python bench/gpu.py [--sanitize]      # --sanitize: small sizes only and no times, for compute-sanitizer

HVPFAST_GPU_REHEARSAL=1 goes the same way on the CPU with tiny sizes and Triton's interpreter, writes to a temporary
file, and keeps no times: a rehearsal says that this script works, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
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


def hold(
    name: str, backend: str, dtype: str, precision: str, sizes: tuple, layouts: tuple, until: float
) -> dict | None:
    """One op on one backend against its reference: the row of the report, or None after `until` (time.time())."""
    if time.time() > until:
        return None
    row = {"op": name, "backend": backend, "dtype": dtype, "precision": precision, "cases": 0, "failures": []}
    cases = (case for size in sizes for layout in layouts for case in variants(name, size, DTYPES[dtype], layout))
    while True:
        label = "inputs"
        try:
            label, args, kwargs = next(cases, ("", None, None))
            if args is None:
                return row
            hold_case(row, args, kwargs)
        except torch.OutOfMemoryError as error:  # beside other processes perhaps; alone it is a failure
            return row | {"memory": f"{label}: {error}"}
        except Exception as error:  # whatever a kernel raises here is its failure; Triton's are of many kinds
            row["failures"].append(f"{label}: {type(error).__name__}: {error}")
            if "CUDA error" in str(error):  # the context is lost: nothing after this can be trusted
                return row


def hold_case(row: dict, args: tuple, kwargs: dict) -> None:
    """One case of a row, counted in it unless it raises."""
    op, precision = dispatch.OPS[row["op"]], row["precision"]
    with dispatch.precision(precision):
        reason = op.why_not(row["backend"], *args, **kwargs)
        if reason is not None:
            row["refused"] = reason
            return
        twice = [poisoned_run(op.on(row["backend"]), args, kwargs) for _ in range(2)]
    if not all(torch.equal(x, y) for x, y in zip(*map(testing.pieces, twice), strict=True)):
        raise AssertionError("two runs gave different bits")
    testing.assert_accurate(twice[0], op, *args, precision="bf16x3" if precision == "auto" else precision, **kwargs)
    row["cases"] += 1


def variants(name: str, size: tuple, dtype: torch.dtype, layout: str) -> Iterator[tuple[str, tuple, dict]]:
    """Arguments of the op for one size: plain, and for gram also a running average with a ones column, of
    both triangles and of the lower one."""
    label = " ".join(f"{axis}={extent}" for axis, extent in zip("NTIOK", size, strict=True)) + f" {layout}"
    named = dict(zip("ntiok", size, strict=True))
    if name == "sample_grads":  # N I O numbers in float64
        named["n"] = min(named["n"], 256)
    if name == "conv_gram":  # nine features a channel, and its reference forms the patches
        named |= {"n": min(named["n"], 32), "t": min(named["t"], 40), "i": min(named["i"], 8 if REHEARSAL else 130)}
    if name == "reorthogonalize":  # vectors of N T I elements, O + K of them, made orthonormal on the CPU
        named |= {"n": min(named["n"], 64), "t": min(named["t"], 16), "o": min(named["o"], 40)}
    args, kwargs = testing.make_inputs(name, **named, dtype=dtype, device=DEVICE, layout=layout)
    yield label, args, kwargs
    if name == "gram":
        out = torch.randn(size[2] + 1, size[2] + 1, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        blend = {"alpha": 0.3, "beta": 0.7, "ones_column": True}
        yield f"{label} blended", args, {"out": out, **blend}
        yield f"{label} lower", args, {"out": out, **blend, "mirror": False}


def poisoned_run(run: Callable, args: tuple, kwargs: dict) -> Tensor | tuple[Tensor, ...]:
    """The result of one run; `out` is copied first, and the memory that is free holds NaN."""
    kwargs = {name: value.clone() if name == "out" else value for name, value in kwargs.items()}
    poison_free_memory()
    return run(*args, **kwargs)


def validate(report: Report, sizes: tuple, layouts: tuple, only: str, until: float, jobs: int = 1) -> int:
    """Every op x backend x dtype x precision, none begun after `until`; returns the count of failures.

    A time limit leaves out the last precisions of every op, not the last ops.
    """
    kinds = [(dtype, "auto") for dtype in DTYPES if dtype != "fp32"]
    kinds = [("fp32", "bf16x3"), kinds[0], ("fp32", "ieee"), *kinds[1:], ("fp32", "bf16")]
    wanted = [
        (op.name, backend, *kind, sizes, layouts, until)
        for kind in kinds for op in dispatch.OPS.values() for backend in BACKENDS
        if backend in op.backends and re.search(only, op.name)
    ]  # fmt: skip
    again, failures, late = [], 0, 0
    for job, row in zip(wanted, each(wanted, jobs), strict=True):
        if row is not None and "memory" in row and jobs > 1:
            again.append(job)
            continue
        late += row is None
        failures += 0 if row is None else add(report, row)
    for job in again:  # by this process alone, as long as it takes
        failures += add(report, hold(*job[:-1], float("inf")))
    if late:
        print(f"the time is over; {late} rows of this validation are left out")
    return failures


def each(wanted: list[tuple], jobs: int) -> Iterator[dict | None]:
    """`hold` of each, by several processes unless jobs is 1; one that is killed ends the run."""
    if jobs == 1:
        yield from (hold(*job) for job in wanted)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from (done.result() for done in [pool.submit(hold, *job) for job in wanted])


def add(report: Report, row: dict) -> int:
    """Into the report, and a line of it; returns the count of failures."""
    if "memory" in row:
        row["failures"].append(f"out of memory: {row.pop('memory')}")
    report.add("validation", row)
    said = row.get("refused", "ok") if not row["failures"] else f"FAILED {row['failures']}"
    print(
        f"{row['op']:<24}{row['backend']:<8}{row['dtype']:<6}{row['precision']:<8}{row['cases']:>4} cases  {said}",
        flush=True,
    )
    return len(row["failures"])


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
    """Operators' products from CUDA graphs against those without, and every kernel captured; returns the count of failures."""
    count = 0
    for name, hold_all in (
        ("cuda_graphs", gpu_operators.graphs_hold), ("captures", gpu_operators.captures_hold),
    ):  # fmt: skip
        if re.search(only, name):
            poison_free_memory()
            cases, failures = hold_all()
            report.add("validation", {"op": name, "backend": "cuda", "cases": cases, "failures": failures})
            print(f"{name:<22}{'cuda':<21}{cases:>4} cases  {f'FAILED {failures}' if failures else 'ok'}", flush=True)
            count += len(failures)
    return count


# times ----------------------------------------------------------------------------------------------------------------


def measure(report: Report, roof: dict[str, float | None], deadline: float, only: str) -> None:
    """Times of every case, each with the share of its floor: max(flops / ceiling, bytes / bandwidth)."""
    runs = (*gpu_cases.ALL, (gpu_operators.operator_times, gpu_operators.SHAPES))
    for late in (False, True):  # what torch.compile takes its time for comes last
        for make, shape in ((make, shape) for make, shapes in runs for shape in shapes):
            for case in made(report, make, shape):
                if ("compiled" in case.name) != late or not re.search(only, case.group):
                    continue
                if time.time() > deadline:
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


def made(report: Report, make: Callable[..., Iterator], shape: tuple) -> Iterator[gpu_cases.Timed]:
    """The cases of one group; memory that its data do not fit in ends that group only."""
    try:
        yield from make(*shape)
    except torch.OutOfMemoryError as error:
        report.add("times", {"group": f"{make.__name__}{shape}", "name": "its data", "failed": str(error)})
        print(f"{make.__name__}{shape}: {error}", flush=True)


def main() -> int:
    """Returns 1 if a kernel disagrees with its reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", action="store_true", help="small sizes only, no times: for compute-sanitizer")
    parser.add_argument("--seconds", type=float, default=420.0, help="begin nothing after this long (default 420)")
    parser.add_argument("--only", default="", metavar="REGEX", help="only ops and groups that match")
    parser.add_argument("--jobs", type=int, default=1, help="processes that validate (default 1)")
    arguments = parser.parse_args()
    only = arguments.only
    start, seconds, jobs = time.time(), arguments.seconds, arguments.jobs
    if not REHEARSAL and not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py: torch sees no CUDA device; HVPFAST_GPU_REHEARSAL=1 rehearses on the CPU")
    report = Report(keep=not REHEARSAL and not arguments.sanitize)
    if arguments.sanitize:
        few = (*ODD[:4], ALIGNED)
        return 1 if validate(report, few, ("contiguous", "offset"), only, start + seconds) else 0
    roof = ceilings()
    report.add("ceilings", roof)
    print("ceilings:", {name: "rehearsed" if value is None else f"{value:.3e}" for name, value in roof.items()})
    failures = validate(report, LARGE, ("contiguous",), only, start + 0.35 * seconds, jobs)
    failures += validate_eigh(report, only) + validate_graphs(report, only)
    measure(report, roof, start + 0.8 * seconds, only)
    odd, layouts = (ODD[:3], ("contiguous",)) if REHEARSAL else ((*ODD, ALIGNED), testing.LAYOUTS)
    failures += validate(report, odd, layouts, only, start + seconds, jobs)
    print(f"{failures} failures; wrote {report.path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
