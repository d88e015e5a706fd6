"""An example: a CNN and a small transformer on real digits with SGD and with K-FAC, and pictures of both races.

    python -m bench.training --out DIR [--steps 150] [--seed 0]

Writes DIR/cnn.png and DIR/transformer.png, the training loss against steps and against seconds, and prints the losses
reached. The digits are those that come with scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hvpfast as hf
from bench.models import Transformer

BATCH = 128
EVERY = 5  # steps between two points of a curve


class Curve(NamedTuple):
    """Training loss over all digits: after which step, after how many seconds of training."""

    steps: list[int]
    seconds: list[float]
    losses: list[float]


class RowsAsTokens(nn.Module):
    """A digit's eight rows are eight tokens of eight numbers, with a learned position each."""

    def __init__(self, width: int = 64, layers: int = 2):
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Embedding(8, width)
        self.body = Transformer(width, layers, 10)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(8, device=x.device).expand(len(x), -1)
        return self.body(self.embed(x.squeeze(1)) + self.place(order))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "transformer": RowsAsTokens}
SGD_RATES = (0.03, 0.1, 0.2, 0.3)  # the best of these, by the last loss, is shown
KFAC = {"damping": 0.03, "factor_update_steps": 5, "inv_update_steps": 20}
KFAC_LR, KL_CLIP = 0.03, 0.001


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)


def train(name: str, data: tuple[Tensor, Tensor], steps: int, seed: int, lr: float, kfac: bool) -> Curve:
    """SGD with momentum 0.9 on random batches, with or without K-FAC between backward and step; all rates fall to 0."""
    torch.manual_seed(seed)
    model, loss = MODELS[name](), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def left(step: int) -> float:
        return 1 - step / (steps + 1)

    preconditioner = None
    if kfac:  # kl_clip sets the length of a step, so it falls with the square of the rate
        preconditioner = hf.optim.KFACPreconditioner(
            model, lr=lambda step: lr * left(step), kl_clip=lambda step: KL_CLIP * left(step) ** 2, **KFAC
        )
    curve, seconds = Curve([], [], []), 0.0
    for step in range(steps + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                value = float(loss(model(data[0]), data[1]))
            for column, entry in zip(curve, (step, seconds, value), strict=True):
                column.append(entry)
        chosen = torch.randint(0, len(data[0]), (BATCH,))
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = lr * left(step)
        optimizer.zero_grad()
        loss(model(data[0][chosen]), data[1][chosen]).backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
        seconds += time.perf_counter() - start
    return curve


def race(name: str, data: tuple[Tensor, Tensor], steps: int, seed: int) -> dict[str, Curve]:
    """K-FAC, and SGD at its best learning rate."""
    tried = {lr: train(name, data, steps, seed, lr, kfac=False) for lr in SGD_RATES}
    best = min(tried, key=lambda lr: tried[lr].losses[-1] if math.isfinite(tried[lr].losses[-1]) else math.inf)
    return {
        f"SGD, lr {best:g} (best of {len(SGD_RATES)})": tried[best],
        f"SGD with K-FAC, lr {KFAC_LR:g}": train(name, data, steps, seed, KFAC_LR, kfac=True),
    }


def draw(curves: dict[str, Curve], title: str, path: Path) -> None:
    """Loss against steps on the left, against seconds on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from hvpfast.plot.style import BLUE, GREY, axes, labels, legend

    figure, both = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained", sharey=True)
    for ax, column, unit in zip(both, ("steps", "seconds"), ("step", "seconds of training"), strict=True):
        axes(ax)
        for (label, curve), colour in zip(curves.items(), (GREY, BLUE), strict=True):
            ax.plot(getattr(curve, column), curve.losses, color=colour, linewidth=2, label=label)
        ax.set_yscale("log")
        ax.set_xlim(left=0)
        labels(ax, unit, "training loss" if column == "steps" else "", title if column == "steps" else None)
    legend(both[0])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description="SGD against K-FAC on real digits.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures; made if it is not there")
    parser.add_argument("--steps", type=int, default=150, help="training steps (default 150)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; it must be at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    data = digits()
    for name in MODELS:
        curves = race(name, data, args.steps, args.seed)
        for label, curve in curves.items():
            line = f"{name}: {label}: loss {curve.losses[-1]:.2g} after {args.steps} steps, {curve.seconds[-1]:.1f} s"
            sys.stdout.write(line + "\n")
        draw(
            curves,
            f"{'CNN' if name == 'cnn' else 'Transformer'} on 1797 digits, batches of {BATCH}",
            args.out / f"{name}.png",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
