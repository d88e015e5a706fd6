"""How far statistics in float32 are from those in float64, in each precision: `python -m bench.precision`.

ResNet-18 (CIFAR stem, 64 images, random weights): Kronecker factors, the furthest of all layers' in the Frobenius norm; norms of
per-sample gradients, the furthest; second moments, the furthest parameter's. What full float32 is off by are kinks: a
pre-activation that rounding put on the other side of a ReLU.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

import hvpfast as hf
from bench import models
from hvpfast.testing import error


def statistics(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, dict[str, Tensor]]:
    loss, found = nn.CrossEntropyLoss(), {}
    for kind in ("empirical", "curvature-propagation"):
        factors = hf.KFAC(model, loss, (x, y), fisher_type=kind).factors
        for side, label in enumerate("AG"):
            found[f"{label}, {kind}"] = {name: pair[side] for name, pair in factors.items()}
    norms = hf.per_sample_grad_norms(model, loss, (x, y))
    found["norms"] = {str(n): norm for n, norm in enumerate(norms)}
    found["second moments"] = hf.grad_second_moment(model, loss, (x, y))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all?")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    model = (models.resnet18((4, 4, 8, 8)) if quick else models.resnet18()).eval()
    n, side = (2, 8) if quick else (64, 32)
    x, y = torch.randn(n, 3, side, side), torch.randint(0, 10, (n,))
    truth = statistics(copy.deepcopy(model).double(), x.double(), y)
    print("| statistic | precision auto | ieee |\n|---|---|---|")
    rows: dict[str, list[float]] = {label: [] for label in truth}
    for precision in ("auto", "ieee"):
        with hf.precision(precision):
            found = statistics(model, x, y)
        for label, exact in truth.items():
            rows[label].append(max(error(found[label][name], exact[name])[0] for name in exact))
    for label, (auto, ieee) in rows.items():
        print(f"| {label} | {auto:.1e} | {ieee:.1e} |")


if __name__ == "__main__":
    main()
