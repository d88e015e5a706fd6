"""The models of the operator and probe benchmarks, with random data of the shapes that such models see."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Workload(NamedTuple):
    """A model, its loss and one batch."""

    model: nn.Module
    loss: nn.Module
    data: tuple[Tensor, Tensor]


class Transformer(nn.Module):
    """Pre-norm encoder over real-valued tokens, mean over positions, linear head."""

    def __init__(self, width: int, layers: int, classes: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True, activation="gelu", norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def _cnn(channels: tuple[int, ...], classes: int) -> nn.Module:
    layers, before = [], 3
    for after in channels:
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


WORKLOADS = ("MLP 784-512-10, N=1024", "CNN 64-128-256 on 32x32, N=128", "transformer d=256, 4 layers, S=128, N=16")


def make(name: str, device: str, quick: bool, n: int | None = None) -> Workload:
    """One of `WORKLOADS`, float32 and seeded; in miniature if quick."""
    torch.manual_seed(0)
    kind = name.split()[0]
    if kind == "MLP":
        n, wide = n or (8 if quick else 1024), 16 if quick else 512
        model, x = nn.Sequential(nn.Linear(784, wide), nn.ReLU(), nn.Linear(wide, 10)), torch.randn(n, 784)
    elif kind == "CNN":
        model = _cnn((4, 4) if quick else (64, 128, 256), 10)
        x = torch.randn(4, 3, 8, 8) if quick else torch.randn(128, 3, 32, 32)
    else:
        model = Transformer(16 if quick else 256, 1 if quick else 4, 10)
        x = torch.randn(2, 5, 16) if quick else torch.randn(16, 128, 256)
    y = torch.randint(0, 10, (len(x),))
    return Workload(model.to(device).eval(), nn.CrossEntropyLoss(), (x.to(device), y.to(device)))
