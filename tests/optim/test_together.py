"""All layers' gradients by one op, as on GPUs: the same numbers as layer by layer."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hvpfast as hf
from hvpfast import ops
from hvpfast.optim import together


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Mixed(nn.Module):
    """Layers of one group, of several, a table, a norm layer, and a weight without a bias."""

    def __init__(self):
        super().__init__()
        self.table, self.first = nn.Embedding(7, 6), nn.Linear(6, 8, bias=False)
        self.deep, self.apart = nn.Conv1d(8, 6, 2), nn.Conv1d(6, 4, 1, groups=2)
        self.norm, self.last = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.first(self.table(x))).transpose(1, 2)
        return self.last(self.norm(torch.tanh(self.apart(torch.tanh(self.deep(h)))).mean(2)))


def stepped(kind, dtype, steps=3, **options):
    """Gradients after each of some steps, the damping falling, new inverses in every second."""
    torch.manual_seed(0)
    model, x, y = Mixed().to(dtype), torch.randint(0, 7, (9, 5)), torch.arange(9) % 3
    made = kind(model, lr=0.1, damping=lambda step: 0.1 / (1 + step), inv_update_steps=2, kl_clip=None, **options)
    found = []
    for _ in range(steps):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        made.step()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return found


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize("method", ["eigen", "inverse", "corrected"])
def test_as_layer_by_layer(monkeypatch, method, tolerance):
    kind = hf.optim.EKFACPreconditioner if method == "corrected" else hf.optim.KFACPreconditioner
    options = {"tolerance": tolerance, **({} if method == "corrected" else {"compute_method": method})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = stepped(kind, torch.float64, **options)
        calls = []
        for name in ("kron_apply", "kron_solve"):
            function = getattr(ops, name)
            monkeypatch.setattr(together, name, lambda *a, f=function, n=name: calls.append((n, len(a[0]))) or f(*a))
        monkeypatch.setattr(together, "TOGETHER", ("cpu",))
        got = stepped(kind, torch.float64, **options)
    for one, other in zip(got, want, strict=True):
        for name, grad in one.items():
            assert (grad - other[name]).norm() <= 1e-12 * other[name].norm(), name
    assert {name for name, _ in calls} == {"kron_apply" if method == "inverse" else "kron_solve"}
    assert all(count in ((3,) if not tolerance or method == "inverse" else (1, 2, 3)) for _, count in calls)


@pytest.mark.parametrize("method", ["eigen", "inverse"])
def test_narrow_inverses_keep_their_dtype(monkeypatch, method):
    options = {"inv_dtype": torch.bfloat16, "compute_method": method}
    want = stepped(hf.optim.KFACPreconditioner, torch.float32, **options)
    monkeypatch.setattr(together, "TOGETHER", ("cpu",))
    got = stepped(hf.optim.KFACPreconditioner, torch.float32, **options)
    for one, other in zip(got, want, strict=True):
        for name, grad in one.items():
            assert grad.dtype is torch.float32 and (grad - other[name]).norm() <= 0.05 * other[name].norm(), name
