"""The demo's experiment: an MLP with one hidden ReLU layer, SGD with momentum, and its curvature after every epoch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpfast.cli.datasets import Dataset
from hvpfast.cli.errors import UserError, extra, reported
from hvpfast.dynamics import SharpnessMonitor

HIDDEN = 512


@dataclass(frozen=True)
class Settings:
    """Of one run. `curvature_samples`: how many of the first training samples curvature is measured on."""

    epochs: int = 5
    lr: float = 0.1
    momentum: float = 0.9
    batch_size: int = 64
    hidden: int = HIDDEN
    seed: int = 0
    device: str = "cpu"
    curvature_samples: int = 0
    trace_probes: int = 64
    density_probes: int = 8
    density_steps: int = 64
    plane_steps: int = 41
    plane_extent: float = 1.0

    def to_dict(self) -> dict:
        return asdict(self)


class Experiment:
    """Model, optimiser, data and monitor of one run, on one device.

    Attributes:
        model, optimizer, loss: as trained. sample: (X, y), the fixed data that curvature is measured on.
    """

    def __init__(self, data: Dataset, settings: Settings):
        torch.manual_seed(settings.seed)
        features, classes = data.x_train.shape[1], int(data.y_train.max()) + 1
        self.model = nn.Sequential(
            nn.Linear(features, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, classes)
        ).to(settings.device)
        self.settings, self.loss = settings, nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=settings.lr, momentum=settings.momentum)
        self.x, self.y, self.x_test, self.y_test = (
            part.to(settings.device) for part in (data.x_train, data.y_train, data.x_test, data.y_test)
        )
        chosen = slice(settings.curvature_samples or None)
        self.sample = (self.x[chosen], self.y[chosen])
        self._order = torch.Generator().manual_seed(settings.seed)
        self.monitor = SharpnessMonitor(
            self.model, self.loss, self.sample, trace_probes=settings.trace_probes, seed=settings.seed
        )

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.y) // self.settings.batch_size)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def run(self, tick: Callable[[], object]) -> Iterator[dict]:
        """Train; yield a row before the first epoch and after each. `tick` is called after every step.

        Raises:
            UserError: the loss is no longer finite.
        """
        yield self.measure(0, 0.0)
        for epoch in range(1, self.settings.epochs + 1):
            start = time.perf_counter()
            for batch in torch.randperm(len(self.y), generator=self._order).split(self.settings.batch_size):
                batch = batch.to(self.x.device)
                self.optimizer.zero_grad(set_to_none=True)
                self.loss(self.model(self.x[batch]), self.y[batch]).backward()
                self.optimizer.step()
                self.monitor.steps += 1
                tick()
            yield self.measure(epoch, time.perf_counter() - start)

    def measure(self, epoch: int, train_s: float) -> dict:
        """Loss over all training data, accuracy on the test data, and the monitor's record."""
        with torch.no_grad():
            loss = float(self.loss(self.model(self.x), self.y))
            accuracy = float((self.model(self.x_test).argmax(1) == self.y_test).double().mean())
        if loss != loss or loss == float("inf"):
            raise UserError(
                f"the training loss is {loss} after epoch {epoch}: the run diverged; lower the learning rate"
            )
        start = time.perf_counter()
        with reported(f"measuring curvature after epoch {epoch}"):
            record = self.monitor.measure(self.optimizer, epoch=epoch)
        row = record.to_dict()
        row.pop("extra"), row.pop("preconditioned")
        row["loss_on_curvature_data"] = row.pop("loss")
        return {
            "epoch": epoch,
            "loss": loss,
            "test_accuracy": accuracy,
            **row,
            "train_s": train_s,
            "curvature_s": time.perf_counter() - start,
        }

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The curvature data in batches of the training size, the last left out if it is smaller."""
        size = self.settings.batch_size
        parts = list(zip(self.sample[0].split(size), self.sample[1].split(size), strict=True))
        return [part for part in parts if len(part[1]) == size] or parts


def arpack_check(model: nn.Module, x: Tensor, y: Tensor, ours: float, seed: int) -> dict:
    """The largest eigenvalue by SciPy's ARPACK on float64 Hessian-vector products of plain autograd, none of hvpfast.

    Returns:
        the value, the relative difference of `ours` from it, the products it took, and the seconds.
    """
    extra("scipy.sparse.linalg", "cli")
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    start = time.perf_counter()
    twin = copy.deepcopy(model).cpu().double()
    params = list(twin.parameters())
    value = F.cross_entropy(twin(x.detach().cpu().double()), y.cpu())
    slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, params, create_graph=True)])
    count = 0

    def product(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        parts = torch.autograd.grad(slope @ torch.from_numpy(v.reshape(-1).copy()), params, retain_graph=True)
        return torch.cat([part.reshape(-1) for part in parts]).numpy()

    matrix = LinearOperator((slope.numel(), slope.numel()), matvec=product, dtype=np.float64)
    v0 = np.random.default_rng(seed).standard_normal(slope.numel())
    found = float(eigsh(matrix, k=1, which="LA", tol=1e-8, v0=v0, return_eigenvectors=False)[0])
    return {
        "method": "scipy.sparse.linalg.eigsh (ARPACK), float64, plain torch.autograd products",
        "lambda_max": found,
        "ours": ours,
        "relative_difference": abs(ours - found) / abs(found),
        "matvecs": count,
        "wall_s": time.perf_counter() - start,
    }
