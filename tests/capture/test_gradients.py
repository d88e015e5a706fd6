"""Per-sample gradients as memory: the caller's own, no one else's, and finite."""

import pytest
import torch
from torch import nn
from truths import relative
from zoo import make

import hvpfast as hf


def test_gradients_in_memory_of_the_callers():
    case = make("cnn, groups and dilation")
    loss, batch = nn.CrossEntropyLoss(), (case.inputs, torch.arange(6) % 3)
    truth = hf.per_sample_grads(case.model, loss, batch)
    room = {name: torch.full_like(g, torch.nan) for name, g in truth.items()}
    hf.per_sample_grads(case.model, loss, batch, out=room, chunk_size=4)
    assert all(relative(room[name], g) < 1e-12 for name, g in truth.items())
    with hf.record(case.model) as tape:
        loss(case.model(case.inputs), batch[1]).backward()
    for _ in range(2):  # what a tape holds is neither scaled nor given away
        hf.per_sample_grads(tape, reduction="mean", out=room)
        assert all(relative(room[name], g) < 1e-12 for name, g in truth.items())
        for g in hf.per_sample_grads(tape, reduction="mean").values():
            g.zero_()
    (name, *_), whole = truth, {name: g.clone() for name, g in truth.items()}
    for_one_less, for_twice = whole[name][:-1], torch.cat([whole[name]] * 2)
    for bad in (for_one_less, for_twice, whole[name].float(), whole[name].unsqueeze(1)):
        with pytest.raises(ValueError, match=rf"per_sample_grads: out\['{name}'\]"):
            hf.per_sample_grads(case.model, loss, batch, out={**whole, name: bad})
    with pytest.raises(ValueError, match="out has no '[0-9.a-z]*'; it must"):
        hf.per_sample_grads(case.model, loss, batch, out={})


def test_biases_of_one_gradient_are_no_one_memory():
    """Two layers add up to one output, so their biases have the same gradient."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            return self.left(x) + self.right(x)

    torch.manual_seed(0)
    grads = hf.per_sample_grads(Sum(), nn.CrossEntropyLoss(), (torch.randn(5, 3), torch.arange(5) % 4))
    assert torch.equal(grads["left.bias"], grads["right.bias"])
    grads["left.bias"].zero_()
    assert grads["right.bias"].abs().max() > 0


def test_an_overflow_in_the_gradients_is_named():
    model = nn.Linear(40, 30, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.full((4, 40), 1e30)

    def loss(output, target):
        return (output * 1e30 + 1).sum(1).mean()

    with pytest.raises(hf.NonFiniteError, match="'weight'"):
        hf.per_sample_grads(model, loss, (x, torch.zeros(4)))
