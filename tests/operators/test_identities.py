"""Identities that hold for any model, with independent routes to both sides, float64 (numbers E of the specification)."""

import itertools

import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import nn
from truths import dense_ggn, own_gradients, relative
from zoo import classes_of, make, unequal

import hvpfast as hf

pytestmark = pytest.mark.usefixtures("float64")


def rearranged(block, rows, columns):
    """Van Loan's rearrangement of a matrix of (rows x rows) blocks of (columns x columns): a Kronecker product has rank one."""
    parts = block.reshape(rows, columns, rows, columns).permute(0, 2, 1, 3)
    return parts.reshape(rows * rows, columns * columns)


def test_the_nearest_kronecker_product():
    """E11: where K-FAC is exact its block is its own nearest Kronecker product; elsewhere none is nearer than that one."""
    x, y = torch.randn(9, 4), torch.randn(9, 2)
    linear = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    curved = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False))
    for model, exact in ((linear, True), (curved, False)):
        kfac = hf.KFAC(model, nn.MSELoss(), (x, y), fisher_type="type-2")
        truth = hf.GGN(model, nn.MSELoss(), (x, y), params=["0.weight"]).to_dense()
        a, g = kfac.factors["0"]
        left, values, right = torch.linalg.svd(rearranged(truth, 3, 4))
        nearest = values[0] * left[:, :1] @ right[:1]
        ours = rearranged(torch.kron(g, a), 3, 4)
        assert relative(ours, torch.outer(g.reshape(-1), a.reshape(-1))) < 1e-12
        gap, least = (ours - rearranged(truth, 3, 4)).norm(), (nearest - rearranged(truth, 3, 4)).norm()
        if exact:
            assert values[1] < 1e-10 * values[0] and relative(ours, nearest) < 1e-10
        else:
            assert values[1] > 1e-4 * values[0] and least < gap < 10 * least


KINDS = {
    "Hessian": hf.Hessian,
    "GGN": hf.GGN,
    "GGN, blocks": lambda *a: hf.GGN(*a, blocks=True),
    "EmpiricalFisher": hf.EmpiricalFisher,
    "KFAC": hf.KFAC,
    "EKFAC": hf.EKFAC,
    "inverse of KFAC": lambda *a: hf.KFAC(*a).inverse(damping=0.1),
    "inverse of EKFAC": lambda *a: hf.EKFAC(*a).inverse(damping=0.1),
    "power of KFAC": lambda *a: hf.KFAC(*a).power(-0.5, damping=0.1),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("model", ["cnn, groups and dilation", "table and head tied"])
def test_every_form_of_every_operator(name, model):
    """E12: vectors, matrices, dicts, from the left, transposed, SciPy: one matrix, and a symmetric one."""
    case = make(model)
    operator = KINDS[name](case.model, nn.CrossEntropyLoss(), unequal(case.inputs, classes_of(6, case.classes)))
    dense, p = operator.to_dense(), operator.shape[0]
    assert dense.shape == operator.shape == (p, p) and relative(dense.T, dense) < 1e-10
    v = torch.randn(p, 3)
    assert relative(operator @ v, dense @ v) < 1e-10 and relative(operator @ v[:, 0], dense @ v[:, 0]) < 1e-10
    assert relative(v.T @ operator, v.T @ dense) < 1e-10 and relative(operator.T @ v, dense.T @ v) < 1e-10
    parts = {
        n: part.reshape(q.shape)
        for (n, q), part in zip(operator.params.items(), v[:, 0].split(operator.space.sizes), strict=True)
    }
    got = torch.cat([part.reshape(-1) for part in (operator @ parts).values()])
    assert relative(got, dense @ v[:, 0]) < 1e-10
    outside = operator.to_scipy()
    assert isinstance(outside, scipy.sparse.linalg.LinearOperator)
    assert relative(torch.from_numpy(outside @ v.numpy()), dense @ v) < 1e-10
    assert abs(operator.quadratic_form(v[:, 0]) - v[:, 0] @ dense @ v[:, 0]) < 1e-10 * dense.norm() * p


def conv_and_batchnorm():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model.eval(), torch.randn(5, 2, 8, 8), torch.arange(5) % 3


class Decoder(nn.Module):
    """The shape of GPT-2: tables of tokens and positions, one fused projection, causal attention, a tied head."""

    def __init__(self, vocabulary=11, width=6, heads=2, layers=2):
        super().__init__()
        self.tokens, self.positions, self.heads = nn.Embedding(vocabulary, width), nn.Embedding(9, width), heads
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            parts = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
            mlp = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.blocks.append(nn.ModuleList([*parts, *mlp]))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for norm, qkv, out, norm2, up, down in self.blocks:
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv(norm(h)).chunk(3, -1))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + out(mixed.transpose(1, 2).flatten(2))
            h = h + down(F.gelu(up(norm2(h))))
        return self.head(self.norm(h)).transpose(1, 2)  # (N, V, T), as cross entropy takes it


