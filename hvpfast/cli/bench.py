"""`hvpfast bench`: run the benchmark suites of a checkout."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from hvpfast.cli.errors import UserError, extra


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "bench",
        help="run the benchmark suites (needs a checkout)",
        description="Runs `pytest bench --benchmark-enable` in the checkout in or around the current folder. Everything after "
        "`--` goes to pytest, e.g. `hvpfast bench -- -k gram`.",
    )
    parser.add_argument("rest", nargs="*", metavar="-- ...", help="for pytest")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run them; returns pytest's exit status."""
    root = _checkout()
    if root is None:
        raise UserError(
            "the suites are not part of the installed package; clone the repository, `pip install -e .[bench]`, and run "
            "`hvpfast bench` inside it (or `pytest bench --benchmark-enable`)"
        )
    extra("pytest", "bench")
    extra("pytest_benchmark", "bench")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-enable", "--benchmark-only", *args.rest]
    print(f"in {root}: {' '.join(command)}", flush=True)
    return subprocess.run(command, cwd=root).returncode


def _checkout() -> Path | None:
    """The checkout that the current folder, or the imported package, lies in."""
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (
                (folder / "bench").is_dir()
                and (folder / "hvpfast").is_dir()
                and any((folder / "bench").glob("bench_*.py"))
            ):
                return folder
    return None
