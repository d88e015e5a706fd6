"""`hvpfast validate`: every kernel against its reference, on this machine."""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvpfast import dispatch, testing
from hvpfast.cli import environment
from hvpfast.cli.errors import UserError

# (n, t, i, o, k): ones, odd sizes around the tiles' edges, several positions and columns, and an empty batch
SIZES = (
    (1, 1, 1, 1, 1),
    (3, 1, 17, 5, 1),
    (17, 3, 1, 63, 2),
    (65, 1, 63, 65, 1),
    (5, 17, 65, 3, 3),
    (63, 2, 129, 17, 1),
    (0, 1, 7, 5, 1),
)
# where kernels split and block; the last has rows on 16 bytes, which Hopper's copies take
LARGE = ((130, 1, 151, 70, 1), (17, 33, 130, 66, 2), (40, 28, 136, 9, 1))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda", "interpret")


@dataclass
class Outcome:
    """Of one op on one backend with one dtype and precision."""

    op: str
    backend: str
    dtype: str
    precision: str
    cases: int = 0
    error: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "validate",
        help="hold every kernel against its reference on this machine",
        description="Runs every op on every backend that can run here, over dtypes, odd sizes and memory layouts, twice, with "
        "poisoned outputs, and holds the results against the reference in float64. Exit status 1 if one fails.",
    )
    parser.add_argument(
        "--device", choices=DEVICES, help="interpret: Triton kernels on the CPU (default: cuda if there is one)"
    )
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op; may be repeated")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes; compiling kernels takes longer than running them (default 1)"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after this long")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table; returns 0, or 1 if a kernel failed."""
    names = args.op or list(dispatch.OPS)
    for name in names:
        if name not in dispatch.OPS:
            raise UserError(f"--op {name}: there is no such op; there are {', '.join(dispatch.OPS)}")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: it must be 1 or more")
    where = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch sees no CUDA device here; use --device cpu, or interpret for Triton kernels"
        )
    if where == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, "-m", "hvpfast", "validate", "--device", "interpret"]
        command += [part for name in args.op or () for part in ("--op", name)]
        command += ["--jobs", str(args.jobs), "--seconds", str(args.seconds)]
        sys.stdout.flush()
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    start = time.time()
    print(f"{environment.device_name('cuda' if where == 'cuda' else 'cpu')}; torch {torch.__version__}")
    print(f"{'op':<24} {'backend':<10} {'dtype':<9} {'precision':<10} {'cases':>5} {'worst error':>12}  result")
    failed, late, absent, units = 0, 0, {}, []
    for name in names:
        for backend in _backends(where):
            reason = dispatch.OPS[name].why_not(backend)
            if reason is None:
                units.append((name, backend, where, start + args.seconds))
            else:
                absent.setdefault((backend, reason.replace(f"{name} has no", "it has no")), []).append(name)
    for outcome in (
        _parallel(units, args.jobs) if args.jobs > 1 else (one for unit in units for one in _outcomes(*unit))
    ):
        if isinstance(outcome, str):
            late += 1
            continue
        failed += bool(outcome.failures)
        _print(outcome)
    for (backend, reason), ops in absent.items():
        print(f"not run on {backend}: {', '.join(ops)}: {reason}")
    state = f"{failed} rows FAILED" if failed else "every kernel that can run here agrees with its reference"
    if late:
        state = f"{failed} rows FAILED" if failed else "every kernel that was run agrees with its reference"
        state += f"; the time was over before {late} rows, which were not run"
    print(f"{state} ({time.time() - start:.1f} s)")
    return 1 if failed else 0


