"""Factors, norms and second moments whose layers run in bf16x3: the numbers of float64 to that precision, on every model."""

import copy
import functools

import pytest
import tiers
import torch
import torch.nn.functional as F
from hvpfast.kernels import native_layers
from torch import nn
from zoo import MODELS, classes_of, make

import hvpfast as hf
from hvpfast import ops
from hvpfast.capture import samples, stand_in
from hvpfast.capture import statistics_precision as sp
from hvpfast.testing import error

NO_AMX = tiers.WHY_NONE or tiers.native._modules["cpu"].tiers()["amx"]
LOSS = nn.CrossEntropyLoss(label_smoothing=0.1)


@pytest.fixture
def everywhere(monkeypatch):
    """However small, layers take the kernels; yields how many calls did."""
    if NO_AMX is not None:
        pytest.skip(f"no AMX: {NO_AMX}")
    ran = []
    monkeypatch.setattr(sp, "_LEAST", (1, 1))
    monkeypatch.setattr(native_layers, "_TERMS", 0)
    for op in (ops.matmul, ops.convolve):
        one = op._load("cpu")
        monkeypatch.setattr(one, "slower", None)
        run = one.run
        monkeypatch.setattr(one, "run", lambda *args, run=run, **kwargs: ran.append(1) or run(*args, **kwargs))
    with tiers.forced("amx"):
        yield ran


def single(x):
    if isinstance(x, torch.Tensor):
        return x.float() if x.is_floating_point() else x
    if isinstance(x, dict):
        return {name: single(part) for name, part in x.items()}
    return type(x)(single(part) for part in x) if isinstance(x, (tuple, list)) else x


class Convolutions(nn.Module):
    """Strides, dilation, string padding, one axis and two, 1 x 1, a shared layer, a channels-last input."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.same = nn.Conv2d(6, 6, 3, padding="same")
        self.wide = nn.Conv2d(6, 6, (1, 3), padding=(0, 2), dilation=(1, 2), bias=False)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.down = nn.Conv2d(6, 4, 1, stride=2)
        self.line, self.head = nn.Conv1d(4, 5, 2, padding=1), nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.same(torch.tanh(self.same(x))))
        x = torch.tanh(self.grouped(torch.tanh(self.wide(x)))).contiguous(memory_format=torch.channels_last)
        return self.head(torch.tanh(self.line(self.down(x).flatten(2))).mean(2))


def problems():
    for name in MODELS:
        yield name, lambda name=name: make(name)
    torch.manual_seed(3)
    yield "convolutions", lambda: (Convolutions().double(), torch.randn(6, 3, 11, 10, dtype=torch.float64), 3)


PROBLEMS = dict(problems())


def quantities(model, data):
    for kind in ("type-2", "empirical", "forward-only", "curvature-propagation"):  # the last: the forward pass too
        for name, (a, g) in hf.KFAC(model, LOSS, data, fisher_type=kind).factors.items():
            yield f"{kind} {name}", [a, g]
    yield "EKFAC", [hf.EKFAC(model, LOSS, data, fisher_type="type-2").trace()]
    yield "norms", [hf.per_sample_grad_norms(model, LOSS, data)]
    yield "second moment", list(hf.grad_second_moment(model, LOSS, data).values())


@pytest.mark.filterwarnings("ignore:.*no layer rule covers")
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_numbers_of_float64(everywhere, name):
    model, inputs, classes = PROBLEMS[name]()
    target = classes_of(6, classes)
    exact = dict(quantities(model, (inputs, target)))
    narrow = copy.deepcopy(model).float()
    found = dict(quantities(narrow, (single(inputs), target)))
    assert everywhere or name not in ("mlp", "convolutions", "attention")
    assert exact.keys() == found.keys()
    for label in exact:
        for one, truth in zip(found[label], exact[label], strict=True):
            one, truth = (x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in (one, truth))
            assert error(one, truth)[0] < 5e-5, label


def test_full_precision_and_gradients_are_not_touched(everywhere):
    model, inputs, _ = make("mlp") if "mlp" in MODELS else make(MODELS[0])
    model, data = model.float(), (single(inputs), classes_of(6, 3))
    with hf.precision("ieee"):
        assert hf.KFAC(model, LOSS, data).trace() > 0
        hf.per_sample_grad_norms(model, LOSS, data)
    hf.per_sample_grads(model, LOSS, data)
    hf.clipped_grad(model, LOSS, data, max_norm=1.0)
    hf.grad_statistics(model, LOSS, data)
    hf.GGN(model, LOSS, data) @ torch.ones(sum(p.numel() for p in model.parameters()))
    assert not everywhere


def test_no_weight_s_gradient_is_formed(everywhere, monkeypatch):
    asked, wants = [], stand_in.wants
    monkeypatch.setattr(stand_in, "wants", lambda ctx, which: asked.append((which, wants(ctx, which))) or asked[-1][1])
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    assert hf.KFAC(model, LOSS, (torch.randn(5, 2, 8, 8), classes_of(5, 3))).trace() > 0
    assert asked and all(wanted == (which == 0) for which, wanted in asked)


def test_a_weight_without_a_rule_still_has_its_gradient(everywhere, monkeypatch):
    """Used by a module and by itself: autograd's, through the package's own node."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.inner(x)) + F.linear(x, self.inner.weight.square(), self.inner.bias))

    monkeypatch.setattr(samples, "_warned", set())
    torch.manual_seed(0)
    model, x, y = Both(), torch.randn(6, 4), classes_of(6, 3)
    with pytest.warns(UserWarning, match="no layer rule covers"):
        found = hf.per_sample_grad_norms(model, LOSS, (x, y))
    exact = hf.per_sample_grad_norms(model.double(), LOSS, (x.double(), y))
    assert everywhere and error(found, exact)[0] < 2e-5


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_functions_are_torch_s_in_float64(create_graph):
    torch.manual_seed(0)
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (5, 4), (5,)))
    image, kernel, shift = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6, 5), (4, 3, 3, 2), (4,))
    )
    how = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1)}
    check = torch.autograd.gradgradcheck if create_graph else torch.autograd.gradcheck
    assert check(lambda *args: sp._Linear.apply(*(a.view_as(a) for a in args), True), (x, w, b))
    assert check(lambda *args: sp._Convolution.apply(*(a.view_as(a) for a in args), how, True), (image, kernel, shift))
    assert torch.allclose(
        sp._Convolution.apply(image, kernel, shift, how, False), F.conv2d(image, kernel, shift, (2, 1), 1)
    )


@pytest.mark.parametrize("arguments", [{"padding": 7}, {"padding": "same"}, {"stride": 0}, {"padding": (1, 2, 3)}])
def test_bad_arguments_are_torch_s_to_name(arguments):
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 2, 3, 3, requires_grad=True)

    def message(convolution):
        with pytest.raises(RuntimeError) as caught:
            convolution(x, w, **arguments)
        return str(caught.value)

    assert message(functools.partial(sp._REPLACED[F.conv2d], True)) == message(F.conv2d)
