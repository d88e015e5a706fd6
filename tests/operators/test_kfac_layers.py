"""K-FAC of one sample, and of a table tied to the head, is the exact block; factors of convolutions by pixel, float64."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from truths import relative, take
from zoo import LOSSES, make, unequal

import hvpfast as hf
from hvpfast.capture import kronecker
from hvpfast.capture.layers import rule_of

TOLERANCE = 1e-10


pytestmark = pytest.mark.usefixtures("float64")


# One sample (E3, E6, E13) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_name", sorted(LOSSES))
@pytest.mark.parametrize("name", ["mlp", "relu", "recurrent", "keywords", "frozen first layer"])
def test_one_sample_is_the_block(name, loss_name):
    case = make(name)
    build, targets = LOSSES[loss_name]
    loss, target = build(case.classes), targets(6, case.classes)[:1]
    inputs = take(case.inputs, slice(0, 1))
    ggn = hf.GGN(case.model, loss, (inputs, target), blocks=True).to_dense()
    empirical = hf.EmpiricalFisher(case.model, loss, (inputs, target), blocks=True).to_dense()
    for kind in (hf.KFAC, hf.EKFAC):
        mine = kind(case.model, loss, (inputs, target), fisher_type="type-2").to_dense()
        assert relative(mine, ggn) < TOLERANCE
        mine = kind(case.model, loss, (inputs, target), fisher_type="empirical").to_dense()
        assert relative(mine, empirical) < TOLERANCE


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_sample_and_one_output_pixel(axes, transposed, groups):
    """A convolution whose output is one pixel is a linear map, in a network that is not linear."""
    if transposed:
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
        first = kind(4, 6, 3, stride=2, padding=2, output_padding=0, groups=groups)  # 2 pixels -> 1
        x = torch.randn(1, 4, *[2] * axes)
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        first = kind(4, 6, 3, padding=1, dilation=2, groups=groups)
        x = torch.randn(1, 4, *[3] * axes)
    model = nn.Sequential(first, nn.Flatten(), nn.Tanh(), nn.Linear(6, 3))
    assert first(x).shape[2:].numel() == 1
    y = torch.tensor([1])
    truth = hf.GGN(model, F.cross_entropy, (x, y), blocks=True).to_dense()
    truth = _without_cross_groups(model, truth, groups)
    for approx, kind in itertools.product(("expand", "reduce"), (hf.KFAC, hf.EKFAC)):
        mine = kind(model, F.cross_entropy, (x, y), fisher_type="type-2", kfac_approx=approx).to_dense()
        assert relative(mine, truth) < TOLERANCE


def _without_cross_groups(model, truth, groups):
    """Of a grouped first layer's block, keep what lies within a group."""
    first = next(iter(model.children()))
    owner = torch.zeros(truth.shape[0])
    w, b = first.weight, first.bias
    if isinstance(first, nn.modules.conv._ConvTransposeNd):
        of = torch.arange(w.shape[0]) // (w.shape[0] // groups)
    else:
        of = torch.arange(w.shape[0]) // (w.shape[0] // groups)
    owner[: w.numel()] = of.repeat_interleave(w[0].numel()).double()
    owner[w.numel() : w.numel() + b.numel()] = (torch.arange(b.numel()) // (b.numel() // groups)).double()
    keep = owner[:, None] == owner[None, :]
    keep[w.numel() + b.numel() :] = True
    return truth * keep


# Groups, dilation, padding modes: every factor against patches (E14, E18) -----------------------------------------------


@pytest.mark.parametrize(
    "conv, size",
    [
        (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (7, 6)),
        (lambda: nn.Conv2d(4, 4, (2, 3), padding="same", groups=4), (5, 6)),
        (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (5, 4)),
        (lambda: nn.Conv1d(2, 4, 3, padding="same", padding_mode="circular"), (6,)),
        (lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), bias=False), (3, 4, 3)),
        (lambda: nn.Conv2d(4, 6, 1, stride=2), (5, 5)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (3, 4)),
        (lambda: nn.ConvTranspose1d(3, 5, 4, dilation=2, padding=3), (5,)),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_of_convolutions(conv, size, weighted, approx):
    """A and G of each group from the Jacobian of one pixel's output in the weights, with class weights and ignored targets."""
    layer = conv()
    model = nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool1d(1) if len(size) == 1 else nn.Flatten(), nn.Flatten(1))
    x = torch.randn(5, layer.in_channels, *size)
    classes = model(x).shape[1]
    y = torch.arange(5) % classes
    weight = torch.linspace(0.5, 2, classes) if weighted else None
    if weighted:
        y[3] = -100
    loss = nn.CrossEntropyLoss(weight=weight)
    operator = hf.KFAC(
        model, loss, (x, y), fisher_type="empirical", kfac_approx=approx, params=list(layer.parameters())
    )
    (factors,) = operator.factors.values()
    d = torch.ones(5) if weight is None else torch.where(y >= 0, weight[y.clamp(min=0)], 0)
    ones = layer.bias is not None
    groups, out = layer.groups, layer.out_channels // layer.groups
    z = layer(x)
    pixels = z.shape[2:].numel()
    f = model[1:](z)
    terms = F.cross_entropy(f, y, weight=weight, reduction="none")
    own = torch.autograd.grad((terms / torch.where(d > 0, d, torch.ones(5))).sum(), z)[0].flatten(2)  # (5, G O, T)
    for b in range(groups):
        # Pixel t of channel c of sample n is linear in the group's weights: its gradient there is the patch.
        channel, rows = b * out, []
        for n, t in itertools.product(range(5), range(pixels)):
            pixel = layer(x)[n, channel].reshape(-1)[t]
            grads = torch.autograd.grad(pixel, list(layer.parameters()))
            if isinstance(layer, nn.modules.conv._ConvTransposeNd):
                per = layer.in_channels // groups
                patch = grads[0][b * per : (b + 1) * per, 0].reshape(-1)
            else:
                patch = grads[0][channel].reshape(-1)
            rows.append(torch.cat([patch, torch.ones(1)]) if ones else patch)
        a = torch.stack(rows).reshape(5, pixels, -1)
        g = own[:, b * out : (b + 1) * out].mT  # (5, T, O)
        if approx == "reduce":
            a, g = a.mean(1, keepdim=True), g.sum(1, keepdim=True)
        truth_a = torch.einsum("n,nti,ntj->ij", d, a, a) / (d.sum() * a.shape[1])
        truth_g = torch.einsum("n,nto,ntp->op", d / d.sum(), g, g)
        mine_a, mine_g = (factors.A[b], factors.G[b]) if groups > 1 else factors
        assert relative(mine_a, truth_a) < TOLERANCE
        assert relative(mine_g, truth_g) < TOLERANCE