def _backends(where: str) -> tuple[str, ...]:
    return {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton", "cuda"), "interpret": ("triton",)}[where]


def _parallel(units: list[tuple], jobs: int) -> Iterator[Outcome | str]:
    """The outcomes of all units, by processes of their own, as they come in."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(min(jobs, len(units)) or 1, context, torch.set_num_threads, (threads,)) as pool:
        for done in as_completed([pool.submit(_listed, *unit) for unit in units]):
            yield from done.result()


def _listed(*unit: object) -> list[Outcome | str]:
    return list(_outcomes(*unit))


def _outcomes(name: str, backend: str, where: str, until: float = math.inf) -> Iterator[Outcome | str]:
    """A row after another; after `until` (time.time()) their names alone."""
    device = "cuda" if where == "cuda" else "cpu"
    for dtype in DTYPES:
        for precision in _precisions(backend, dtype):
            if time.time() > until:
                yield f"{name} {backend} {dtype} {precision}"
                continue
            found = Outcome(name, backend, str(dtype).removeprefix("torch."), precision)
            sizes = SIZES if where == "interpret" else SIZES + LARGE
            for number, size in enumerate(sizes):
                for layout in testing.LAYOUTS if number % 3 == 1 else testing.LAYOUTS[:1]:
                    _case(found, size, layout, dtype, device)
            yield found


def _precisions(backend: str, dtype: torch.dtype) -> tuple[str, ...]:
    if backend == "reference" or dtype is not torch.float32:
        return ("ieee",)
    return tuple(name for name in dispatch.PRECISIONS if name != "auto")


def _case(found: Outcome, size: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> None:
    """Run one case twice and compare; results go into `found`."""
    op = dispatch.OPS[found.op]
    shape = dict(zip("ntiok", size, strict=True))

    def inputs() -> tuple[tuple, dict]:
        return testing.make_inputs(found.op, **shape, dtype=dtype, device=device, layout=layout, seed=1)

    label = f"{', '.join(f'{axis}={extent}' for axis, extent in shape.items())}, {layout}"
    with torch.no_grad(), dispatch.precision(found.precision), poisoned():
        args, kwargs = inputs()
        reason = op.why_not(found.backend, *args, **kwargs)
        if reason is not None:
            found.refused[reason] = found.refused.get(reason, 0) + 1
            return
        found.cases += 1
        try:
            first = op.on(found.backend)(*args, **kwargs)
            again_args, again_kwargs = inputs()
            second = op.on(found.backend)(*again_args, **again_kwargs)
        except Exception as error:  # whatever a kernel raises here is its failure
            found.failures.append(
                f"{label}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            return
    args, kwargs = inputs()
    for x, y in zip(testing.pieces(first), testing.pieces(second), strict=True):
        if not _identical(x, y):
            found.failures.append(f"{label}: two runs differ by {float((x - y).abs().max()):.3g}")
    try:
        testing.assert_accurate(first, op, *args, precision=found.precision, **kwargs)
    except AssertionError as error:
        found.failures.append(f"{label}: {error}")
    with torch.no_grad():
        wide = testing.make_inputs(found.op, **shape, dtype=dtype, device=device, layout=layout, seed=1)
        truth = op.reference(*_double(wide[0]), **_double(wide[1]))
    for x, exact in zip(testing.pieces(first), testing.pieces(truth), strict=True):
        found.error = max(found.error, *testing.error(x, exact))


def _double(item):
    """The arguments in float64."""
    if isinstance(item, Tensor):
        return item.double() if item.is_floating_point() else item
    if isinstance(item, dict):
        return {name: _double(value) for name, value in item.items()}
    return type(item)(_double(value) for value in item) if isinstance(item, (tuple, list)) else item


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory (torch.empty) holds NaN within the block, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _identical(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


def _print(found: Outcome) -> None:
    state = "FAILED" if found.failures else "passed" if found.cases else "not run"
    if found.refused and not found.failures:
        state += f" ({sum(found.refused.values())} refused: {next(iter(found.refused))})"
    error = f"{found.error:>12.1e}" if found.cases else f"{'':>12}"
    print(
        f"{found.op:<24} {found.backend:<10} {found.dtype:<9} {found.precision:<10} {found.cases:>5} {error}  {state}",
        flush=True,
    )
    for text in found.failures[:5]:
        print(f"    {text}")
    if len(found.failures) > 5:
        print(f"    and {len(found.failures) - 5} more")
