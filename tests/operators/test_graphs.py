"""Products from CUDA graphs, without a GPU: what is captured, when it is made anew, and what happens where it cannot be.

A stand-in captures: it keeps the work and does it again into the same memory.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from zoo import classes_of, make, unequal

import hvpfast as hf
from hvpfast.dispatch import BackendError
from hvpfast.operators import graphs

LOSS = nn.CrossEntropyLoss()
KINDS = {
    "Hessian": hf.Hessian,
    "GGN": hf.GGN,
    "GGN in blocks": lambda *args: hf.GGN(*args, blocks=True),
    "GGN, drawn": lambda *args: hf.GGN(*args, mc_samples=2),
    "EmpiricalFisher": hf.EmpiricalFisher,
    "EmpiricalFisher, centered": lambda *args: hf.EmpiricalFisher(*args, centered=True),
}


class StandIn:
    """Captures on a CPU: replays do the work again. `fails`: raised by the next capture. `spoils`: done to replayed results."""

    fails: Exception | None = None
    spoils = staticmethod(lambda out: out)

    def __init__(self, device):
        self.inside = False
        type(self).made.append(self)
        self.captures = self.replays = 0

    def beside(self, function, x):
        self.inside = True
        try:
            return function(x)
        finally:
            self.inside = False

    def record(self, run):
        assert self.inside
        if self.fails is not None:
            raise self.fails
        out = run()
        out.fill_(float("nan"))  # a capture computes nothing
        self.captures += 1

        def replay():
            assert self.inside
            self.replays += 1
            out.copy_(self.spoils(run()))

        return replay, out


@pytest.fixture
def stand_in(monkeypatch):
    class Mine(StandIn):
        made = []  # noqa: RUF012 (one a test)

    monkeypatch.setitem(graphs.RECORDERS, "cpu", Mine)
    return Mine


def problem(name="mlp"):
    case = make(name)
    return case.model, LOSS, unequal(case.inputs, classes_of(6, case.classes))


class Plain:
    """An operator whose products are made without graphs, wherever they are asked for."""

    def __init__(self, operator):
        self.operator, self.shape = operator, operator.shape

    def __matmul__(self, v):
        with hf.cuda_graphs("off"):
            return self.operator @ v


def vectors(operator, k, seed=0, dtype=torch.float64):
    """(P, K) whose columns lie one after another, as graphs have them: the same bits are to come out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, operator.shape[0], generator=generator, dtype=dtype).T


def captures(stand_in):
    return sum(one.captures for one in stand_in.made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "attention", "table and head tied"])
def test_products_have_the_bits_of_those_without(kind, name, stand_in):
    """Batches of several sizes, columns of several numbers: each batch once for each number, after a product that warms up."""
    arguments = problem(name)
    plain, operator = Plain(KINDS[kind](*arguments)), KINDS[kind](*arguments)
    batches = len(arguments[2])
    assert batches >= 3
    for columns, expected in ((1, 0), (1, 1), (1, 1), (3, 1), (3, 2), (1, 2), (3, 2)):
        v = vectors(operator, columns, seed=expected)
        with hf.cuda_graphs():
            got = operator @ v
        assert torch.equal(got, plain @ v)
        assert captures(stand_in) == expected * batches
    assert operator.graphs.captured == {1: batches, 3: batches} and operator.graphs.reason is None
    assert sum(one.replays for one in stand_in.made) == (2 + 3 + 1) * batches - batches
    assert "3 columns" in repr(operator.graphs)


def test_columns_in_parts(stand_in, monkeypatch):
    """Five columns, two at a time: 2 + 2 + 1."""
    monkeypatch.setattr("hvpfast.operators.curvature._MOST_COLUMNS", 2)
    plain, operator = Plain(hf.GGN(*problem())), hf.GGN(*problem())
    v, dense = vectors(operator, 5), plain.operator.to_dense(columns=3)
    with hf.cuda_graphs():
        for _ in range(3):
            assert torch.equal(operator @ v, plain @ v)
        assert torch.equal(operator.to_dense(columns=3), dense)
    assert operator.graphs.captured == {2: 3, 1: 3}


