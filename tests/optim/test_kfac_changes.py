"""A model that changes while it trains: parameters frozen, thawed, of another dtype, the model saved; exact, or said."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from truths import relative

from hvpfast.capture.errors import StateError
from hvpfast.optim import KFACPreconditioner


def flat_grads(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def backward(model, x, y):
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()


def pair(options=None):
    """Two copies of a small float64 network, a preconditioner of each, and data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    models = model, copy.deepcopy(model)
    options = {"kl_clip": None, "damping": 0.1, **(options or {})}
    return (
        *models,
        *(KFACPreconditioner(m, **options) for m in models),
        torch.randn(11, 5).double(),
        torch.arange(11) % 3,
    )


def test_a_layer_that_is_frozen_midway_leaves_the_others_as_they_would_be():
    model, other, preconditioner, reference, x, y = pair()
    for number in range(3):
        for one, its in ((model, preconditioner), (other, reference)):
            backward(one, x, y)
            its.step()
        if number == 0:
            model[0].requires_grad_(False)
    last = flat_grads(other[2])
    assert model[0].weight.grad is None and torch.equal(flat_grads(model[2]), last)


def test_a_part_of_a_layer_that_is_frozen_or_thawed_midway_is_said():
    model, other, preconditioner, _, x, y = pair({"factor_update_steps": 2})
    backward(model, x, y)
    preconditioner.step()
    model[0].weight.requires_grad_(False)
    backward(model, x, y)
    plain = model[0].bias.grad.clone()
    with pytest.warns(
        UserWarning, match=r"0\.bias keep their plain gradients: other parameters of their layers have none"
    ):
        preconditioner.step()
    assert torch.equal(model[0].bias.grad, plain)
    with pytest.raises(StateError, match=r"'0\.bias' were used as part of '0\.weight, 0\.bias' before"):
        backward(model, x, y)
    other[0].requires_grad_(False)
    thawed = KFACPreconditioner(other, kl_clip=None)
    backward(other, x, y)
    thawed.step()
    other[0].requires_grad_(True)
    backward(other, x, y)
    plain = flat_grads(other[0])
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias did not require grad when it was made"):
        thawed.step()
    assert torch.equal(flat_grads(other[0]), plain)


def test_a_model_that_changes_its_dtype():
    """Before the first step it is as if made so; after it, an error says how its factors go along."""
    model, other, _, reference, x, y = pair()
    single = copy.deepcopy(model).float()
    late = KFACPreconditioner(single, kl_clip=None, damping=0.1)
    single.double()
    single.load_state_dict(other.state_dict())
    for one, its in ((single, late), (other, reference)):
        backward(one, x, y)
        its.step()
    assert torch.equal(flat_grads(single), flat_grads(other))
    single.float()
    with pytest.raises(StateError, match=r"is torch.float32 on cpu, and was torch.float64 on cpu.*load_state_dict"):
        backward(single, x.float(), y)
    late.load_state_dict(late.state_dict())
    for one, its, data in ((single, late, x.float()), (other, reference, x)):
        backward(one, data, y)
        its.step()
    assert relative(flat_grads(single).double(), flat_grads(other)) < 1e-5


def test_a_model_with_hooks_can_be_saved():
    model, _, preconditioner, _, x, y = pair()
    backward(model, x, y)
    preconditioner.step()
    read = pickle.loads(pickle.dumps(model))
    assert torch.equal(read(x), model(x))
    backward(read, x, y)
    assert preconditioner.memory_usage()["a_batch"] == 0  # not of its model
