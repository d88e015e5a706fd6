"""The model is after a call what it was before it, also when the call breaks half way."""

import pytest
import torch
from torch import nn
from zoo import classes_of, unequal

import hvpfast as hf
from hvpfast.capture.errors import StateError

LOSS = nn.CrossEntropyLoss()


class Boom(Exception):
    pass


class Fragile(nn.Module):
    """BatchNorm in train mode, a buffer that counts calls, one that is replaced, and a forward that may break."""

    def __init__(self, train_norm):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))
        self.breaks_at = None
        self.double()
        self.norm.train(train_norm)

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        if self.breaks_at is not None and int(self.calls) == self.breaks_at:
            self.eval()
            raise Boom
        return self.head(torch.tanh(self.norm(self.layer(x))))


def snapshot(model):
    return {
        "modes": [m.training for m in model.modules()],
        "buffers": {n: (id(b), b.clone()) for n, b in model.named_buffers()},
        "parameters": {n: (id(p), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()},
        "grads": {n: (id(p.grad), None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def same(x, y):
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, (tuple, list)):
        return len(x) == len(y) and all(same(a, b) for a, b in zip(x, y, strict=True))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("breaks", ["no", "in the forward pass", "in the loss", "in a hook", "in the loader"])
@pytest.mark.parametrize("kind", [hf.Hessian, hf.GGN, hf.EmpiricalFisher])
def test_state_is_restored(kind, breaks):
    torch.manual_seed(0)
    model = Fragile(train_norm=kind is hf.Hessian)
    model.head.eval()
    x, y = torch.randn(6, 4, dtype=torch.float64), classes_of(6, 3)
    LOSS(model(x), y).backward()  # gradients that must stay
    batches = unequal(x, y)[1:]
    loss, source = LOSS, batches
    if breaks == "in the forward pass":
        model.breaks_at = int(model.calls) + 2
    if breaks == "in the loss":
        seen = []

        def loss(f, t):
            seen.append(1)
            if len(seen) == 3:
                raise Boom
            return LOSS(f, t)

    if breaks == "in a hook":

        def hook(module, inputs, output):
            if int(model.calls) % 3 == 0:
                raise Boom

        model.head.register_forward_hook(hook)
    if breaks == "in the loader":

        class Loader:
            def __iter__(self):
                yield batches[0]
                raise Boom

        source = Loader()
    before = snapshot(model)
    operator = kind(model, loss, source)
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    with torch.no_grad():
        before["grad mode"] = False
        if breaks == "no":
            operator @ v
            operator @ v
        else:
            with pytest.raises(Boom):
                operator @ v
        after = snapshot(model)
    for what, value in before.items():
        assert same(value, after[what]), what


def test_works_under_no_grad_and_inference_mode():
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), classes_of(6, 3)
    operator = hf.Hessian(model, LOSS, (x, y))
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    truth = operator @ v
    for context in (torch.no_grad(), torch.inference_mode()):
        fresh = hf.Hessian(model, LOSS, (x, y))
        with context:
            assert torch.equal(fresh @ v.clone(), truth)


@pytest.mark.parametrize("kind", [hf.Hessian, hf.GGN, hf.EmpiricalFisher, hf.KFAC, hf.EKFAC])
def test_parameters_that_are_frozen_afterwards_are_named(kind):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    operator = kind(model, LOSS, (torch.randn(6, 4, dtype=torch.float64), classes_of(6, 3)))
    model[0].requires_grad_(False)
    with pytest.raises(StateError, match=r"0\.weight, 0\.bias required grad when this was made and no longer does"):
        operator @ torch.ones(operator.shape[0], dtype=torch.float64)