def test_every_form_of_vectors_and_dtype(stand_in):
    model, loss, data = problem()
    for parameters, given in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float32,) * 2):
        net = model.to(parameters)
        batches = [(x.to(parameters), y) for x, y in data]
        plain, operator = Plain(hf.Hessian(net, loss, batches)), hf.Hessian(net, loss, batches)
        v = vectors(operator, 2, dtype=given)
        named = {name: torch.ones(*p.shape, 2, dtype=given) for name, p in net.named_parameters()}
        with hf.cuda_graphs(), torch.inference_mode():
            got = [operator @ v for _ in range(3)][-1]
            by_name = operator @ named
            form = operator.quadratic_form(v)
        assert got.dtype == given and torch.equal(got, plain @ v)
        assert torch.equal(form, plain.operator.quadratic_form(v))
        assert all(torch.equal(x, y) for x, y in zip(by_name.values(), (plain @ named).values(), strict=True))
        assert operator.graphs.captured == {2: 3}


def test_parameters_without_curvature(stand_in):
    """A batch whose share is zero for some parameters, and for all."""
    x = torch.randn(5, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for loss in (lambda f, t: (f * t).mean(), lambda f, t: f[:, :1].square().mean()):
        batches = [(x, torch.ones(5, 2, dtype=torch.float64)), (x[:2], torch.ones(2, 2, dtype=torch.float64))]
        plain, operator = Plain(hf.Hessian(model, loss, batches)), hf.Hessian(model, loss, batches)
        v = vectors(operator, 1)[:, 0]
        with hf.cuda_graphs():
            assert all(torch.equal(operator @ v, plain @ v) for _ in range(3))
        assert operator.graphs.captured == {1: 2}
    flat = nn.Linear(3, 2).double()
    operator = hf.Hessian(flat, lambda f, t: f.mean(), (x, x[:, :2]))
    with hf.cuda_graphs():
        assert all(torch.equal(operator @ vectors(operator, 2), torch.zeros(8, 2).double()) for _ in range(3))


def test_changes_are_seen_and_all_is_captured_anew(stand_in):
    case = make("batchnorm in eval")
    data = unequal(case.inputs, classes_of(6, 3))
    model = case.model
    operator = hf.Hessian(model, LOSS, data)
    v = vectors(operator, 1)[:, 0]
    before = captures(stand_in)
    seen = []

    def changed():
        nonlocal before
        fresh = hf.Hessian(model, LOSS, data) @ v
        assert not any(torch.equal(fresh, old) for old in seen)
        seen.append(fresh)
        with hf.cuda_graphs():
            assert torch.equal(operator @ v, fresh)
            assert operator.graphs.captured == {}
            assert torch.equal(operator @ v, fresh) and torch.equal(operator @ v, fresh)
        assert captures(stand_in) == before + len(data) and operator.graphs.captured == {1: len(data)}
        before = captures(stand_in)

    changed()
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    changed()
    model[3].bias.data[1] += 1
    changed()
    model[0].weight.data = model[0].weight.data * 0.9
    changed()
    model[1].running_mean.add_(0.3)
    changed()
    case.inputs.mul_(0.7)
    changed()
    model.train()
    changed()


def test_linearisations_belong_to_one_side_of_the_switch(stand_in):
    """What is captured must have been linearised on the capture's stream, so nothing kept from outside will do."""
    model, loss, data = problem()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(bool(stand_in.made and stand_in.made[-1].inside)))
    operator = hf.GGN(model, loss, data)
    v = vectors(operator, 1)
    expected = operator @ v
    assert calls == [False] * len(data)
    with hf.cuda_graphs():
        for _ in range(3):
            assert torch.equal(operator @ v, expected)
    assert calls == [False] * len(data) + [True] * len(data)
    with hf.cuda_graphs("off"):
        assert torch.equal(operator @ v, expected) and operator.graphs.captured == {}
    assert calls == [False] * len(data) + [True] * len(data) + [False] * len(data)
    assert not stand_in.made[-1].inside


