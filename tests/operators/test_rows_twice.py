"""Activations and norm layers that are differentiated twice by one op: the same numbers as autograd's own, to float64, and
torch's own functions wherever something is unusual."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from truths import dense_ggn, dense_hessian, parameters, relative
from zoo import MODELS, make

import hvpfast as hf
from hvpfast import ops
from hvpfast.capture import rows_twice, stand_in
from hvpfast.capture.state import twice_differentiable
from hvpfast.operators.ggn import RowsPiece
from hvpfast.operators.linearize import gradient, saved_bytes
from hvpfast.testing import assert_accurate

LOSS = nn.CrossEntropyLoss()
RUNS = ops.activation_rop.choose(*[torch.randn(3)] * 3, activation="gelu").backend != "reference"
ACTIVATIONS = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
}
NORMS = {
    "layer": lambda: nn.LayerNorm(6, eps=1e-2),
    "layer, no bias": lambda: nn.LayerNorm(6, bias=False),
    "layer, plain": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "layer, two axes": lambda: nn.LayerNorm((2, 6)),
    "rms": lambda: nn.RMSNorm(6),
    "rms, eps": lambda: nn.RMSNorm(6, eps=0.1),
    "rms, plain": lambda: nn.RMSNorm(6, elementwise_affine=False),
    "rms, two axes": lambda: nn.RMSNorm((2, 6)),
}


class Net(nn.Module):
    """A norm of data and one of activations (N, 2, 6), around an activation; parameters that are not ones and zeros."""

    def __init__(self, activation, norm):
        super().__init__()
        self.before, self.first, self.norm, self.second = norm(), nn.Linear(6, 6), norm(), nn.Linear(12, 3)
        self.activation = activation
        generator = torch.Generator().manual_seed(2)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 2

    def forward(self, x):
        return self.second(self.activation(self.norm(self.first(self.before(x)))).flatten(1))


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the ops, in order."""
    made = []

    def counted(op, label):
        def run(*args, **kwargs):
            made.append((label(kwargs), kwargs["of"]))
            return op(*args, **kwargs)

        run.reference, run.choose = op.reference, op.choose
        return run

    monkeypatch.setattr(ops, "activation_rop", counted(ops.activation_rop, lambda kwargs: kwargs["activation"]))
    monkeypatch.setattr(ops, "norm_rop", counted(ops.norm_rop, lambda kwargs: "norm"))
    return made


@pytest.fixture
def taken(monkeypatch, calls):
    """The ops wherever there is nothing unusual: also in float64, and without a kernel."""
    monkeypatch.setattr(stand_in, "runs", lambda *args, **kwargs: True)
    return calls


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 2, 6, generator=generator, dtype=torch.float64).to(dtype), torch.randint(
        0, 3, (5,), generator=generator
    )


def hold(model, x, y, tolerance=1e-10):
    """Both matrices against dense float64 autograd through torch's own formulas, vector by vector and columns together."""
    exact = copy.deepcopy(model).double()
    truths = dense_hessian(LOSS(exact(x.double()), y), parameters(exact)), dense_ggn(exact, LOSS, x.double(), y)
    for operator, truth in zip((hf.Hessian, hf.GGN), truths, strict=True):
        made = operator(model, LOSS, (x, y))
        v = torch.randn(len(truth), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        assert relative((made @ v.to(x.dtype)).double(), truth @ v) < tolerance
        assert relative(made.to_dense().double(), truth) < tolerance


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, taken):
    hold(Net(ACTIVATIONS[name], NORMS["layer"]).double(), *data())
    found = {of for label, of in taken if label == name}
    assert found == ({"gx"} if name in rows_twice._OWN_SLOPES else {"gx", "g"})  # the GGN's products ask for one


@pytest.mark.parametrize("name", NORMS)
def test_norms(name, taken):
    model = Net(nn.Tanh(), NORMS[name]).double()
    hold(model, *data())
    weight = model.norm.weight is not None
    assert {of for label, of in taken if label == "norm"} == ({"gxw", "gw", "g"} if weight else {"gx", "g"}) - (
        {"gw"} if not weight else set()
    )