class Encoder(nn.Module):
    """The shape of BERT: a padded batch, a mask, the first position classified."""

    def __init__(self, width=6):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, width, padding_idx=0), nn.Embedding(9, width)
        layer = nn.TransformerEncoderLayer(width, 2, 8, 0.0, batch_first=True, activation="gelu")
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, 3)

    def forward(self, x):
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1])[None])
        return self.head(self.layers(h, src_key_padding_mask=x == 0)[:, 0])


def decoder():
    x = torch.randint(0, 11, (5, 5))  # as many samples as positions
    return Decoder(), x, torch.randint(0, 11, (5, 5))


def encoder():
    x = torch.randint(1, 11, (5, 6))
    x[1, 4:] = x[3, 2:] = 0
    return Encoder().eval(), x, torch.arange(5) % 3


FAMILIES = {"conv and batchnorm": conv_and_batchnorm, "decoder": decoder, "encoder": encoder}


@pytest.mark.parametrize("family", FAMILIES)
def test_per_sample_quantities_of_whole_families(family):
    """E15, E20, E21: against a loop over samples; their mean is the gradient, their squares the diagonal of the Fisher."""
    model, x, y = FAMILIES[family]()
    loss = nn.CrossEntropyLoss()
    rows = own_gradients(model, loss, x, y)
    grads = hf.per_sample_grads(model, loss, (x, y))
    flat = torch.cat([part.reshape(len(x), -1) for part in grads.values()], 1)
    assert relative(flat, rows) < 1e-11
    params = list(model.parameters())
    whole = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(model(x), y), params)])
    assert relative(flat.mean(0), whole) < 1e-11
    assert relative(hf.per_sample_grad_norms(model, loss, (x, y)), rows.norm(dim=1)) < 1e-11
    assert relative(hf.per_sample_gram(model, loss, (x, y)), rows @ rows.T) < 1e-11
    squares = torch.cat([part.reshape(-1) for part in hf.grad_second_moment(model, loss, (x, y)).values()])
    assert relative(squares, rows.square().sum(0)) < 1e-11
    v = torch.randn(rows.shape[1])
    fisher = hf.EmpiricalFisher(model, loss, (x, y))
    assert relative(fisher @ v, rows.T @ (rows @ v) / len(x)) < 1e-11
    centred = hf.EmpiricalFisher(model, loss, (x, y), centered=True)
    assert relative(centred @ v, (rows - rows.mean(0)).T @ ((rows - rows.mean(0)) @ v) / len(x)) < 1e-10
    bound = float(rows.norm(dim=1).median())
    clipped, norms = hf.clipped_grad(model, loss, (x, y), max_norm=bound)
    scaled = rows * (bound / rows.norm(dim=1)).clamp(max=1)[:, None]
    assert relative(torch.cat([part.reshape(-1) for part in clipped.values()]), scaled.sum(0)) < 1e-11
    assert relative(norms, rows.norm(dim=1)) < 1e-11


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_add_up_over_data_and_parameters(family, approx):
    """E21: factors of the whole are the means of the parts', and a block does not depend on the other blocks asked for."""
    model, x, y = FAMILIES[family]()
    loss = nn.CrossEntropyLoss()
    options = {"fisher_type": "type-2", "kfac_approx": approx}
    whole = hf.KFAC(model, loss, (x, y), **options)
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    for name, (a, g) in hf.KFAC(model, loss, parts, **options).factors.items():
        assert relative(a, whole.factors[name].A) < 1e-10 and relative(g, whole.factors[name].G) < 1e-10, name
    alone = [hf.KFAC(model, loss, part, **options).factors for part in parts]
    for name, (a, g) in whole.factors.items():
        means = ((2 * p + 3 * q) / 5 for p, q in zip(*(one[name] for one in alone), strict=True))
        assert all(relative(mean, truth) < 1e-10 for mean, truth in zip(means, (a, g), strict=True)), name
    names = list(whole.params)
    for chosen in itertools.islice((names[i : i + 2] for i in range(0, len(names), 5)), 3):
        some = hf.KFAC(model, loss, (x, y), params=chosen, **options)
        for name, (a, g) in some.factors.items():
            if whole.factors.get(name) is not None and whole.factors[name].A.shape == a.shape:
                assert relative(a, whole.factors[name].A) < 1e-10 and relative(g, whole.factors[name].G) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_ekfac_has_the_exact_trace_and_is_nearer(family):
    """E6: EKFAC's eigenvalues are the block's own second moments in K-FAC's basis, so that no eigenvalues do better."""
    model, x, y = FAMILIES[family]()
    names = [n for n, p in model.named_parameters() if p.numel() <= 150]
    data, loss = (x, y), nn.CrossEntropyLoss()
    truth = hf.GGN(model, loss, data, params=names, blocks=True).to_dense()
    ekfac, kfac = (kind(model, loss, data, params=names, fisher_type="type-2") for kind in (hf.EKFAC, hf.KFAC))
    assert relative(ekfac.trace(), truth.trace()) < 1e-10
    gaps = [float((operator.to_dense() - truth).norm()) for operator in (ekfac, kfac)]
    assert gaps[0] <= gaps[1] * (1 + 1e-10)


