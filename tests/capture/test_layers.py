"""Every rule's `a` and `g` reproduce the layer's own weight gradient, sample by sample; convolutions over hypothesis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hvpfast.capture.layers import RULES, layer, rule_of


def check(module, x):
    """g_m' a_m against autograd, for every sample on its own, with two gradient rows a sample (M = 2 N)."""
    module, x = module.double(), x.double()
    normal = rule_of(module)(module, x)
    output = module(x)
    g = torch.randn(2 * x.shape[0], *output.shape[1:], dtype=torch.float64)
    a, rows = normal.inputs(), normal.grads(g)
    n, m = x.shape[0], g.shape[0]
    assert a.shape[:2] == (rows.shape[0], n) and rows.shape[1] == m and a.shape[2] == rows.shape[2]
    for row in range(m):
        one = module(x[row % n : row % n + 1])
        (truth,) = torch.autograd.grad(one, [module.weight], g[row : row + 1])
        got = torch.einsum("gto,gti->goi", rows[:, row], a[:, row % n]).reshape(truth.shape)
        assert float((got - truth).abs().max()) <= 1e-12 * (1 + float(truth.abs().max()))


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (3, 2, 1, 5, 4), (1, 4)])
def test_linear(shape):
    torch.manual_seed(0)
    check(nn.Linear(4, 3), torch.randn(*shape))


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]))
    per = [
        {
            "kernel_size": draw(st.integers(1, 4)),
            "stride": draw(st.integers(1, 3)),
            "dilation": draw(st.integers(1, 3)),
            "padding": draw(st.integers(0, 2)),
        }
        for _ in range(dims)
    ]
    options = {name: tuple(each[name] for each in per) for name in per[0]}
    if draw(st.booleans()) and all(s == 1 for s in options["stride"]):
        options["padding"] = draw(st.sampled_from(["same", "valid"]))
    size = [draw(st.integers(0, 3)) + max(3, 1 + (e["kernel_size"] - 1) * e["dilation"]) for e in per]
    if mode == "reflect" or mode == "circular":  # torch pads by less than the image
        reach = [(e["kernel_size"] - 1) * e["dilation"] for e in per]
        size = [max(s, r + 2, 4) for s, r in zip(size, reach, strict=True)]
    channels = groups * draw(st.integers(1, 2))
    outputs = groups * draw(st.integers(1, 2))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    bias = draw(st.booleans())
    return (
        kind(channels, outputs, groups=groups, padding_mode=mode, bias=bias, **options),
        torch.randn(2, channels, *size),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(convolutions())
def test_convolutions(case):
    torch.manual_seed(0)
    check(*case)


def test_strided_and_channels_last_inputs():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, 8)
    conv = nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2)
    check(conv, x.contiguous(memory_format=torch.channels_last))
    check(conv, torch.randn(2, 6, 8, 16)[..., ::2])


def test_a_new_layer_is_one_function():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 3

    module = Scaled(4, 3)
    assert rule_of(module) is None  # a subclass may compute something else
    try:
        layer(Scaled)(lambda m, x: RULES[nn.Linear](m, x * 3))
        check(module, torch.randn(3, 4))
    finally:
        RULES.pop(Scaled)
