"""Every rule's `a` and `g` reproduce the layer's own weight gradient, sample by sample; convolutions over hypothesis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from site_truths import assert_statistics
from torch import nn

from hvpfast.capture.layers import RULES, layer, rule_of
from hvpfast.capture.sites import PatchSite


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (3, 2, 1, 5, 4), (1, 4)])
def test_linear(shape):
    torch.manual_seed(0)
    assert_statistics(nn.Linear(4, 3), torch.randn(*shape))


class Conv1D(nn.Module):
    """As in GPT-2: a linear map whose weight is stored (in, out). Known to hvpfast by the name it has in transformers."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (3, 2, 2, 4)])
def test_hugging_face_conv1d(shape, monkeypatch):
    torch.manual_seed(0)
    assert rule_of(Conv1D(3, 4)) is None
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    assert_statistics(Conv1D(3, 4), torch.randn(*shape))


def norm(kind, x, *args, **options):
    module = kind(*args, **options).eval()
    for p in module.parameters():
        nn.init.normal_(p)
    if getattr(module, "running_mean", None) is not None:
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    return module, x


@pytest.mark.parametrize(
    "build",
    [
        lambda: norm(nn.LayerNorm, torch.randn(3, 5, 4), 4),
        lambda: norm(nn.LayerNorm, torch.randn(3, 2, 4, 3), (4, 3), bias=False),
        lambda: norm(nn.LayerNorm, torch.randn(3, 4), 4, eps=1e-3),
        lambda: norm(nn.RMSNorm, torch.randn(3, 5, 4), 4),
        lambda: norm(nn.GroupNorm, torch.randn(3, 6, 4, 2), 3, 6),
        lambda: norm(nn.GroupNorm, torch.randn(3, 6), 2, 6),
        lambda: norm(nn.BatchNorm1d, torch.randn(3, 4), 4),
        lambda: norm(nn.BatchNorm1d, torch.randn(3, 4, 5), 4),
        lambda: norm(nn.BatchNorm2d, torch.randn(3, 4, 5, 2), 4),
        lambda: norm(nn.BatchNorm3d, torch.randn(3, 4, 2, 2, 2), 4),
        lambda: (nn.Embedding(5, 3), torch.tensor([[0, 1, 1, 4], [2, 2, 2, 0], [3, 0, 1, 2]])),
        lambda: (nn.Embedding(5, 3, padding_idx=2), torch.tensor([[0, 2, 1, 4], [2, 2, 2, 0], [3, 0, 1, 2]])),
        lambda: (nn.Embedding(5, 3), torch.tensor([4, 0, 4])),
    ],
)
def test_norms_and_lookups(build):
    torch.manual_seed(0)
    assert_statistics(*build())


@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [
        (nn.ConvTranspose1d, (5,), {"kernel_size": 3}),
        (nn.ConvTranspose1d, (4,), {"kernel_size": 4, "stride": 3, "padding": 2, "output_padding": 2, "dilation": 2}),
        (nn.ConvTranspose2d, (3, 4), {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 1), "groups": 2}),
        (nn.ConvTranspose2d, (3, 3), {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 4}),
        (nn.ConvTranspose3d, (2, 3, 2), {"kernel_size": 2, "stride": 2, "bias": False}),
    ],
)
def test_transposed_convolutions(kind, size, options):
    torch.manual_seed(0)
    assert_statistics(kind(4, 8, **options), torch.randn(3, 4, *size))


def test_embeddings_that_change_their_gradient_have_no_rule():
    x = torch.tensor([[0, 1]])
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        module = nn.Embedding(3, 2, **options)
        assert rule_of(module)(module, x) is None


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
@given(convolutions(), st.sampled_from([1, 1 << 20]))
def test_convolutions(case, chunk):
    """Patches of one sample at a time, and of all."""
    torch.manual_seed(0)
    before, PatchSite.CHUNK = PatchSite.CHUNK, chunk
    try:
        assert_statistics(*case)
    finally:
        PatchSite.CHUNK = before


def test_strided_and_channels_last_inputs():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, 8)
    conv = nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2)
    assert_statistics(conv, x.contiguous(memory_format=torch.channels_last))
    assert_statistics(conv, torch.randn(2, 6, 8, 16)[..., ::2])


def test_a_new_layer_is_one_function():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x * 3)

    module = Scaled(4, 3)
    assert rule_of(module) is None  # a subclass may compute something else
    try:
        layer(Scaled)(lambda m, x: RULES[nn.Linear](m, x * 3))
        assert_statistics(module, torch.randn(3, 4))
    finally:
        RULES.pop(Scaled)
