"""Scales, shifts, biases and tables: norms and squares from one pass, and as without it, over hypothesis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from site_truths import assert_statistics
from torch import nn

import hvpfast as hf
from hvpfast import ops
from hvpfast.capture import sites
from hvpfast.capture.layers import rule_of
from hvpfast.capture.sites import SummedSite, site_of


@st.composite
def norm_layers(draw):
    """A norm layer in eval mode with random parameters, and an input."""
    n, extents = draw(st.integers(1, 3)), draw(st.lists(st.integers(1, 4), max_size=3))
    groups, per, bias = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    kind, eps = draw(st.sampled_from(["layer", "rms", "group", "batch"])), draw(st.sampled_from([1e-5, 0.1]))
    features = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    if kind == "layer":
        module, shape = nn.LayerNorm(features, eps=eps, bias=bias), (n, *extents, *features)
    elif kind == "rms":
        module, shape = nn.RMSNorm(features, eps=draw(st.sampled_from([None, eps]))), (n, *extents, *features)
    elif kind == "group":
        per = max(per, 2)  # torch refuses a group of one value
        module, shape = nn.GroupNorm(groups, groups * per, eps=eps), (n, groups * per, *extents)
    else:
        axes = max(1, len(extents))
        module = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1](per, eps=eps)
        shape = (n, per, *(extents or [3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for p in module.parameters():
        p.data.normal_(generator=generator)
    if kind == "batch":
        module.running_mean.normal_(generator=generator)
        module.running_var.uniform_(0.5, 2, generator=generator)
    return module.eval(), torch.randn(*shape, generator=generator)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(norm_layers())
def test_norm_layers(case):
    torch.manual_seed(0)
    assert_statistics(*case)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.sampled_from([None, 0, 2]), st.integers(0, 9))
def test_tables(n, positions, width, padding, seed):
    torch.manual_seed(seed)
    assert_statistics(nn.Embedding(3, width, padding_idx=padding), torch.randint(0, 3, (n, positions)))


def test_a_norm_layer_is_passed_over_once(monkeypatch):
    """Scale and shift, norms and squares: one call of the op; none after the rows have been made."""
    torch.manual_seed(0)
    module, x, g = nn.LayerNorm(4), torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    calls, plain = [], ops.norm_sample_stats
    monkeypatch.setattr(sites.ops, "norm_sample_stats", lambda *args, **how: calls.append(how) or plain(*args, **how))
    use = [(rule_of(module)(module, x), g)]
    scale, shift = site_of((4,), use, [], 3), site_of((4,), [], use, 3)
    assert isinstance(scale, SummedSite) and isinstance(shift, SummedSite)
    first = scale.norms_squared().mul_(0)  # the caller's own
    assert torch.equal(first, torch.zeros(3)) and scale.norms_squared().min() > 0
    shift.second_moment(), shift.norms_squared(), scale.second_moment()
    assert calls == [{"kind": "layer", "eps": module.eps}]
    rows = shift.sample_grads()
    torch.testing.assert_close(rows, g.sum(1))
    torch.testing.assert_close(shift.norms_squared(), rows.square().sum(1))
    assert len(calls) == 1
    alone = site_of((4,), [], [(rule_of(module)(module, x), g)], 3)
    torch.testing.assert_close(alone.second_moment(), rows.square().sum(0))
    assert len(calls) == 1


def test_autocast_gives_an_input_and_a_gradient_of_two_dtypes():
    torch.manual_seed(0)
    module, x, g = nn.LayerNorm(4), torch.randn(3, 5, 4).bfloat16(), torch.randn(3, 5, 4)
    got = site_of((4,), [(rule_of(module)(module, x), g)], [], 3).norms_squared()
    want = site_of((4,), [(rule_of(module)(module, x.double()), g.double())], [], 3).norms_squared()
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """Token and position tables, norms of three kinds, one of them called twice, a table tied to the head."""

    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(7, 4, padding_idx=0), nn.Embedding(5, 4)
        self.norm, self.rms, self.group = nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4)
        self.conv, self.head = nn.Conv1d(4, 4, 3, padding=1, groups=2), nn.Linear(4, 7)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.norm(self.table(tokens) + self.places(torch.arange(5)))
        x = self.norm(torch.tanh(self.rms(x)))
        return self.head(self.group(self.conv(x.mT)).mT).mT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_of_them(dtype):
    torch.manual_seed(0)
    model = Twice().to(dtype)
    tokens, target = torch.randint(0, 7, (6, 5)), torch.randint(0, 7, (6, 5))
    batch = (tokens, target)
    grads = hf.per_sample_grads(model, nn.CrossEntropyLoss(), batch)
    bound = 1e-12 if dtype is torch.float64 else 1e-5
    for name, p in model.named_parameters():
        for n in range(6):
            loss = nn.CrossEntropyLoss()(model(tokens[n : n + 1]), target[n : n + 1])
            (truth,) = torch.autograd.grad(loss, p)
            assert (grads[name][n] - truth).abs().max() < bound, name
    moments = hf.grad_second_moment(model, nn.CrossEntropyLoss(), batch)
    norms = hf.per_sample_grad_norms(model, nn.CrossEntropyLoss(), batch)
    for name, grad in grads.items():
        assert (moments[name] - grad.square().sum(0)).abs().max() < bound, name
    assert (norms - sum(grad.flatten(1).square().sum(1) for grad in grads.values()).sqrt()).abs().max() < bound
