"""`hvpfast probe` and `hvpfast landscape`: curvature and loss slices of the user's own model."""

from __future__ import annotations

import argparse
from pathlib import Path

from hvpfast.cli import modelspec
from hvpfast.cli.errors import UserError, extra, reported


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add both sub-commands."""
    parser = commands.add_parser("probe", help="ends of the spectrum and trace of your model's Hessian")
    parser.add_argument("model", help=modelspec.HELP)
    parser.add_argument("--matrix", choices=("hessian", "ggn"), default="hessian", help="default: hessian")
    parser.add_argument("--k", type=int, default=1, help="eigenvalues at each end (default: 1)")
    parser.add_argument("--trace-matvecs", type=int, default=64, metavar="M", help="default: 64")
    parser.add_argument("--density", metavar="PNG", help="also draw the spectral density into this file")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--progress", action="store_true", help="show bars")
    parser.set_defaults(run=run_probe)

    parser = commands.add_parser("landscape", help="the loss over a plane through your model's parameters")
    parser.add_argument("model", help=modelspec.HELP)
    parser.add_argument(
        "--out", metavar="STEM", default="landscape", help="writes STEM.png and STEM.npz (default: landscape)"
    )
    parser.add_argument(
        "--normalise", choices=("filter", "layer", "global", "none"), default="filter", help="default: filter"
    )
    parser.add_argument("--extent", type=float, default=1.0, help="the axes run from -extent to extent (default: 1)")
    parser.add_argument("--steps", type=int, default=21, help="points an axis (default: 21)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--progress", action="store_true", help="show a bar")
    parser.set_defaults(run=run_landscape)


def run_probe(args: argparse.Namespace) -> int:
    """Print both ends of the spectrum and the trace; returns 0."""
    from hvpfast.operators.ggn import GGN
    from hvpfast.operators.hessian import Hessian
    from hvpfast.probes import density, eigsh, trace

    if args.density:
        extra("matplotlib", "plot")
    model, loss, data = modelspec.load(args.model)
    with reported(args.model):
        matrix = (Hessian if args.matrix == "hessian" else GGN)(model, loss, data)
        common = {"seed": args.seed, "progress": args.progress}
        print(f"{args.model}: {matrix.shape[0]} parameters, {matrix.dtype}, {matrix.device}; {args.matrix}")
        for name, which in (("lambda_max", "LA"), ("lambda_min", "SA")):
            found = eigsh(matrix, args.k, which=which, **common)
            shown = ", ".join(f"{value:.6g}" for value in found.values.tolist())
            state = "" if found.converged else ", NOT converged"
            print(f"{name:<11} {shown}  (residual {float(found.residuals.max()):.1e}, {found.matvecs} matvecs{state})")
        found = trace(matrix, matvecs=args.trace_matvecs, **common)
        mean = found.value / matrix.shape[0]
        print(
            f"{'trace':<11} {found.value:.6g} +- {found.stderr:.2g}  (mean eigenvalue {mean:.3g}, {found.matvecs} matvecs)"
        )
        if args.density:
            from hvpfast import plot
            from hvpfast.cli.pictures import DPI, new_axes

            spectrum = density(matrix, **common)
            plot.density(spectrum, title=f"{args.matrix} of {args.model}", ax=new_axes())[0].savefig(
                args.density, dpi=DPI
            )
            print(f"density     {args.density}  ({spectrum.matvecs} matvecs)")
    return 0


def run_landscape(args: argparse.Namespace) -> int:
    """Write the picture and its numbers; returns 0."""
    extra("matplotlib", "plot")
    from hvpfast import plot
    from hvpfast.cli.pictures import DPI, new_axes
    from hvpfast.landscape import plane

    stem = Path(args.out).with_suffix("") if Path(args.out).suffix in (".png", ".npz") else Path(args.out)
    if not stem.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {stem.parent}")
    model, loss, data = modelspec.load(args.model)
    with reported(args.model):
        found = plane(
            model,
            loss,
            data,
            normalise=args.normalise,
            extent=args.extent,
            steps=args.steps,
            seed=args.seed,
            progress=args.progress,
        )
        picture, numbers = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".npz")
        plot.plane(found, title=args.model, ax=new_axes(5.8, 4.8))[0].savefig(picture, dpi=DPI)
        found.save(numbers)
    print(f"{found!r}; {found.centre:.6g} at the centre\n{picture}\n{numbers}")
    return 0
