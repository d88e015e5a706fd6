"""Over many steps: intervals, schedules, states, bad input, and that nothing happens where nothing should."""

import io

import pytest
import torch
import torch.nn.functional as F
from runs import batch, net, sgd, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hvpfast as hf
from hvpfast.optim import EKFACPreconditioner, KFACPreconditioner, inverses, layers

KINDS = [KFACPreconditioner, EKFACPreconditioner]


# Intervals and schedules -----------------------------------------------------------------------------------------------


def routes(monkeypatch):
    """What was updated at which step: 'f' a factor's average, 'i' inverses."""
    seen = []
    add, invert = layers.Running.add, inverses.invert

    def adding(*arguments):
        seen.append("f")
        return add(*arguments)

    def inverting(*arguments):
        seen.append("i")
        return invert(*arguments)

    monkeypatch.setattr(layers.Running, "add", adding)
    monkeypatch.setattr(hf.optim.kfac, "invert", inverting)
    return seen


@pytest.mark.parametrize("given", [(2, 4), (lambda step: 2, lambda step: 4)])
def test_intervals(monkeypatch, given):
    seen, model = routes(monkeypatch), net()
    preconditioner = KFACPreconditioner(model, factor_update_steps=given[0], inv_update_steps=given[1])
    optimizer, history = sgd(model), []
    for step in range(9):
        seen.clear()
        train(model, preconditioner, optimizer, [step])
        history.append("".join(sorted(set(seen))))
    assert history == ["fi", "", "f", "", "fi", "", "f", "", "fi"]
    assert preconditioner.steps == 9