@pytest.mark.parametrize("frozen", ["norm.weight", "norm.bias", "before", "first"])
def test_what_is_frozen(frozen, taken):
    model = Net(nn.GELU(), NORMS["layer"]).double()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    hold(model, *data())
    assert taken


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_zoo(name, taken):
    from truths import call

    case = make(name)
    target = torch.randint(0, case.classes, (6,))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truths = (
            dense_hessian(LOSS(call(case.model, case.inputs), target), parameters(case.model)),
            dense_ggn(case.model, LOSS, case.inputs, target),
        )
    for operator, truth in zip((hf.Hessian, hf.GGN), truths, strict=True):
        v = torch.randn(len(truth), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        assert relative(operator(case.model, LOSS, (case.inputs, target)) @ v, truth @ v) < 1e-10


class Encoder(nn.Module):
    """torch's own transformer layer, pre- or post-norm, its norms and its GELU by functions."""

    def __init__(self, first):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True, norm_first=first)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


@pytest.mark.skipif(not RUNS, reason="no kernel here")
@pytest.mark.parametrize("first", [True, False])
def test_a_float32_transformer_takes_the_kernels(first, calls):
    torch.manual_seed(0)
    model, x, y = Encoder(first), torch.randn(4, 5, 8), torch.randint(0, 3, (4,))
    exact = copy.deepcopy(model).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truths = dense_hessian(LOSS(exact(x.double()), y), parameters(exact)), dense_ggn(exact, LOSS, x.double(), y)
    for operator, truth, asked in zip((hf.Hessian, hf.GGN), truths, (("gx", "gxw"), ("g", "g")), strict=True):
        made, v = operator(model, LOSS, (x, y)), torch.randn(len(truth))
        made @ v
        calls.clear()
        found = made @ v
        assert sorted(label for label, _ in calls) == ["gelu", "norm", "norm"]
        assert {of for label, of in calls if label == "gelu"} == {asked[0]}
        assert asked[1] in {of for label, of in calls if label == "norm"}
        assert relative(found.double(), truth @ v.double()) < 3e-6
        with hf.backend("reference"):  # of the kept graph too
            assert relative((made @ v).double(), truth @ v.double()) < 3e-6


@pytest.mark.parametrize("name", [*ACTIVATIONS, "layer", "rms"])
def test_third_derivatives_are_right(name, taken):
    torch.manual_seed(0)
    parts = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def value(*functions):
        x, g, c = parts
        if name in ACTIVATIONS:
            y = functions[0](x)
        elif name == "layer":
            y = functions[1](x, (6,), weight, None, 0.1)
        else:
            y = functions[2](x, (6,), weight, 0.1)
        inputs = (x,) if name in ACTIVATIONS else (x, weight)
        slopes = torch.autograd.grad(y, inputs, g, create_graph=True)
        pulled = torch.autograd.grad(slopes, (*inputs, g), (c, c[0])[: len(slopes)], create_graph=True)
        total = sum((p * torch.linspace(1, 2, p.numel()).reshape(p.shape)).sum() for p in pulled)
        return torch.autograd.grad(total, (x, g, c, *inputs[1:]))

    own = ACTIVATIONS.get(name, nn.GELU())
    functions = {"gelu": rows_twice.gelu, "gelu_tanh": lambda x: rows_twice.gelu(x, approximate="tanh")}
    mine = functions.get(name, getattr(rows_twice, name, None))

    def centred(x, shape, w, b, eps):  # by its formula: of torch's own the third derivative is wrong
        rest = x - x.mean(1, keepdim=True)
        return rest / (rest.square().mean(1, keepdim=True) + eps).sqrt() * w

    wants = value(own, centred, F.rms_norm)
    for found, want in zip(value(mine, rows_twice.layer_norm, rows_twice.rms_norm), wants, strict=True):
        assert relative(found, want) < 1e-11


def test_a_backward_pass_of_all_leaves(taken):
    """`.backward()` names no inputs: everything is wanted."""
    found = []
    for functions in ((F.gelu, F.layer_norm), (rows_twice.gelu, rows_twice.layer_norm)):
        torch.manual_seed(0)
        x, w = (
            torch.randn(5, 4, dtype=torch.float64, requires_grad=True),
            torch.randn(4, dtype=torch.float64, requires_grad=True),
        )
        y = functions[1](functions[0](x * 1.5), (4,), w).sin().sum()
        slopes = torch.autograd.grad(y, (x, w), create_graph=True)
        sum(s.square().sum() for s in slopes).backward()
        found.append((x.grad, w.grad))
    assert all(relative(a, b) < 1e-12 for a, b in zip(*found, strict=True))
    assert taken