def test_settings_that_choose_kernels_have_graphs_of_their_own(stand_in):
    operator = hf.GGN(*problem())
    v = vectors(operator, 1)
    with hf.cuda_graphs():
        for _ in range(2):
            operator @ v
        for mode in (hf.backend("reference"), hf.precision("ieee")):
            with mode:
                before = captures(stand_in)
                operator @ v
                assert captures(stand_in) == before
                operator @ v
                assert captures(stand_in) == before + 3
    assert operator.graphs.captured == {1: 9}


# what cannot be captured ----------------------------------------------------------------------------------------------


def test_a_failed_capture_is_said_once_and_products_go_on(stand_in):
    arguments = problem()
    plain, operator = Plain(hf.Hessian(*arguments)), hf.Hessian(*arguments)
    v = vectors(operator, 2)
    stand_in.fails = RuntimeError("operation not permitted when stream is capturing")
    with hf.cuda_graphs(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            assert torch.equal(operator @ v, plain @ v)
        with torch.no_grad():
            arguments[0][0].weight.mul_(1.1)
        for _ in range(2):
            assert torch.equal(operator @ v, plain @ v)
    assert [str(one.message) for one in said] == [
        "Hessian: products are not captured as CUDA graphs: RuntimeError: operation not permitted when stream is capturing"
    ]
    assert said[0].filename == __file__
    assert operator.graphs.reason.startswith("RuntimeError: operation not permitted") and captures(stand_in) == 0
    stand_in.fails = None
    operator.release()
    assert operator.graphs.reason is None
    with hf.cuda_graphs():
        assert all(torch.equal(operator @ v, plain @ v) for _ in range(2))
    assert operator.graphs.captured == {2: 3}


def test_captured_batches_stay_where_a_later_one_fails(stand_in):
    plain, operator = Plain(hf.GGN(*problem())), hf.GGN(*problem())
    v = vectors(operator, 1)
    record, count = stand_in.record, []

    def third_fails(self, run):
        count.append(1)
        if len(count) == 3:
            raise ValueError("no")
        return record(self, run)

    stand_in.record = third_fails
    with hf.cuda_graphs(), pytest.warns(RuntimeWarning, match="ValueError: no"):
        assert all(torch.equal(operator @ v, plain @ v) for _ in range(4))
    assert operator.graphs.captured == {1: 2} and len(count) == 3


@pytest.mark.parametrize("wrong", ["one entry", "stale", "nan"])
def test_a_wrong_replay_is_noticed(wrong, stand_in):
    plain, operator = Plain(hf.Hessian(*problem())), hf.Hessian(*problem())
    v = vectors(operator, 1)

    def one_entry(out):
        out[0, 22] += 1e-3 * out.norm()
        return out

    stand_in.spoils = staticmethod(
        {"one entry": one_entry, "stale": torch.zeros_like, "nan": lambda out: out.fill_(float("nan"))}[wrong]
    )
    name = "0.bias" if wrong == "one entry" else "0.weight"
    with hf.cuda_graphs(), pytest.warns(RuntimeWarning, match=f"the first replay is off by .* at '{name}'"):
        assert all(torch.equal(operator @ v, plain @ v) for _ in range(3))
    assert operator.graphs.captured == {}


def test_a_replay_may_differ_by_rounding(stand_in):
    operator = hf.Hessian(*problem())
    stand_in.spoils = staticmethod(lambda out: out * (1 + 1e-12))
    v = vectors(operator, 1)
    with hf.cuda_graphs():
        first = operator @ v
        assert torch.equal(operator @ v, first)  # the one that is compared is the one that is given
        assert not torch.equal(operator @ v, first)
    assert operator.graphs.reason is None


def test_required_means_required(stand_in):
    plain, operator = Plain(hf.Hessian(*problem())), hf.Hessian(*problem())
    v = vectors(operator, 1)
    with hf.cuda_graphs("required"):
        assert all(torch.equal(operator @ v, plain @ v) for _ in range(3))
        stand_in.fails = RuntimeError("unsupported")
        operator.release()
        operator @ v
        for _ in range(2):
            with pytest.raises(
                BackendError, match="Hessian: CUDA graphs are required and cannot be had: RuntimeError: unsupp"
            ):
                operator @ v
    assert torch.equal(operator @ v, plain @ v)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_nothing_changes_unless_it_is_required(kind):
    arguments = problem()
    operator = KINDS[kind](*arguments)
    v = vectors(operator, 2)
    expected = operator @ v
    with hf.cuda_graphs(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(torch.equal(operator @ v, expected) for _ in range(2))
        assert operator.graphs.captured == {} and operator.graphs.reason is None and operator.graphs.bytes == 0
    with hf.cuda_graphs("required"), pytest.raises(BackendError, match="the parameters are on cpu"):
        operator @ v


def test_memory_is_counted_and_bounded(stand_in, monkeypatch):
    """Vectors once, results once a batch; beyond what the linearisations leave nothing is captured."""
    arguments = problem()
    operator, plain = hf.GGN(*arguments), Plain(hf.GGN(*arguments))
    p, batches = operator.shape[0], len(arguments[2])
    with hf.cuda_graphs():
        for k in (1, 3, 3, 1):
            operator @ vectors(operator, k)
    assert operator.graphs.bytes == 8 * p * (1 + 3) * (batches + 1)
    left = operator.graphs.room
    kept = (2 << 30) - left
    assert kept > 0
    operator.release()
    assert operator.graphs.bytes == 0 and operator.graphs.captured == {}
    monkeypatch.setattr("hvpfast.operators.curvature.CACHE_BYTES", kept + 8 * p * (batches + 1))
    with hf.cuda_graphs(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert torch.equal(operator @ vectors(operator, 1), plain @ vectors(operator, 1))
        assert operator.graphs.captured == {1: batches} and operator.graphs.bytes == operator.graphs.room
        operator @ vectors(operator, 2)
        with pytest.warns(
            RuntimeWarning, match="2 columns do not fit beside the linearisations in HVPFAST_CACHE_BYTES"
        ):
            warnings.simplefilter("always")
            assert torch.equal(operator @ vectors(operator, 2), plain @ vectors(operator, 2))


def test_linearisations_that_are_not_kept(stand_in, monkeypatch):
    monkeypatch.setattr("hvpfast.operators.curvature.CACHE_BYTES", 1)
    monkeypatch.setattr("hvpfast.operators.curvature._MOST_COLUMNS", 1)
    plain, operator = Plain(hf.Hessian(*problem())), hf.Hessian(*problem())
    v = vectors(operator, 3)
    with hf.cuda_graphs(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert all(torch.equal(operator @ v, plain @ v) for _ in range(3))
    assert len(said) == 1 and "linearisations, which would be kept, do not fit" in str(said[0].message)
    assert captures(stand_in) == 0
    with hf.cuda_graphs("required"), pytest.raises(BackendError, match="do not fit in HVPFAST_CACHE_BYTES"):
        operator @ v


def test_errors_are_those_of_products_without(stand_in):
    """A product that overflows names batch and parameter, captured or while it is captured; one that failed leaves no graph."""
    operator = hf.Hessian(*problem())
    v = vectors(operator, 1)
    huge = torch.full_like(v, 1e308)
    with hf.cuda_graphs():
        for _ in range(4):
            with pytest.raises(hf.NonFiniteError, match="batch 0: the product has NaN or inf at parameter"):
                operator @ huge
            operator @ v
        assert operator.graphs.captured == {1: 3} and operator.graphs.reason is None
        with pytest.raises(ValueError, match="the vector holds NaN"):
            operator @ (v * float("nan"))
