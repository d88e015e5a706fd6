"""A small network, batches and a training loop, for whatever stands between backward and the optimizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def net(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(64, 3),
    )


def batch(step, n=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float32).to(dtype), torch.randint(
        0, 3, (n,), generator=generator
    )


def train(model, preconditioner, optimizer, steps):
    for step in steps:
        x, y = batch(step, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        output = model(x)
        if preconditioner.fisher_type == "mc":
            preconditioner.sample(output, y)
        F.cross_entropy(output, y).backward()
        preconditioner.step()
        optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