def test_captured_rows_go_on_being_found(taken):
    """Where samples lie is told from the graph's nodes, these among them: a Monte-Carlo Fisher keeps a and g."""
    model, (x, y) = Net(nn.GELU(), NORMS["layer"]).double(), data()
    made = hf.GGN(model, LOSS, (x, y), mc_samples=2)
    with hf.backend("reference"):
        v = torch.randn(made.shape[1], dtype=torch.float64)
        found = made @ v
    assert isinstance(made._kept[0][0], RowsPiece)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_twice, "wanted", lambda model: False)
        patch.setattr(rows_twice, "REPLACED", {})
        assert relative(found, hf.GGN(model, LOSS, (x, y), mc_samples=2) @ v) < 1e-12


def test_no_more_memory_than_torch_keeps(taken):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.LayerNorm(40), nn.GELU(), nn.Linear(40, 2))
    x, y = torch.randn(60, 40), torch.randint(0, 2, (60,))
    kept = []
    for replaced in (rows_twice.REPLACED, {}):
        with pytest.MonkeyPatch.context() as patch, twice_differentiable(model):
            patch.setattr(rows_twice, "REPLACED", replaced)
            slope = gradient(LOSS(model(x), y), list(model.parameters()))
        kept.append(saved_bytes([s for s in slope if s is not None]))
    assert kept[0] <= kept[1] + 3 * 4 * 60  # a number or two a row


def nodes(y):
    return type(y.grad_fn).__name__


def test_left_to_torch(monkeypatch):
    """Everything that is not a float32 or float64 graph which nobody watches."""
    monkeypatch.setattr(stand_in, "runs", lambda *args, **kwargs: True)
    x = torch.randn(3, 4, requires_grad=True)
    model = nn.Sequential(nn.GELU(), nn.SiLU())
    with twice_differentiable(model):
        assert nodes(F.gelu(x)) == nodes(nn.GELU("tanh")(x)) == nodes(F.silu(x)) == "_ActivationBackward"
        assert nodes(F.layer_norm(x, (4,))) == nodes(F.rms_norm(x, (3, 4))) == "_NormBackward"
        assert nodes(F.silu(x * 1, inplace=True)) == nodes(F.silu(x * 1, True)) == "SiluBackward0"
        assert nodes(F.softplus(x, 2)) == nodes(F.softplus(x, threshold=3)) == "SoftplusBackward0"
        assert nodes(F.gelu(x.bfloat16())) == "GeluBackward0"
        assert nodes(F.softplus(x, 1, 20.5)) == "SoftplusBackward0"
        with torch.autocast("cpu", torch.bfloat16):
            assert nodes(F.gelu(x)) == "GeluBackward0"
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):  # a checkpoint's
            assert nodes(F.gelu(x)) == "GeluBackward0"
        with torch.no_grad():
            assert F.gelu(x).grad_fn is None
        assert F.gelu(x.detach()).grad_fn is None and torch.equal(F.gelu(x.detach()), F.gelu(x).detach())
        assert nodes(F.layer_norm(x[:0], (4,))) == "NativeLayerNormBackward0"
        for bad in (
            lambda: F.layer_norm(x, (5,)),
            lambda: F.layer_norm(x, (4,), x[0, :3]),
            lambda: F.gelu(x, approximate="no"),
        ):
            with pytest.raises(RuntimeError):
                bad()


def test_checkpoints_make_the_same_graph_again(calls):
    """At every product, also of a kept graph, when torch's own functions are no longer replaced."""

    class Saves(nn.Sequential):
        def forward(self, x):
            return (
                super().forward(x)
                if self.training
                else torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
            )

    torch.manual_seed(0)
    model = Saves(nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))
    x, y, v = torch.randn(4, 8), torch.randint(0, 3, (4,)), torch.randn(87)
    want = hf.Hessian(model, LOSS, (x, y)) @ v
    made = hf.Hessian(model.eval(), LOSS, (x, y))
    calls.clear()
    assert all(relative(made @ v, want) < 3e-6 for _ in range(2))
    assert not calls


def test_values_are_torchs_own(taken):
    torch.manual_seed(0)
    x, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((7, 9), (9,), (9,)))
    for mine, own in (
        (rows_twice.gelu(x), F.gelu(x)),
        (rows_twice.mish(x), F.mish(x)),
        (rows_twice.softplus(x), F.softplus(x)),
        (rows_twice.layer_norm(x, (9,), w, b), F.layer_norm(x, (9,), w, b)),
        (rows_twice.rms_norm(x, (9,), w), F.rms_norm(x, (9,), w)),
    ):
        assert torch.equal(mine, own)
        assert all(
            torch.allclose(*pair, rtol=1e-5, atol=1e-6)
            for pair in zip(
                torch.autograd.grad(mine.sum(), x, retain_graph=True), torch.autograd.grad(own.sum(), x), strict=True
            )
        )


