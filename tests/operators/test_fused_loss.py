"""Hessian products whose loss has its own second derivative, `softmax_hvp`: the same numbers as autograd's, for every option."""

import pytest
import torch
from torch import nn
from truths import dense_hessian, parameters, relative

import hvpfast as hf
from hvpfast import ops
from hvpfast.capture.torch_losses import as_loss
from hvpfast.dispatch import Choice
from hvpfast.operators import hessian

LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "weighted": nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 4, dtype=torch.float64), label_smoothing=0.1),
    "ignored": nn.CrossEntropyLoss(ignore_index=2),
    "a function": nn.functional.cross_entropy,
}


class Net(nn.Module):
    """Logits (N, 4), or (N, 4, 3) for positions; one parameter enters the logits directly."""

    def __init__(self, positions):
        super().__init__()
        self.first, self.second, self.shift = nn.Linear(3, 5), nn.Linear(5, 4), nn.Parameter(torch.ones(4))
        self.positions = positions

    def forward(self, x):
        y = self.second(torch.tanh(self.first(x))) + self.shift
        return y.mT if self.positions else y[:, 0]


@pytest.fixture
def taken(monkeypatch):
    """The closed form also where no kernel would run; how often it was asked."""
    made, op = [], ops.softmax_hvp

    def counted(*args, **kwargs):
        made.append(args)
        return op(*args, **kwargs)

    counted.choose = lambda *args, **kwargs: Choice("cpu")
    monkeypatch.setattr(ops, "softmax_hvp", counted)
    return made


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("name", [*LOSSES, "probabilities"])
def test_every_option(name, positions, taken):
    torch.manual_seed(0)
    model, x = Net(positions).double(), torch.randn(6, 3, 3, dtype=torch.float64)
    y, loss = torch.randint(0, 4, (6, 3) if positions else (6,)), LOSSES.get(name, LOSSES["smoothed"])
    if name == "probabilities":
        y = torch.rand(*((6, 4, 3) if positions else (6, 4)), dtype=torch.float64)
    truth = dense_hessian(loss(model(x), y), parameters(model))
    made = hf.Hessian(model, loss, (x, y))
    v = torch.randn(len(truth), dtype=torch.float64)
    assert relative(made @ v, truth @ v) < 1e-11
    assert len(taken) == 1
    assert relative(made.to_dense(), truth) < 1e-11  # columns together
    batches = hf.Hessian(model, loss, [(x[:4], y[:4]), (x[4:], y[4:])])
    if name != "ignored":
        assert relative(batches.to_dense(), truth) < 1e-11
    some = hf.Hessian(model, loss, (x, y), params=[model.second.weight, model.shift])
    assert relative(some.to_dense(), dense_hessian(loss(model(x), y), [model.second.weight, model.shift])) < 1e-11


def known(loss):
    return as_loss(loss, "a test")


def test_where_it_is_taken():
    z = torch.randn(4, 1000, requires_grad=True)
    runs = ops.softmax_hvp.choose(z.detach(), z.detach()).backend != "reference"
    assert hessian._fused(known(nn.CrossEntropyLoss()), z) == runs
    assert not hessian._fused(known(nn.NLLLoss()), z) and not hessian._fused(known(nn.MSELoss()), z)
    assert not hessian._fused(known(lambda a, b: a.sum()), z)
    assert not hessian._fused(known(nn.CrossEntropyLoss()), z.bfloat16())
    assert not hessian._fused(known(nn.CrossEntropyLoss()), z[0]) and not hessian._fused(
        known(nn.CrossEntropyLoss()), (z,)
    )
    with hf.backend("reference"):
        assert not hessian._fused(known(nn.CrossEntropyLoss()), z)
    with hf.backend("cuda"):  # where it has none
        assert not hessian._fused(known(nn.CrossEntropyLoss()), z)


def test_a_third_derivative_raises(taken):
    z, y = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    loss = known(nn.CrossEntropyLoss())
    slope = hessian._LossSlope.apply(z, torch.zeros(3, 5), loss, y)
    (product,) = torch.autograd.grad(slope.sin().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        product.sum().backward()


def test_a_vocabulary_in_float32():
    """The kernels', where there are any, against float64 autograd along one direction."""
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 700)),
        torch.randn(9, 3),
        torch.randint(0, 700, (9,)),
    )
    made = hf.Hessian(model, nn.CrossEntropyLoss(), (x, y))
    v = torch.randn(made.shape[0])
    found = (made @ v).double()
    model.double()
    params = parameters(model)
    slope = torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(nn.functional.cross_entropy(model(x.double()), y), params, create_graph=True)
        ]
    )
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(slope, params, v.double())])
    assert relative(found, truth) < 3e-6
