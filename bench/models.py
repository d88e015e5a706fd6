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


class _Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut, without normalisation."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1)
        self.second = nn.Conv2d(after, after, 3, 1, 1)
        self.shortcut = nn.Identity() if (before, stride) == (after, 1) else nn.Conv2d(before, after, 1, stride)
        self.relu, self.last = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.relu(self.first(x))) + self.shortcut(x))


def resnet18(widths: tuple[int, ...] = (64, 128, 256, 512), classes: int = 10) -> nn.Module:
    """ResNet-18 with the CIFAR stem (3x3, no pooling) and without BatchNorm."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1), nn.ReLU()]
    before = widths[0]
    for i, width in enumerate(widths):
        layers += [_Residual(before, width, 1 if i == 0 else 2), _Residual(width, width, 1)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class _GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        n, s, d = x.shape
        parts = self.attend(self.before(x)).split(d, 2)
        q, k, v = (part.view(n, s, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(n, s, d))
        return x + self.narrow(nn.functional.gelu(self.widen(self.between(x)), approximate="tanh"))


class GPT(nn.Module):
    """A decoder in the shape of GPT-2: learnt positions, pre-norm blocks, the head tied to the token embedding.

    tokens (N, S) -> logits (N * S, vocabulary), so that every token is a loss term of its own.
    """

    def __init__(self, layers: int = 12, width: int = 768, vocabulary: int = 50257, positions: int = 1024):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(_GPTBlock(width, max(1, width // 64)) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            (nn.init.zeros_ if name.endswith("bias") else nn.init.normal_)(
                p, **({} if name.endswith("bias") else {"std": 0.02})
            )
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            nn.init.ones_(norm.weight)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device)[None])
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


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
