"""`hvpfast tune`: a table of tiles and crossovers for this machine's GPU."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from hvpfast.cli import crossovers
from hvpfast.cli.errors import UserError
from hvpfast.testing import error

AGREE = 2e-5  # two tiles of one kernel differ by the order of their float32 sums only


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "tune",
        help="choose the Triton kernels' tiles and crossovers for this GPU and write them to a table",
        description="Times every kernel with other tiles than its own on this machine's GPU, keeps those that agree with it and "
        "are faster, then finds the size from which on each kernel is faster than its reference, and writes both to a table, "
        "which HVPFAST_TABLES=<file> makes hvpfast read. No call ever tunes by itself.",
    )
    parser.add_argument("--out", type=Path, help="the file to write (default: sm_<capability>.json here)")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="only entries and ops whose name matches, like 'gram bf16x3'"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="start nothing new after this long (default 600)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the table; returns 0."""
    if not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device here, and only a GPU's own times choose its tiles")
    device = torch.device("cuda", torch.cuda.current_device())
    tables, tuning = (importlib.import_module(f"hvpfast.kernels.{name}") for name in ("tables", "tuning"))
    capability, start = tables.facts(device).capability, time.monotonic()
    before = tables.table(device)
    chosen = search(
        (in_force(case, before.tiles) for case in tuning.cases(device) if re.search(args.only, case.name)),
        tuning.candidates, milliseconds, 0.8 * args.seconds,
    )  # fmt: skip
    names = [name for name in before.crossovers if re.search(args.only, name)]
    least = crossovers.search(names, device, milliseconds, args.seconds - (time.monotonic() - start))
    out = args.out or Path(f"sm_{capability}.json")
    write(out, before, chosen, least, torch.cuda.get_device_name(device))
    print(
        f"{len(chosen)} tiles and {len(least)} crossovers in {out}; HVPFAST_TABLES={out.resolve()} makes hvpfast read them"
    )
    return 0


def in_force(case, tiles: dict[str, tuple]):
    """The case with the tile that a table has for it."""
    return case._replace(tile=tiles.get(case.name, case.tile))


def search(
    cases: Iterable, candidates: Callable, clock: Callable[[Callable], float], seconds: float = math.inf
) -> dict[str, tuple]:
    """name -> tile, for each case whose fastest candidate is not the tile that holds now; prints a line for each case.

    clock: the time of one run. A candidate that fails to run (too much shared memory, say) or disagrees is passed over.
    """
    deadline, chosen = time.monotonic() + seconds, {}
    for case in cases:
        if time.monotonic() > deadline:
            print("the time is over; what is left keeps its tiles")
            break
        expected, times = case.run(case.tile), {}
        for tile in candidates(case):
            try:
                if max(error(case.run(tile), expected)) > AGREE:
                    continue
                times[tile] = clock(lambda case=case, tile=tile: case.run(tile))
            except Exception as failure:  # Triton raises several kinds, none of which should end the search
                print(f"{case.name}: {tile.listed} left out: {type(failure).__name__}")
        if not times:
            continue
        best = min(times, key=times.get)
        if best != case.tile:
            chosen[case.name] = best
        own = times.get(case.tile, math.nan)
        print(f"{case.name:<32}{best.listed!s:<26}{times[best]:9.4f} ms, its own {own:9.4f} ms", flush=True)
    return chosen


def write(path: Path, before, chosen: dict[str, tuple], least: dict[str, float], device: str) -> None:
    """The table in force, with these tiles and crossovers, as a file. What was measured of neither stays as it was."""
    today = f"{device}, {datetime.date.today().isoformat()}"
    content = {
        "about": "Measured by `hvpfast tune`; what it had no time for as in " + Path(before.path).name,
        "measured": {
            "tiles": today,
            "crossovers": today if least.keys() >= before.crossovers.keys() else before.measured["crossovers"],
        },
        "crossovers": {**before.crossovers, **least},
        "tiles": {name: list(tile.listed) for name, tile in sorted({**before.tiles, **chosen}.items())},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """The median time of a call between two events."""
    call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)