def test_schedules_are_those_of_the_step():
    """A schedule gives what the numbers give; damping changes take effect at once with the eigenbases."""
    results = []
    for scheduled in (True, False):
        model = net()
        optimizer, values = (
            sgd(model),
            {"damping": [0.1, 0.03], "factor_decay": [0.9, 0.5], "lr": [0.1, 0.4], "kl_clip": [1e-3, None]},
        )
        if scheduled:
            options = {name: lambda step, pair=pair: pair[step > 2] for name, pair in values.items()}
            preconditioner = KFACPreconditioner(model, inv_update_steps=2, **options)
            train(model, preconditioner, optimizer, range(6))
        else:
            preconditioner = KFACPreconditioner(model, inv_update_steps=2, **{k: v[0] for k, v in values.items()})
            train(model, preconditioner, optimizer, range(3))
            preconditioner._schedules.update({k: v[1] for k, v in values.items()})
            train(model, preconditioner, optimizer, range(3, 6))
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class NoScalars(TorchDispatchMode):
    """Raises where a tensor's value is asked for: a wait for the device, if it were one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["eigen", "inverse"])
def test_steps_between_updates_ask_for_no_value(method):
    model = net()
    preconditioner = KFACPreconditioner(model, inv_update_steps=3, factor_update_steps=3, compute_method=method)
    optimizer = sgd(model)
    train(model, preconditioner, optimizer, [0])
    x, y = batch(1)
    before = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    F.cross_entropy(model(x), y).backward()
    assert {name: len(m._forward_hooks) for name, m in model.named_modules()} == before
    assert sum(before.values()) == 1  # the root's own
    plain = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(AssertionError), NoScalars():
        float(plain[0].sum())
    with NoScalars():
        preconditioner.step()
    assert all(not torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_skipped_layers_keep_their_gradients():
    for patterns, kept in ((["^0$"], {"0"}), (["Conv", "Norm"], {"0", "2"}), (["linear", "Linear"], {"5"})):
        model = net()
        preconditioner = KFACPreconditioner(model, skip_layers=patterns)
        F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters()}
        preconditioner.step()
        same = {name.split(".")[0] for name, p in model.named_parameters() if torch.equal(p.grad, plain[name])}
        assert same == kept
    with pytest.raises(ValueError, match="no parameter is left"):
        KFACPreconditioner(net(), skip_layers=["."])


# States ----------------------------------------------------------------------------------------------------------------


OPTIONS = [
    {"factor_update_steps": 2, "inv_update_steps": 4},
    {
        "factor_update_steps": 2,
        "inv_update_steps": 3,
        "compute_method": "inverse",
        "damping": lambda step: 0.1 / (step + 1),
    },
    {"factor_update_steps": 2, "fisher_type": "mc", "loss_fn": nn.CrossEntropyLoss(), "inv_dtype": torch.float64},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["eigen", "inverse", "mc"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_bit_by_bit(kind, options):
    if kind is not KFACPreconditioner:
        options = {name: x for name, x in options.items() if name != "compute_method"}
    model = net()
    preconditioner, optimizer = kind(model, **options), sgd(model)
    train(model, preconditioner, optimizer, range(5))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), preconditioner.state_dict()], file)
    train(model, preconditioner, optimizer, range(5, 10))
    again = net(seed=1)
    second, optimizer = kind(again, **options), sgd(again)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    for one, state in zip((again, optimizer, second), states, strict=True):
        one.load_state_dict(state)
    assert second.steps == 5
    train(again, second, optimizer, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_state_without_layers_begins_anew():
    model = net()
    preconditioner = KFACPreconditioner(model, factor_update_steps=10, inv_update_steps=10)
    train(model, preconditioner, sgd(model), range(3))
    state = preconditioner.state_dict(include_factors=False)
    assert "layers" not in state
    second = KFACPreconditioner(model)
    preconditioner.close()
    second.load_state_dict(state)
    assert (second.steps, second.factor_update_steps) == (3, 10)
    train(model, second, sgd(model), [3])  # no turn of its own, but there are no factors yet
    assert second.memory_usage()["a_inverses"] > 0


def test_a_state_without_inverses_makes_them():
    model = net()
    preconditioner = KFACPreconditioner(model, factor_update_steps=4, inv_update_steps=4)
    train(model, preconditioner, sgd(model), range(1))
    second = KFACPreconditioner(model, factor_update_steps=4, inv_update_steps=4)
    second.load_state_dict(preconditioner.state_dict(), compute_inverses=False)
    assert second.memory_usage()["a_inverses"] == 0
    results = []
    for one in (preconditioner, second):
        model.zero_grad()
        F.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
        one.step()
        results.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_states_of_others_are_refused():
    model = net()
    preconditioner = KFACPreconditioner(model)
    train(model, preconditioner, sgd(model), range(1))
    state = preconditioner.state_dict()
    torch.manual_seed(0)
    other = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    with pytest.raises(ValueError, match=r"missing here: 2.bias.*not in the state: 3.bias.*of another shape: 0.bias"):
        KFACPreconditioner(other).load_state_dict(state)
    with pytest.raises(ValueError, match="this is no state"):
        preconditioner.load_state_dict({"steps": 3})
    with pytest.raises(ValueError, match="of a Other, not of a KFACPreconditioner"):
        preconditioner.load_state_dict({**state, "kind": "Other"})
    assert preconditioner.steps == 1


def test_memory_usage_counts_what_is_held():
    model = net()
    preconditioner = KFACPreconditioner(model, factor_update_steps=5, inv_update_steps=5, tolerance=0.0)
    assert preconditioner.memory_usage()["total"] == 0
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    inputs, outputs = 10 * 10 + 65 * 65, 4 * 4 + 3 * 3
    sizes = preconditioner.memory_usage()
    assert (sizes["a_batch"], sizes["g_batch"]) == (4 * inputs, 4 * (outputs + 8 * 8))
    preconditioner.step()
    sizes = preconditioner.memory_usage()
    assert sizes["a_batch"] == sizes["g_batch"] == 0
    assert (sizes["a_factors"], sizes["g_factors"]) == (4 * inputs, 4 * (outputs + 8 * 8))
    values = 10 + 65, 4 + 3
    spectra = 2 * (4 * 10 + 3 * 65)  # eigenvalues, and damped
    assert sizes["a_inverses"] == 4 * (inputs + values[0])
    assert sizes["g_inverses"] == 4 * (outputs + values[1] + spectra + 8 * 8)
    assert sizes["total"] == sum(size for name, size in sizes.items() if name != "total")
