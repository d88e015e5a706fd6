"""`hvpfast demo`: train a small network on real digits and look at its curvature."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from hvpfast.cli import datasets, environment, pictures, report
from hvpfast.cli.errors import UserError, extra
from hvpfast.cli.experiment import Experiment, Settings, arpack_check

# MNIST's products cost ten times as much: curvature of its first training samples only, by fewer probes
MNIST = {"curvature_samples": 2000, "trace_probes": 32, "density_probes": 4, "density_steps": 48, "plane_steps": 25}
COLUMNS = ("epoch", "loss", "test acc", "lambda_max", "lambda_min", "trace", "matvecs", "seconds")
WIDTHS = (5, 9, 8, 10, 10, 17, 7, 7)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "demo",
        help="train an MLP on digits or MNIST and report its curvature",
        description="Trains one hidden ReLU layer of 512 (SGD 0.1, momentum 0.9, batches of 64, cross entropy) and measures "
        "the Hessian after every epoch. Writes PNGs, results.json and report.html. Nothing is downloaded.",
    )
    parser.add_argument("--data", metavar="DIR", help="folder with MNIST's four IDX files (.gz too); default: digits")
    parser.add_argument("--out", metavar="DIR", default="demo", help="where to write (default: ./demo)")
    parser.add_argument("--epochs", type=int, default=5, help="default: 5")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--no-plots", action="store_true", help="numbers only; matplotlib is then not needed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    began = time.perf_counter()
    extra("tqdm", "cli")
    extra("scipy", "cli")
    if not args.no_plots:
        extra("matplotlib", "plot")
    if args.epochs < 0:
        raise UserError(f"--epochs {args.epochs}: it must not be negative")
    device = _device(args.device)
    out = _folder(args.out)
    data = datasets.mnist(args.data) if args.data else datasets.digits()
    fewer = {**MNIST, "curvature_samples": min(MNIST["curvature_samples"], len(data.y_train))} if args.data else {}
    given = {"curvature_samples": len(data.y_train), **fewer}
    settings = Settings(epochs=args.epochs, seed=args.seed, device=device, **given)
    with torch.random.fork_rng(devices=[]):
        results = _measured(data, settings, plots=not args.no_plots, out=out)
    results["wall_s"]["total"] = time.perf_counter() - began
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    report.write(results, out)
    print(
        f"\n{results['wall_s']['total']:.1f} s in all. Open {out / 'report.html'}; every number is in {out / 'results.json'}."
    )
    return 0


def _measured(data: datasets.Dataset, settings: Settings, plots: bool, out: Path) -> dict:
    from tqdm import tqdm

    from hvpfast.dynamics import batch_sharpness, stability_threshold
    from hvpfast.landscape import plane
    from hvpfast.probes import density

    experiment = Experiment(data, settings)
    threshold = stability_threshold(experiment.optimizer)
    print(
        f"{data.name} ({data.source}): {len(data.y_train)} train, {len(data.y_test)} test; "
        f"{experiment.parameters} parameters; {environment.device_name(settings.device)}"
    )
    if settings.curvature_samples < len(data.y_train):
        print(f"Curvature is that of the mean loss over the first {settings.curvature_samples} training samples.")
    print(_row(COLUMNS))
    rows, walls = [], {}
    start = time.perf_counter()
    total = settings.epochs * experiment.steps
    with tqdm(total=total, desc="training", unit="batch", disable=None, leave=False) as bar:
        for row in experiment.run(bar.update):
            rows.append(row)
            bar.write(_row(_cells(row)))
    walls["training_and_curvature"] = time.perf_counter() - start
    print()

    model, loss, sample = experiment.model, experiment.loss, experiment.sample
    start = time.perf_counter()
    found = density(
        experiment.monitor.hessian, probes=settings.density_probes, steps=settings.density_steps, seed=settings.seed
    )
    walls["density"] = time.perf_counter() - start
    start = time.perf_counter()
    grid = plane(
        model,
        loss,
        sample,
        steps=settings.plane_steps,
        extent=settings.plane_extent,
        seed=settings.seed,
        progress=lambda cells: tqdm(cells, desc="landscape", unit="cell", disable=None, leave=False),
    )
    walls["landscape"] = time.perf_counter() - start
    start = time.perf_counter()
    edge = batch_sharpness(model, loss, experiment.batches())
    walls["batch_sharpness"] = time.perf_counter() - start
    check = arpack_check(model, *sample, rows[-1]["lambda_max"], settings.seed)
    walls["independent_check"] = check["wall_s"]
    words = report.sentences(rows, threshold, edge, check)
    print("\n".join(words.values()))

    results = {
        "settings": settings.to_dict(),
        "data": data.describe(),
        "parameters": experiment.parameters,
        "device": environment.device_name(settings.device),
        "versions": environment.versions(),
        "epochs": rows,
        "threshold": {
            "value": threshold.value,
            "formula": threshold.formula,
            "optimiser": threshold.optimiser,
            "matrix": threshold.matrix,
            "note": threshold.note,
        },
        "batch_sharpness": edge.to_dict(),
        "check": check,
        "density": found.to_dict(),
        "plane": {
            "alphas": grid.alphas.tolist(),
            "betas": grid.betas.tolist(),
            "losses": [[None if value != value else value for value in line] for line in grid.losses.tolist()],
            "normalise": grid.normalise,
            "seed": grid.seed,
            "centre": grid.centre,
        },
        "sentences": words,
        "pictures": {},
        "wall_s": walls,
    }
    if plots:
        start = time.perf_counter()
        results["pictures"] = pictures.draw(rows, threshold, found, grid, out)
        walls["pictures"] = time.perf_counter() - start
    return results


def _cells(row: dict) -> tuple[str, ...]:
    return (
        str(row["epoch"]),
        f"{row['loss']:.5f}",
        f"{row['test_accuracy']:.4f}",
        f"{row['lambda_max']:.4f}",
        f"{row['lambda_min']:.4f}",
        f"{row['trace']:.3f} +- {row['stderr']:.3f}",
        str(row["matvecs"]),
        f"{row['train_s'] + row['curvature_s']:.1f}",
    )


def _row(cells: tuple[str, ...]) -> str:
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; use cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: use cpu, cuda or cuda:N")
    if kind == "cuda" and (torch.device(name).index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return name


def _folder(name: str) -> Path:
    out = Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {name}: cannot make the folder ({error})") from error
    return out
