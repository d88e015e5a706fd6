"""The command line: `hvpfast demo | doctor | validate | probe | landscape | bench | tune`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import hvpfast
from hvpfast.cli.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where a check failed, 2 for what the user can mend."""
    from hvpfast.cli import bench, demo, doctor, probe, tune, validate

    parser = argparse.ArgumentParser(prog="hvpfast", description=hvpfast.__doc__)
    parser.add_argument("--version", action="version", version=f"hvpfast {hvpfast.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for module in (demo, doctor, validate, probe, bench, tune):
        module.add_parser(commands)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return args.run(args)
    except UserError as error:
        if args.traceback:
            raise
        print(f"hvpfast {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nhvpfast: interrupted", file=sys.stderr)
        return 130