def test_which_models_it_watches():
    assert not rows_twice.wanted(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Conv1d(3, 3, 1), nn.Flatten()))
    assert rows_twice.wanted(nn.Sequential(nn.Linear(3, 3), nn.GELU()))
    assert rows_twice.wanted(Encoder(True)) and rows_twice.wanted(nn.TransformerEncoderLayer(4, 1))
    assert not stand_in.runs(ops.activation_rop, *[torch.randn(3).double()] * 3, activation="gelu")
    with hf.backend("reference"):
        assert not stand_in.runs(ops.activation_rop, *[torch.randn(3)] * 3, activation="gelu")
    with hf.backend("cuda"):  # where it has none
        assert not stand_in.runs(ops.activation_rop, *[torch.randn(3)] * 3, activation="gelu")


def test_changes_in_place_are_noticed(taken):
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            y = self.linear(x)
            z = F.gelu(y)
            y.add_(1)
            return z + y

    with pytest.raises(hf.StateError, match="changed in place"):
        hf.Hessian(Changes(), LOSS, (torch.randn(5, 4), torch.randint(0, 3, (5,)))) @ torch.randn(15)


def test_ops_against_differences_of_the_first_derivative():
    """c'(phi'(x + h) - phi'(x - h)) g / 2h with torch's first derivatives: to the square of h."""
    generator = torch.Generator().manual_seed(0)
    x, g, c = (3 * torch.randn(40, dtype=torch.float64, generator=generator) for _ in range(3))
    h = 1e-5
    for name, slope in rows_twice._SLOPES.items():
        of_g, of_x = ops.activation_rop.reference(x, g, c, activation=name)
        assert relative(of_g, slope(c, x)) < 1e-13
        assert relative(of_x, c * (slope(g, x + h) - slope(g, x - h)) / (2 * h)) < 1e-8


def test_far_out_and_not_numbers():
    x = torch.tensor([-3e38, -1e20, -200.0, -20.5, -8.0, -0.0, 0.0, 8.0, 20.5, 200.0, 1e20, 3e38])
    g, c = torch.full_like(x, 2.0), torch.full_like(x, 3.0)
    for backend in ("reference", *(["cpu"] if ops.activation_rop.why_not("cpu") is None else [])):
        for name in ops.rop.ACTIVATIONS:
            found = ops.activation_rop.on(backend)(x, g, c, activation=name)
            assert_accurate(found, ops.activation_rop, x, g, c, activation=name)
            limit = torch.where(x > 15, 3.0, 0.0)
            assert torch.allclose(found[0][x.abs() > 15], limit[x.abs() > 15], atol=1e-6)
            odd = ops.activation_rop.on(backend)(*[torch.full((3,), torch.nan)] * 1, g[:3], c[:3], activation=name)
            assert all(y.isnan().all() for y in odd)


V, ROWS, GELU = torch.zeros(3, 5), torch.zeros(3), {"activation": "gelu"}


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "kind", "message"),
    [
        ("activation_rop", (V, V, V.T), GELU, ValueError, r"x has shape \(3, 5\), g \(3, 5\) and c \(5, 3\)"),
        ("activation_rop", (V, V, V.double()), GELU, TypeError, "x is torch.float32 but c is torch.float64"),
        ("activation_rop", (V, V, V), {**GELU, "of": "xg"}, ValueError, "of is 'xg'; it must be letters of 'gx'"),
        ("norm_rop", (V, V, V[0]), {"c": V}, ValueError, r"rstd has shape \(5,\); for x \(3, 5\) it must be \(3,\)"),
        ("norm_rop", (V, V, ROWS.double()), {"c": V}, TypeError, "rstd is torch.float64; for x in torch.float32 it"),
        ("norm_rop", (V, V, ROWS), {}, ValueError, "c, c_weight and c_bias are all None; give at least one"),
        ("norm_rop", (V, V, ROWS), {"c": V}, ValueError, "of is 'gxw' but weight is None"),
        ("norm_rop", (V, V, ROWS.to("meta")), {"c": V, "of": "g"}, ValueError, "x is on cpu but rstd is on meta"),
    ],
)
def test_the_ops_say_what_is_wrong(op, args, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        getattr(ops, op)(*args, **kwargs)
