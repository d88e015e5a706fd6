"""Products whose linear layers are differentiated twice by one op, as on GPUs: the same numbers as autograd's own, to float64."""

import pytest
import torch
from torch import nn
from truths import call, dense_ggn, dense_hessian, parameters, relative
from zoo import MODELS, make

import hvpfast as hf
from hvpfast import ops
from hvpfast.capture import linear_twice
from hvpfast.operators.linearize import saved_bytes

# Models in which no linear map has both tangents, the input's and the weight's: a product each, no sum.
SINGLE = ("keywords", "tuple", "low rank", "frozen first layer")


@pytest.fixture
def taken(monkeypatch):
    """Every linear map by the op; what it was called with."""
    calls, op = [], ops.linear_rop
    monkeypatch.setattr(linear_twice, "wanted", lambda model: True)
    monkeypatch.setattr(linear_twice, "_pays", lambda x, w: True)
    monkeypatch.setattr(linear_twice.ops, "linear_rop", lambda *a, **k: calls.append(a) or op(*a, **k))
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_products_and_dense_matrices(name, taken):
    case = make(name)
    model, inputs, target = case.model, case.inputs, torch.randint(0, case.classes, (6,))
    loss = nn.CrossEntropyLoss()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truths = (
            dense_hessian(loss(call(model, inputs), target), parameters(model)),
            dense_ggn(model, loss, inputs, target),
        )
    linears = any(type(module) is nn.Linear for module in model.modules()) and name not in SINGLE
    for operator, truth in zip((hf.Hessian, hf.GGN), truths, strict=True):
        made = operator(model, loss, (inputs, target))
        v = torch.randn(len(truth), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        taken.clear()
        assert relative(made @ v, truth @ v) < 1e-10
        assert bool(taken) == linears
        assert relative(made.to_dense(), truth) < 1e-10  # columns together


def test_layers_that_share_freeze_or_leave_out(taken):
    """A frozen weight, no bias, an input that needs a gradient, one module called twice."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
            self.first.weight.requires_grad_(True)
            self.second.weight.requires_grad_(False)

        def forward(self, x):
            return self.second(torch.tanh(self.first(torch.sin(self.first(x)))))

    torch.manual_seed(0)
    model, x, y = Twice().double(), torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 3, (5,))
    loss = nn.CrossEntropyLoss()
    params = [p for p in model.parameters() if p.requires_grad]
    truth = dense_hessian(loss(model(x), y), params)
    made = hf.Hessian(model, loss, (x, y))
    for v in torch.eye(len(truth), dtype=torch.float64)[:5]:
        assert relative(made @ v, truth @ v) < 1e-10
    assert taken


def test_a_graph_of_it_says_what_memory_it_holds(taken):
    torch.manual_seed(0)
    x, layer = torch.randn(50, 40), nn.Linear(40, 30)
    x = x * torch.ones(40, requires_grad=True)  # not a leaf
    assert saved_bytes([linear_twice.linear(x, layer.weight, layer.bias)]) >= 4 * 50 * 40


def test_triton_products_of_a_float32_model(monkeypatch):
    pytest.importorskip("triton")
    if (reason := ops.linear_rop.why_not("triton")) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(linear_twice, "wanted", lambda model: True)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Linear(7, 17), nn.Tanh(), nn.Linear(17, 3)).to(device)
    x, y, loss = torch.randn(9, 7, device=device), torch.randint(0, 3, (9,), device=device), nn.CrossEntropyLoss()
    truth = dense_ggn(model.double(), loss, x.double(), y)
    made, v = hf.GGN(model.float(), loss, (x, y)), torch.randn(len(truth), device=device)
    ran, launch = [], ops.linear_rop
    with hf.backend("triton"):
        monkeypatch.setattr(
            linear_twice.ops, "linear_rop", lambda *a, **k: ran.append(launch.on("triton")) or launch(*a, **k)
        )
        monkeypatch.setattr(linear_twice, "_pays", lambda x, w: True)
        assert relative(made @ v, truth @ v.double()) < 1e-6
    assert len(ran) == 1  # the first layer's input has no tangent


def test_where_it_is_taken():
    x, w = torch.randn(4, 3), torch.randn(5, 3)
    assert not linear_twice.wanted(nn.Linear(3, 2)) and not linear_twice._pays(x, w)
    with hf.backend("reference"):
        assert not linear_twice._pays(x, w)
    with hf.backend("cuda"):  # where it has none
        assert not linear_twice._pays(x, w)
    if ops.linear_rop.why_not("triton") is None and not torch.cuda.is_available():
        with hf.backend("triton"):
            assert linear_twice._pays(x, w) and not linear_twice._pays(x.double(), w.double())
            with torch.autocast("cpu", torch.bfloat16):
                assert not linear_twice._pays(x, w)


def test_ops_take_the_reference_in_batched_gradients():
    """Tensors that stand for K of them have no memory that a kernel could read."""

    class Squares(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return ops.gram(g)

    torch.manual_seed(0)
    x, vectors = torch.randn(20, 20, requires_grad=True), torch.randn(3, 20, 20)
    (found,) = torch.autograd.grad(Squares.apply(x), x, vectors, is_grads_batched=True)
    assert relative(found, vectors.mT @ vectors) < 1e-6
