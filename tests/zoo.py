"""Small models that exercise every way a parameter can be used, with data to match (float64)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Case(NamedTuple):
    """A model, its input for N samples, and the number of classes of its (N, C) output."""

    model: nn.Module
    inputs: object
    classes: int


class Tied(nn.Module):
    """One weight in two modules, the second transposed by a functional call."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(hidden) + F.linear(hidden, self.first.weight.T)[:, :3]


class CalledTwice(nn.Module):
    """One module called twice on different inputs."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)) + x)))


class Attention(nn.Module):
    """Embedding, a transformer layer (scaled dot-product attention), layer norms, a mean over positions."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(1))


class Table(nn.Module):
    """One table that tokens are looked up in, with a padding token, and that the head multiplies with."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens)))).mean(1)


class Recurrent(nn.Module):
    """An LSTM and the last position's output."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Keywords(nn.Module):
    """Two inputs, by name."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Bilinear(4, 2, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.right(torch.tanh(self.left(x)), z)


class LowRank(nn.Module):
    """A frozen layer with a low-rank update of loose parameters, a bilinear layer and a scale without axes."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 5)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(5, 2))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Bilinear(5, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.base(x) + self.scale * (x @ self.down.T @ self.up.T))
        return self.head(h, x)


def _flat(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten())


N = 6


def _zoo() -> dict[str, Callable[[], Case]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(N, *shape)

    def batchnorm() -> Case:
        model = _flat(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 2))
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
        return Case(model.eval(), normal(1, 3, 3), 3)

    return {
        "mlp": lambda: Case(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), normal(4), 3),
        "relu": lambda: Case(nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), normal(4), 3),
        "cnn, groups and dilation": lambda: Case(
            _flat(
                nn.Conv2d(2, 4, 3, padding=1, groups=2),
                nn.Tanh(),
                nn.Conv2d(4, 4, (2, 3), stride=2, dilation=(2, 1), padding=(1, 2), groups=4),
                nn.Tanh(),
                nn.Conv2d(4, 3, 2, padding="same", padding_mode="reflect"),
                nn.AdaptiveAvgPool2d(1),
            ),
            normal(2, 5, 5),
            3,
        ),
        "conv1d": lambda: Case(
            _flat(nn.Conv1d(2, 3, 3, padding="same"), nn.Tanh(), nn.Conv1d(3, 3, 5)), normal(2, 5), 3
        ),
        "conv3d": lambda: Case(
            _flat(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 3, 2, bias=False)), normal(1, 3, 3, 3), 3
        ),
        "tied": lambda: Case(Tied(), normal(4), 3),
        "called twice": lambda: Case(CalledTwice(), normal(4), 3),
        "attention": lambda: Case(Attention(), torch.randint(0, 7, (N, 3)), 3),
        "table and head tied": lambda: Case(Table(), torch.randint(0, 7, (N, 3)), 7),
        "recurrent": lambda: Case(Recurrent(), normal(3, 3), 3),
        "keywords": lambda: Case(Keywords(), {"z": normal(2), "x": normal(3)}, 3),
        "tuple": lambda: Case(Keywords(), (normal(3), normal(2)), 3),
        "batchnorm in eval": batchnorm,
        "linear over positions": lambda: Case(
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Flatten(1)), normal(2, 3), 6
        ),
        "low rank": lambda: Case(LowRank(), normal(4), 3),
        "frozen first layer": lambda: Case(_frozen(), normal(4), 3),
    }


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    return model


MODELS = tuple(_zoo())


def make(name: str, seed: int = 0) -> Case:
    """The case called `name`: float64 weights and data that depend on the seed only."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(seed)
        return _zoo()[name]()
    finally:
        torch.set_default_dtype(before)


def _smooth_l1_sum(output: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(output, target, reduction="sum", beta=0.3)


def _own_mean(output: Tensor, target: Tensor) -> Tensor:
    """A custom loss: mean over samples of a non-quadratic, convex function of the row."""
    return torch.logsumexp(torch.cat([output - target, target - output], 1), 1).mean()


def classes_of(n: int, c: int) -> Tensor:
    return torch.arange(n) * 2 % c


def _ignored(n: int, c: int) -> Tensor:
    target = classes_of(n, c)
    target[1] = -100
    return target


def _soft(n: int, c: int) -> Tensor:
    return torch.softmax(torch.linspace(-2, 2, n * c, dtype=torch.float64).reshape(n, c).sin() * 3, 1)


def _real(n: int, c: int) -> Tensor:
    return torch.linspace(-1, 2, n * c, dtype=torch.float64).reshape(n, c).cos()


def _binary(n: int, c: int) -> Tensor:
    return (_real(n, c) > 0.2).double()


def _weights(c: int) -> Tensor:
    return torch.linspace(0.3, 1.7, c, dtype=torch.float64)


# name -> (loss for C classes, target for N samples and C classes)
LOSSES: dict[str, tuple[Callable, Callable]] = {
    "cross entropy": (lambda c: nn.CrossEntropyLoss(), classes_of),
    "cross entropy, sum": (lambda c: nn.CrossEntropyLoss(reduction="sum"), classes_of),
    "label smoothing": (lambda c: nn.CrossEntropyLoss(label_smoothing=0.2), classes_of),
    "ignore index": (lambda c: nn.CrossEntropyLoss(), _ignored),
    "class weights": (lambda c: nn.CrossEntropyLoss(weight=_weights(c)), classes_of),
    "all options": (lambda c: nn.CrossEntropyLoss(weight=_weights(c), label_smoothing=0.1), _ignored),
    "all options, sum": (
        lambda c: nn.CrossEntropyLoss(weight=_weights(c), label_smoothing=0.1, reduction="sum"),
        _ignored,
    ),
    "probabilities": (lambda c: nn.CrossEntropyLoss(weight=_weights(c), label_smoothing=0.1), _soft),
    "functional": (lambda c: F.cross_entropy, classes_of),
    "mse": (lambda c: nn.MSELoss(), _real),
    "mse, sum": (lambda c: nn.MSELoss(reduction="sum"), _real),
    "bce": (lambda c: nn.BCEWithLogitsLoss(), _binary),
    "bce, weighted, sum": (
        lambda c: nn.BCEWithLogitsLoss(weight=_weights(c), pos_weight=1 / _weights(c), reduction="sum"),
        _binary,
    ),
    "smooth l1, lambda": (lambda c: _smooth_l1_sum, _real),
    "custom": (lambda c: _own_mean, _real),
}


def unequal(inputs: object, target: Tensor) -> list[tuple[object, Tensor]]:
    """The same data as three batches of different sizes."""
    from truths import take

    cuts = [slice(0, 1), slice(1, 4), slice(4, target.shape[0])]
    return [(take(inputs, cut), target[cut]) for cut in cuts]