@pytest.mark.parametrize(
    "conv, size",
    [
        (lambda: nn.Conv2d(3, 6, 3, padding=1), (4, 5)),
        (lambda: nn.Conv2d(6, 9, (1, 3), stride=2, padding=(0, 2), dilation=(1, 2), groups=3), (5, 7)),
        (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (3, 4)),
        (lambda: nn.Conv1d(2, 4, 4, padding="same"), (7,)),
        (lambda: nn.Conv3d(2, 4, 2, padding=1), (2, 3, 2)),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ones", [False, True])
def test_rows_of_convolutions(conv, size, weighted, ones):
    """Of few positions, whose rows stand for the factor: the patches that the layer's own products with pixels tell."""
    layer = conv()
    x = torch.randn(5, layer.in_channels, *size)
    normal, w = rule_of(layer)(layer, x), torch.linspace(0.2, 2, 5) if weighted else None
    rows = kronecker.input_rows(normal, "expand", True, ones, w, scale=0.3)
    groups = layer.groups
    a = normal.inputs()  # (G, 5, T, I)
    z = layer(x).reshape(5, groups, -1, a.shape[2])
    weight = layer.weight.reshape(groups, -1, a.shape[3])
    own = torch.einsum("goi,gnti->ngot", weight, a) + layer.bias.reshape(1, groups, -1, 1)
    assert relative(own, z) < TOLERANCE  # `a` are the patches
    if ones:
        a = torch.cat([a, torch.ones_like(a[..., :1])], 3)
    a = 0.3 * a if w is None else 0.3 * a * w.sqrt().reshape(1, 5, 1, 1)
    assert relative(rows, a.flatten(1, 2)) < TOLERANCE


# A table that is looked up and multiplied with -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_a_table_tied_to_the_head_is_exact(kind, fisher_type, monkeypatch):
    """Whole where it is small, its diagonal where not: then no row of it is ever made, and autograd is not asked."""
    from hvpfast.capture.sites import TiedSite
    from hvpfast.operators import accumulate

    case, y = make("table and head tied"), torch.arange(6)
    data, chosen = unequal(case.inputs, y), ["embedding.weight"]
    truth = (hf.GGN if fisher_type == "type-2" else hf.EmpiricalFisher)(
        case.model, F.cross_entropy, data, params=chosen
    )
    truth = truth.to_dense()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = kind(case.model, F.cross_entropy, data, fisher_type=fisher_type, params=chosen)
        assert relative(whole.to_dense(), truth) < TOLERANCE
        monkeypatch.setattr(accumulate, "LARGEST_BLOCK", 7)
        monkeypatch.delattr(TiedSite, "sample_grads")
        diagonal = kind(case.model, F.cross_entropy, data, fisher_type=fisher_type, params=chosen)
        assert relative(diagonal.to_dense(), truth.diagonal().diag()) < TOLERANCE
        assert relative(diagonal.diagonal(), truth.diagonal()) < TOLERANCE


def test_forward_only_of_a_table_and_of_a_norm_layer(monkeypatch):
    """G is the identity: how often a row is looked up and the squares that it meets, over all rows of both uses."""
    from hvpfast.operators import accumulate

    case, y = make("table and head tied"), torch.arange(6)
    tokens, model = case.inputs, case.model
    hidden = torch.tanh(model.mix(model.embedding(tokens))).detach().flatten(0, 1)
    expected = F.one_hot(tokens, 7).flatten(0, 1).sum(0)[:, None] * (torch.arange(7) != 2)[:, None]
    expected = (expected + hidden.square().sum(0)) / (2 * tokens.numel())
    for limit in (512, 7):
        monkeypatch.setattr(accumulate, "LARGEST_BLOCK", limit)
        foof = hf.KFAC(model, F.cross_entropy, (tokens, y), fisher_type="forward-only", params=["embedding.weight"])
        assert relative(foof.to_dense(), expected.flatten().diag()) < TOLERANCE
