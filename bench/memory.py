"""Peak memory of K-FAC's factors beside what `KFAC.memory()` says beforehand, each model in a process of its own.

    python -m bench.memory [--quick]

ResNet-18 (CIFAR stem, 64 images) and a model of GPT-2 small's shape (2 x 128 tokens), random weights, Monte-Carlo factors. The
peak is that of one call, after a run on fewer samples, plus the parameters, which are there before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch
from torch import nn

import hvpfast as hf
from bench import models
from bench.contest import _peak

MODELS = ("ResNet-18", "GPT-2 small")


def make(name: str, quick: bool) -> models.Workload:
    torch.manual_seed(0)
    if name == "ResNet-18":
        model, n, side = (models.resnet18((4, 4, 8, 8)), 4, 8) if quick else (models.resnet18(), 64, 32)
        return models.Workload(
            model, nn.CrossEntropyLoss(), (torch.randn(n, 3, side, side), torch.randint(0, 10, (n,)))
        )
    sizes = (2, 64, 97, 16) if quick else (12, 768, 50257, 1024)
    n, length = (2, 5) if quick else (2, 128)
    data = torch.randint(0, sizes[2], (n, length)), torch.randint(0, sizes[2], (n * length,))
    return models.Workload(models.GPT(*sizes), nn.CrossEntropyLoss(), data)


def measure(name: str, quick: bool) -> str:
    model, loss, (x, y) = make(name, quick)
    few = 2 if name == "ResNet-18" else 1
    hf.KFAC(model, loss, (x[:few], y[: few * (len(y) // len(x))])).blocks()
    operator = hf.KFAC(model, loss, (x, y))
    said = operator.memory()
    taken, _ = _peak(operator.blocks)
    if taken is None:
        raise SystemExit("bench.memory: this system does not tell a process's peak memory (/proc/self/clear_refs)")
    peak = taken + said.model
    parts = ", ".join(f"{part} {getattr(said, part) / 2**20:.0f}" for part in ("model", "activations", "factors"))
    return (
        f"{name}: peak {peak / 2**20:.0f} MB; said beforehand {said.total / 2**20:.0f} MB ({parts}); "
        f"{peak / said.total:.2f} times"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models: does it run at all?")
    parser.add_argument("--only", choices=MODELS, help="one of the models, in this process")
    args = parser.parse_args(argv)
    if args.only:
        sys.stdout.write(measure(args.only, args.quick) + "\n")
        return 0
    quick = ["--quick"] if args.quick else []
    return max(subprocess.call([sys.executable, "-m", "bench.memory", "--only", name, *quick]) for name in MODELS)


if __name__ == "__main__":
    sys.exit(main())
