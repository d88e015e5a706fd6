"""Sharpness while a model trains: the ends of the Hessian's spectrum, its trace, and the optimiser's threshold."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer, RMSprop

from hvpfast.capture.data import Data
from hvpfast.capture.state import preserved
from hvpfast.dynamics.thresholds import preconditioner, stability_threshold
from hvpfast.operators.hessian import Hessian
from hvpfast.probes import Estimate, eigsh, trace


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        step: of training. loss: over the monitor's data. lambda_max, lambda_min: ends of the Hessian's spectrum.
        trace, stderr: of the Hessian, with its standard error; NaN if not asked for. threshold: of the optimiser, NaN
            without one. preconditioned: largest eigenvalue of P^-1 H, to be compared with the threshold of Adam, AdamW
            and RMSprop; NaN for SGD. eigenvalues: the k largest, descending. matvecs: products taken. converged: all
            eigenpairs did. extra: what `measure` was given besides.
    """

    step: int
    loss: float
    lambda_max: float
    lambda_min: float
    trace: float
    stderr: float
    threshold: float
    preconditioned: float
    eigenvalues: tuple[float, ...]
    matvecs: int
    converged: bool
    extra: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain numbers; NaN becomes None, as JSON needs it."""
        return {name: None if _is_nan(value) else value for name, value in asdict(self).items()}


class SharpnessMonitor:
    """Measures curvature every few steps of a training loop, on data of its own.

    Each measurement starts Lanczos from the last eigenvectors, plus a random vector so that an eigenvalue that has
    overtaken them is seen: fewer products once training moves slowly. The model is left as it was.

        monitor = SharpnessMonitor(model, loss, (X, y), every=100, trace_probes=16)
        for X_batch, y_batch in loader:
            ...
            optimizer.step()
            monitor.step(optimizer)

    Args:
        model, loss, data: as for `hvpfast.Hessian`; the same fixed data at every measurement.
        every: steps between measurements. k: how many of the largest eigenvalues. trace_probes: products spent on the
            trace, 0 for none, else at least 2. tol: relative residual of eigenpairs. seed: of vectors and probes.

    Attributes:
        records: list of Record. steps: how often `step` was called.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: object,
        data: object,
        *,
        every: int = 1,
        k: int = 1,
        trace_probes: int = 0,
        tol: float = 1e-3,
        seed: int = 0,
    ):
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"SharpnessMonitor: every is {every!r}; it must be an integer of at least 1")
        if not isinstance(trace_probes, int) or trace_probes < 0 or trace_probes == 1:
            raise ValueError(
                f"SharpnessMonitor: trace_probes is {trace_probes!r}; it must be 0, or at least 2 for an error"
            )
        self.hessian = Hessian(model, loss, data)
        size = self.hessian.shape[0]
        if not isinstance(k, int) or not 1 <= k < max(size, 2):
            raise ValueError(f"SharpnessMonitor: k is {k!r}; it must be an integer from 1 to {size - 1}")
        self.every, self.k, self.trace_probes, self.tol, self.seed = every, k, trace_probes, tol, seed
        self.records: list[Record] = []
        self.steps = 0
        self._start: dict[str, Tensor] = {}

    def step(self, optimizer: Optimizer | None = None) -> Record | None:
        """Count one training step; measure on every `every`-th. Call it after `optimizer.step()`."""
        self.steps += 1
        return self.measure(optimizer) if self.steps % self.every == 0 else None

    def measure(self, optimizer: Optimizer | None = None, **extra: object) -> Record:
        """Measure now and append the Record.

        Args:
            optimizer: for the threshold, and for P if it is adaptive and has taken a step. extra: kept in the record.
        """
        top = self._eigs("LA", self.hessian, self.k)
        bottom = self._eigs("SA", self.hessian, 1)
        found = [top, bottom]
        average = Estimate(math.nan, math.nan, 0)
        if self.trace_probes:
            average = trace(self.hessian, matvecs=self.trace_probes, seed=self.seed)
        threshold = preconditioned = math.nan
        if optimizer is not None:
            threshold = stability_threshold(optimizer).value
            if isinstance(optimizer, (Adam, RMSprop)) and optimizer.state:  # AdamW is an Adam
                diagonal = preconditioner(optimizer, self.hessian.params.values())
                found.append(self._eigs("P", Preconditioned(self.hessian, diagonal), 1))
                preconditioned = float(found[-1].values[0])
        record = Record(
            step=self.steps,
            loss=_loss(self.hessian),
            lambda_max=float(top.values[0]),
            lambda_min=float(bottom.values[0]),
            trace=float(average.value),
            stderr=float(average.stderr),
            threshold=threshold,
            preconditioned=preconditioned,
            eigenvalues=tuple(top.values.tolist()),
            matvecs=sum(each.matvecs for each in found) + average.matvecs,
            converged=all(each.converged for each in found),
            extra=dict(extra),
        )
        self.records.append(record)
        return record

    def column(self, name: str) -> list[float]:
        """One field of all records, in order."""
        return [getattr(record, name) for record in self.records]

    def save(self, path: str | os.PathLike) -> None:
        """Write the records as JSON."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump([record.to_dict() for record in self.records], file, indent=1)

    def _eigs(self, which: str, matrix: object, k: int):
        size = matrix.shape[0]
        start = self._start.get(which)
        if start is not None:
            fresh = torch.randn(size, generator=torch.Generator().manual_seed(self.seed + 1 + len(self.records)))
            start = torch.cat([start, fresh.to(start)[:, None]], 1)
        side = "SA" if which == "SA" else "LA"
        found = eigsh(matrix, k, which=side, tol=self.tol, seed=self.seed, v0=start, verify=False)
        self._start[which] = found.vectors
        return found


class Preconditioned:
    """P^-1/2 H P^-1/2 for a diagonal P: symmetric, with the eigenvalues of P^-1 H.

    Args:
        matrix: anything with .shape, .dtype, .device and @. diagonal: (P,), positive.
    """

    def __init__(self, matrix, diagonal: Tensor):
        if diagonal.shape != (matrix.shape[0],):
            raise ValueError(
                f"Preconditioned: the diagonal has shape {tuple(diagonal.shape)}; it must be ({matrix.shape[0]},)"
            )
        if not bool((diagonal > 0).all()):
            raise ValueError("Preconditioned: the diagonal must be positive everywhere; is eps 0?")
        self.matrix, self.shape, self.dtype, self.device = matrix, matrix.shape, matrix.dtype, matrix.device
        self._root = diagonal.to(device=matrix.device, dtype=matrix.dtype).rsqrt()

    def __matmul__(self, v: Tensor) -> Tensor:
        root = self._root if v.dim() == 1 else self._root[:, None]
        return root * (self.matrix @ (root * v))


def batch_sharpness(model: nn.Module, loss: object, data: object) -> Estimate:
    """Curvature that each batch's Hessian has along its own gradient, E_B[g'Hg / ||g||^2], over the batches of `data`.

    For plain mini-batch SGD this, not the largest eigenvalue, is what settles at 2/lr (arXiv:2412.20553).

    Args:
        model, loss: as for `hvpfast.Hessian`. data: a list of batches or a DataLoader; batches of the training size.

    Returns:
        Estimate: the mean over batches and its standard error (NaN for one batch); one product a batch.

    Raises:
        ValueError: if a batch's gradient is zero.
    """
    values = []
    for batch in Data(data, "batch_sharpness"):
        hessian = Hessian(model, loss, (batch.inputs, batch.target))
        g = _gradient(hessian)
        square = float(g.double() @ g.double())
        if square == 0:
            raise ValueError(f"batch_sharpness: the gradient of batch {batch.index} is zero, so it has no direction")
        values.append(float(g.double() @ (hessian @ g).double()) / square)
    spread = torch.tensor(values, dtype=torch.float64)
    stderr = float(spread.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(spread.mean()), stderr, len(values), "batch sharpness")


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _loss(hessian: Hessian) -> float:
    """The loss over the operator's data, at the parameters as they are."""
    problem, values, weights = hessian.problem, [], []
    with preserved(problem.model):
        for batch in problem.data:
            found = problem.evaluate(batch)
            if found.weight:
                values.append(float(found.value.detach()) * found.weight)
                weights.append(found.weight)
    return sum(values) / problem.batches_total(weights)


def _gradient(hessian: Hessian) -> Tensor:
    """(P,), the gradient on the operator's single batch."""
    problem = hessian.problem
    with preserved(problem.model):
        (batch,) = problem.data
        slopes = torch.autograd.grad(problem.evaluate(batch).value, list(hessian.params.values()), allow_unused=True)
    return problem.space.join(slopes, 1, problem.space.dtype)[0]
