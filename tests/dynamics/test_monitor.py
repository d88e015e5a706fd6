"""SharpnessMonitor and batch_sharpness against dense autograd."""

import json
import math

import pytest
import torch
from torch import nn

from hvpfast.dynamics import Preconditioned, SharpnessMonitor, batch_sharpness, preconditioner


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, nn.CrossEntropyLoss(), torch.randn(20, 5).double(), torch.randint(0, 3, (20,))


def dense(model, loss, x, y):
    params = dict(model.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])

    def of(vector):
        pieces = vector.split([p.numel() for p in params.values()])
        replaced = {name: piece.view_as(p) for (name, p), piece in zip(params.items(), pieces, strict=True)}
        return loss(torch.func.functional_call(model, replaced, (x,)), y)

    return torch.autograd.functional.hessian(of, flat), torch.autograd.functional.jacobian(of, flat)


def test_records_of_a_training_run_agree_with_dense_hessians():
    model, loss, x, y = problem()
    model[0].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    monitor = SharpnessMonitor(model, loss, [(x[:7], y[:7]), (x[7:], y[7:])], every=3, k=2, trace_probes=512)
    for _ in range(9):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        record = monitor.step(optimizer)
        assert (record is None) == (monitor.steps % 3 != 0)
        if record is not None:
            hessian, _ = dense(model, loss, x, y)
            values = torch.linalg.eigvalsh(hessian)
            assert record.lambda_max == pytest.approx(float(values[-1]), rel=1e-4)
            assert record.lambda_min == pytest.approx(float(values[0]), rel=1e-3, abs=1e-6)
            assert record.eigenvalues == pytest.approx(values[-2:].flip(0).tolist(), rel=1e-3)
            assert record.trace == pytest.approx(float(hessian.trace()))  # more probes than parameters: exact
            assert record.stderr == 0 and record.converged
            assert record.loss == pytest.approx(float(loss(model(x), y).detach()))
            assert record.threshold == pytest.approx(6.0)
            assert math.isnan(record.preconditioned)
    assert [record.step for record in monitor.records] == [3, 6, 9]
    assert not model[0].training and model[1].training
    assert monitor.column("lambda_max") == [record.lambda_max for record in monitor.records]


def test_a_warm_start_saves_products_and_sees_an_overtaking_eigenvalue():
    torch.manual_seed(0)
    d = torch.cat([torch.linspace(0, 1, 300), torch.tensor([3.0, 2.5])]).double()
    x = nn.Parameter(torch.zeros(302).double())

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.d = x, d.clone()

        def forward(self, inputs):
            return 0.5 * (self.d * self.x.square()).sum() + 0 * inputs.sum()

    model = Quadratic()
    monitor = SharpnessMonitor(model, lambda out, _: out.sum(), (torch.zeros(1, 1).double(), torch.zeros(1)), tol=1e-6)
    assert monitor.measure().lambda_max == pytest.approx(3.0)
    model.d[-1] = 4.0
    with torch.no_grad():
        model.x += 1e-9  # a training step: the operator looks again
    assert monitor.measure().lambda_max == pytest.approx(4.0)


def test_adam_gets_its_preconditioned_sharpness(tmp_path):
    model, loss, x, y = problem()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    monitor = SharpnessMonitor(model, loss, (x, y), tol=1e-6)
    assert math.isnan(monitor.measure(optimizer, epoch=0).preconditioned)  # no step yet, so no P
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    record = monitor.measure(optimizer, epoch=1)
    hessian, _ = dense(model, loss, x, y)
    p = preconditioner(optimizer)
    truth = torch.linalg.eigvals(hessian / p[:, None]).real.max()
    assert record.preconditioned == pytest.approx(float(truth), rel=1e-4)
    assert record.threshold == pytest.approx(3800)
    torch.testing.assert_close(
        Preconditioned(hessian, p) @ torch.eye(len(p)).double(), hessian / (p[:, None] * p).sqrt()
    )
    monitor.save(tmp_path / "records.json")
    stored = json.loads((tmp_path / "records.json").read_text())
    assert stored[0]["preconditioned"] is None and stored[1]["extra"] == {"epoch": 1}


def test_batch_sharpness():
    model, loss, x, y = problem()
    batches = [(x[:5], y[:5]), (x[5:15], y[5:15]), (x[15:], y[15:])]
    found = batch_sharpness(model, loss, batches)
    values = []
    for part in batches:
        hessian, g = dense(model, loss, *part)
        values.append(float(g @ hessian @ g / (g @ g)))
    values = torch.tensor(values).double()
    assert found.value == pytest.approx(float(values.mean())) and found.matvecs == 3
    assert found.stderr == pytest.approx(float(values.std() / 3**0.5))
    assert all(p.grad is None for p in model.parameters())


def test_bad_arguments():
    model, loss, x, y = problem()
    with pytest.raises(ValueError, match="every"):
        SharpnessMonitor(model, loss, (x, y), every=0)
    with pytest.raises(ValueError, match="trace_probes"):
        SharpnessMonitor(model, loss, (x, y), trace_probes=1)
    with pytest.raises(ValueError, match="k is 0"):
        SharpnessMonitor(model, loss, (x, y), k=0)
    with pytest.raises(ValueError, match="positive"):
        Preconditioned(torch.eye(2), torch.zeros(2))