@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
@pytest.mark.parametrize("groups", [1, 2])
def test_linear_convolutions_are_the_ggn(kind, groups):
    """E2: expand where every pixel of the output is a loss term of its own, reduce where the output is their mean."""
    x, loss = torch.randn(5, 2, 6, 5), nn.MSELoss()
    maps = nn.Sequential(nn.Conv2d(2, 4, (2, 3), stride=(1, 2), groups=groups), nn.Conv2d(4, 3, 1, bias=False))
    pooled = nn.Sequential(nn.Conv2d(2, 4, 3, dilation=2, groups=groups), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pooled.append(nn.Linear(4, 3))
    for model, approx in ((maps, "expand"), (pooled, "reduce")):
        y = torch.randn_like(model(x))
        mine = kind(model, loss, unequal(x, y)[1:] + unequal(x, y)[:1], fisher_type="type-2", kfac_approx=approx)
        truth = dense_ggn(model, loss, x, y)
        keep = sum(torch.outer(one, one) for one in blocks_by_group(model))
        assert relative(mine.to_dense(), truth * keep) < 1e-10, approx


def blocks_by_group(model):
    """One indicator (P,) a group of a layer: the outputs that it makes."""
    sizes = [p.numel() for p in model.parameters()]
    places = torch.arange(sum(sizes)).split(sizes)
    for layer in (m for m in model.modules() if next(m.parameters(recurse=False), None) is not None):
        groups = getattr(layer, "groups", 1)
        for b in range(groups):
            one = torch.zeros(sum(sizes))
            for p in layer.parameters():
                index = next(i for i, q in zip(places, model.parameters(), strict=True) if q is p)
                one[index.reshape(groups, -1)[b]] = 1
            yield one


@pytest.mark.parametrize("family", ["conv and batchnorm", "decoder", "encoder"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_copies_of_the_data_count_as_often(family, fisher_type):
    """E16: of a sum, n copies have n times the matrix; of a mean, the same one."""
    model, x, y = FAMILIES[family]()
    for kind, loss, times in itertools.product(
        (hf.KFAC, hf.EKFAC), (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")), (3,)
    ):
        once = kind(model, loss, (x, y), fisher_type=fisher_type)
        copies = kind(model, loss, [(x, y)] * times, fisher_type=fisher_type)
        factor = times if loss.reduction == "sum" else 1
        assert relative(copies.trace(), factor * once.trace()) < 1e-10
        if kind is hf.KFAC:
            for name, (a, g) in once.factors.items():
                assert (
                    relative(copies.factors[name].A, a) < 1e-10 and relative(copies.factors[name].G, factor * g) < 1e-10
                )


def test_identical_pixels():
    """E17: one image for all samples and one patch for all pixels. The gradients of the T pixels are equal too, so reduce is
    the block, and expand, which takes them for independent, the block over T."""
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.AvgPool2d((3, 5)), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.randn(1, 3, 1, 1).expand(6, 3, 4, 6), torch.arange(6) % 3
    for loss in (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(reduction="sum")):
        truth = hf.GGN(model, loss, (x, y), params=["0.weight", "0.bias"]).to_dense()
        for approx, factor in (("reduce", 1), ("expand", 15)):
            mine = hf.KFAC(model, loss, (x, y), params=["0.weight", "0.bias"], fisher_type="type-2", kfac_approx=approx)
            assert relative(factor * mine.to_dense(), truth) < 1e-10, approx
