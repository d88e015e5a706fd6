"""K-FAC and EKFAC where theory says that they are exact, against the dense matrices, float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from truths import block_mask, call, dense_ggn, parameters, relative
from zoo import make, unequal

import hvpfast as hf

TOLERANCE = 1e-10
FISHER_TYPES = ("type-2", "mc", "empirical", "curvature-propagation")


pytestmark = pytest.mark.usefixtures("float64")


def blocks_of(model, truth):
    """The truth's diagonal blocks, one a module."""
    names, sizes = zip(*((n, p.numel()) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return truth * block_mask(list(names), list(sizes))


# Deep linear networks under a squared error (E1, E2, E6, E8, E19) -----------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
def test_deep_linear_is_the_ggn(kind, approx, reduction):
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    x, y, loss = torch.randn(9, 6), torch.randn(9, 2), nn.MSELoss(reduction=reduction)
    truth = blocks_of(model, dense_ggn(model, loss, x, y))
    for data in ((x, y), unequal(x, y), [({"input": x[:4]}, y[:4]), ({"input": x[4:]}, y[4:])]):
        operator = kind(model, loss, data, fisher_type="type-2", kfac_approx=approx)
        assert relative(operator.to_dense(), truth) < TOLERANCE


@pytest.mark.parametrize("chosen", [["0.weight", "1.weight"], ["2.bias"], ["2.bias", "0.weight", "0.bias"]])
def test_any_parameters_in_any_order(chosen):
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    x, y, loss = torch.randn(9, 6), torch.randn(9, 2), nn.MSELoss()
    truth = hf.GGN(model, loss, (x, y), params=chosen, blocks=True)
    operator = hf.KFAC(model, loss, (x, y), params=chosen, fisher_type="type-2")
    assert list(operator.params) == chosen
    assert relative(operator.to_dense(), truth.to_dense()) < TOLERANCE


class Shared(nn.Module):
    """Linear maps over positions; the output keeps them (one loss term each) or is their mean."""

    def __init__(self, mean: bool, *, last=2):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, last))
        self.mean = mean

    def forward(self, x):
        f = self.layers(x)
        return f.mean(1) if self.mean else f


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
def test_positions_that_are_loss_terms_expand(kind, reduction):
    model, loss = Shared(False), nn.MSELoss(reduction=reduction)
    x, y = torch.randn(5, 6, 4), torch.randn(5, 6, 2)
    truth = blocks_of(model, dense_ggn(model, loss, x, y))
    assert relative(kind(model, loss, (x, y), fisher_type="type-2").to_dense(), truth) < TOLERANCE
    ragged = [(x[:2, :4], y[:2, :4]), (x[2:], y[2:])]
    if reduction == "sum":
        truth = sum(blocks_of(model, dense_ggn(model, loss, *batch)) for batch in ragged)
    else:
        sizes = [batch[1].numel() for batch in ragged]
        truth = sum(
            s / sum(sizes) * blocks_of(model, dense_ggn(model, loss, *batch))
            for s, batch in zip(sizes, ragged, strict=True)
        )
    assert relative(kind(model, loss, ragged, fisher_type="type-2").to_dense(), truth) < TOLERANCE


@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
def test_positions_that_are_averaged_reduce(kind):
    model, loss = Shared(True), nn.MSELoss()
    x, y = torch.randn(5, 6, 4), torch.randn(5, 2)
    truth = blocks_of(model, dense_ggn(model, loss, x, y))
    operator = kind(model, loss, (x, y), fisher_type="type-2", kfac_approx="reduce")
    assert relative(operator.to_dense(), truth) < TOLERANCE


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_positions_are_a_flattened_data_set(fisher_type, approx):
    """(N, C, T) logits against the same rows as N T samples, ignored targets and class weights included."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    weight = torch.tensor([0.5, 2.0, 1.0])
    x, y = torch.randn(4, 6, 4), torch.randint(0, 3, (4, 6))
    y[1, 2:] = -100

    class ChannelsSecond(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).movedim(-1, 1)

    if approx == "reduce":  # one position: the same data set either way
        x, y = x[:, :1], y[:, :1]
    for kind in (hf.KFAC, hf.EKFAC):
        for loss in (nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), nn.CrossEntropyLoss(reduction="sum")):
            maps = kind(ChannelsSecond(), loss, (x, y), fisher_type=fisher_type, kfac_approx=approx)
            flat = kind(net, loss, (x.flatten(0, 1), y.flatten()), fisher_type=fisher_type, kfac_approx=approx)
            assert relative(maps.to_dense(), flat.to_dense()) < TOLERANCE


def test_a_model_that_flattens_positions_itself():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model = nn.Sequential(*net, nn.Flatten(0, 1))
    x, y = torch.randn(4, 6, 4), torch.randint(0, 3, (24,))
    for kind, fisher_type in itertools.product((hf.KFAC, hf.EKFAC), ("type-2", "empirical")):
        mine = kind(model, F.cross_entropy, (x, y), fisher_type=fisher_type).to_dense()
        flat = kind(net, F.cross_entropy, (x.flatten(0, 1), y), fisher_type=fisher_type).to_dense()
        assert relative(mine, flat) < TOLERANCE


# Other exact cases ---------------------------------------------------------------------------------------------------


def test_identical_inputs():
    """All inputs alike: A has rank one and the block factors, whatever the targets (E17)."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(1, 4).expand(6, 4), torch.arange(6) % 3
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 2.0]), label_smoothing=0.2)
    y[4] = -100
    truth = blocks_of(model, dense_ggn(model, loss, x, y))
    for kind in (hf.KFAC, hf.EKFAC):
        assert relative(kind(model, loss, (x, y), fisher_type="type-2").to_dense(), truth) < TOLERANCE


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_targets_that_are_ignored_are_no_data(fisher_type):
    case = make("cnn, groups and dilation")
    y = torch.tensor([0, 1, -100, 2, -100, 1])
    keep = y >= 0
    for kind, approx in itertools.product((hf.KFAC, hf.EKFAC), ("expand", "reduce")):
        options = {"fisher_type": fisher_type, "kfac_approx": approx}
        full = kind(case.model, F.cross_entropy, (case.inputs, y), **options)
        less = kind(case.model, F.cross_entropy, (case.inputs[keep], y[keep]), **options)
        if kind is hf.KFAC:
            assert relative(full.to_dense(), less.to_dense()) < TOLERANCE
        assert (
            abs(float(full.trace() / less.trace()) - 1) < TOLERANCE
        )  # a basis of equal eigenvalues is anyone's choice


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_class_weights_are_counts(fisher_type):
    """Integer class weights are the same as samples given several times (type-2; empirical Fisher of a mean too)."""
    case = make("mlp")
    weight, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 2, 0, 1, 1])
    times = weight[y].long()
    x2, y2 = case.inputs.repeat_interleave(times, 0), y.repeat_interleave(times)
    weighted = hf.KFAC(case.model, nn.CrossEntropyLoss(weight=weight), (case.inputs, y), fisher_type=fisher_type)
    repeated = hf.KFAC(case.model, nn.CrossEntropyLoss(), (x2, y2), fisher_type=fisher_type)
    assert relative(weighted.to_dense(), repeated.to_dense()) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["mlp", "cnn, groups and dilation", "tied", "attention", "batchnorm in eval", "recurrent"]
)
@pytest.mark.parametrize("fisher_type", FISHER_TYPES[:3])
def test_scaling_and_batches(name, fisher_type):
    """A mean is the sum over N, batches add up, and n copies of the data change nothing (E8, E16, E22)."""
    case = make(name)
    y = torch.arange(6) % case.classes
    options = {"fisher_type": fisher_type}
    mean = hf.KFAC(case.model, nn.CrossEntropyLoss(), (case.inputs, y), **options).to_dense()
    total = hf.KFAC(case.model, nn.CrossEntropyLoss(reduction="sum"), (case.inputs, y), **options).to_dense()
    assert relative(total / 6, mean) < TOLERANCE
    if fisher_type != "mc":
        batches = hf.KFAC(case.model, nn.CrossEntropyLoss(), unequal(case.inputs, y), **options).to_dense()
        assert relative(batches, mean) < TOLERANCE


@pytest.mark.parametrize("fisher_type", ["mc", "curvature-propagation"])
@pytest.mark.parametrize(
    "name, approx", [("mlp", "expand"), ("linear over positions", "expand"), ("linear over positions", "reduce")]
)
def test_draws_converge_to_type_2(name, approx, fisher_type):
    """E4: the mean over independent seeds is within its standard error (and within 3 %) of the exact root's matrix."""
    case = make(name)
    y, options = torch.arange(6) % 3, {"kfac_approx": approx}
    exact = hf.KFAC(case.model, F.cross_entropy, (case.inputs, y), fisher_type="type-2", **options).to_dense()
    options |= {"fisher_type": fisher_type, "mc_samples": 400}
    drawn = [hf.KFAC(case.model, F.cross_entropy, (case.inputs, y), seed=s, **options).to_dense() for s in range(6)]
    mean, spread = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / 6**0.5
    assert relative(mean, exact) < 0.03
    assert float(((mean - exact).abs() / (spread + 1e-3 * exact.abs().max())).mean()) < 1.5


def test_forward_only_is_the_ggn_of_one_linear_layer():
    """E5: under a squared error the GGN is 2 N (sum) or 2 / C (mean) times I (x) A, and S times more with S positions."""
    layer = nn.Linear(4, 3)
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    for loss, scale in ((nn.MSELoss(), 2 / 3), (nn.MSELoss(reduction="sum"), 2.0 * 6)):
        foof = hf.KFAC(layer, loss, (x, y), fisher_type="forward-only")
        assert relative(scale * foof.to_dense(), dense_ggn(layer, loss, x, y)) < TOLERANCE
    x, y = torch.randn(6, 5, 4), torch.randn(6, 5, 3)
    foof = hf.KFAC(layer, nn.MSELoss(reduction="sum"), (x, y), fisher_type="forward-only")
    assert relative(2 * 30 * foof.to_dense(), dense_ggn(layer, nn.MSELoss(reduction="sum"), x, y)) < TOLERANCE


class SplitConcat(nn.Module):
    """One weight in two modules, each on half of the features (weight tying, E7)."""

    def __init__(self, bias):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2, bias=bias), nn.Linear(3, 2, bias=bias)
        self.second.weight = self.first.weight
        if bias:
            self.second.bias = self.first.bias

    def forward(self, x):
        return torch.cat([self.first(x[:, :3]), self.second(x[:, 3:])], 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
def test_tied_weights(bias, kind):
    """The two uses are two positions: exact for one sample with one loss term a position."""
    model = SplitConcat(bias)
    x, y, loss = torch.randn(7, 6), torch.randn(7, 4), nn.MSELoss()
    truth = dense_ggn(model, loss, x, y)
    mine = kind(model, loss, (x, y), fisher_type="type-2")
    if kind is hf.KFAC:  # every use sees the identity behind it: A averages over both
        assert relative(mine.to_dense(), truth) < TOLERANCE
    else:
        assert relative(mine.to_dense(), truth) < 0.7
        assert abs(float(mine.trace() / truth.trace()) - 1) < TOLERANCE


def test_a_weight_tied_with_and_without_bias():
    """The weight is a block of its own, and so is the bias; both positive, both as large as the truth's trace (E7)."""
    model = SplitConcat(False)
    model.first.bias = nn.Parameter(torch.randn(2))
    x, y = torch.randn(7, 6), torch.randn(7, 4)
    operator = hf.EKFAC(model, nn.MSELoss(), (x, y), fisher_type="type-2")
    truth = dense_ggn(model, nn.MSELoss(), x, y)
    names = [block.names for block in operator.blocks()]
    assert names == [("first.weight",), ("first.bias",)]
    assert abs(float(operator.trace() / truth.trace()) - 1) < TOLERANCE


@pytest.mark.parametrize("name", ["mlp", "cnn, groups and dilation", "tied", "called twice", "attention", "conv3d"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_ekfac_has_the_exact_diagonal_in_its_basis_and_is_nearer(name, fisher_type):
    """E6: EKFAC's trace is the block's, and its distance in Frobenius norm is at most K-FAC's (per group for groups)."""
    case = make(name)
    y = torch.arange(6) % case.classes
    data = unequal(case.inputs, y)
    truth = (hf.GGN if fisher_type == "type-2" else hf.EmpiricalFisher)(case.model, F.cross_entropy, data, blocks=True)
    truth = truth.to_dense()
    kfac = hf.KFAC(case.model, F.cross_entropy, data, fisher_type=fisher_type)
    ekfac = hf.EKFAC(case.model, F.cross_entropy, data, fisher_type=fisher_type)
    assert abs(float(ekfac.trace() / truth.trace()) - 1) < TOLERANCE
    assert float((ekfac.to_dense() - truth).norm()) <= float((kfac.to_dense() - truth).norm()) * (1 + 1e-12)


def test_norm_layers_and_loose_parameters_are_exact():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))
            self.norm, self.group, self.head = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.group(self.norm(x * self.scale)[:, :, None])[:, :, 0]))

    model = Net()
    for p in model.parameters():
        nn.init.normal_(p)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    truth = hf.GGN(
        model, F.cross_entropy, (x, y), blocks=True, params=["scale", "norm.weight", "norm.bias", "group.bias"]
    )
    mine = hf.KFAC(model, F.cross_entropy, (x, y), fisher_type="type-2", params=list(truth.params))
    assert relative(mine.to_dense(), truth.to_dense()) < TOLERANCE


def test_large_factors_and_blocks_are_diagonals(monkeypatch):
    from hvpfast.operators import accumulate

    monkeypatch.setattr(accumulate, "LARGEST_FACTOR", 4)
    monkeypatch.setattr(accumulate, "LARGEST_BLOCK", 7)
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    mine = hf.KFAC(model, F.cross_entropy, (x, y), fisher_type="type-2")
    mine.trace()
    monkeypatch.undo()
    full = hf.KFAC(model, F.cross_entropy, (x, y), fisher_type="type-2")
    a, g = mine.factors["0"]
    assert relative(a, full.factors["0"].A.diagonal()) < TOLERANCE
    assert relative(g, full.factors["0"].G) < TOLERANCE
    assert relative(mine.to_dense()[28:36, 28:36], full.to_dense()[28:36, 28:36].diagonal().diag()) < TOLERANCE
    assert relative(mine.to_dense(), mine.to_dense().T) < TOLERANCE


def test_embeddings():
    """One token a sample: the embedding is a linear map of one-hot rows, its block exact for one sample."""
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Flatten(), nn.Tanh(), nn.Linear(4, 3))
    for token in (5, 2):
        x, y = torch.tensor([[token]]), torch.tensor([1])
        truth = hf.GGN(model, F.cross_entropy, (x, y), blocks=True).to_dense()
        for kind in (hf.KFAC, hf.EKFAC):
            mine = kind(model, F.cross_entropy, (x, y), fisher_type="type-2").to_dense()
            assert float((mine - truth).norm()) < TOLERANCE


def test_a_position_that_meets_others_is_a_column_of_its_own():
    """A model that mixes positions, with a loss term each: EKFAC's trace is the GGN's, and the draws agree with it."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = torch.tanh(self.inner(x))
            return self.head(h + h.roll(1, 1)).movedim(-1, 1)

    model, x, y = Mixing(), torch.randn(5, 3, 4), torch.randint(0, 3, (5, 3))
    truth = blocks_of(model, dense_ggn(model, F.cross_entropy, x, y))
    mine = hf.EKFAC(model, F.cross_entropy, (x, y), fisher_type="type-2")
    assert abs(float(mine.trace() / truth.trace()) - 1) < TOLERANCE
    rough = hf.EKFAC(model, F.cross_entropy, (x, y), mc_samples=600)
    assert abs(float(rough.trace() / truth.trace()) - 1) < 0.1


def test_rows_of_one_sample_that_meet_under_a_loss_without_a_closed_form():
    """Several output rows a sample, which share parameters within the model: each is a loss term, and a column of its own."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x):
            h = torch.tanh(self.inner(x)) * self.scale
            return self.head(h + h.roll(1, 1)).flatten(0, 1)

    model, x, y = Rows(), torch.randn(5, 3, 4), torch.randn(15, 3)
    for loss in (nn.SmoothL1Loss(beta=0.5), nn.HuberLoss(reduction="sum"), lambda f, y: (f - y).cosh().log().sum()):
        truth = blocks_of(model, dense_ggn(model, loss, x, y))
        ekfac = hf.EKFAC(model, loss, (x, y), fisher_type="type-2")
        assert abs(float(ekfac.trace() / truth.trace()) - 1) < TOLERANCE
        alone = hf.KFAC(model, loss, (x, y), fisher_type="type-2", params=["scale"]).to_dense()
        names = [n for n, p in model.named_parameters() for _ in range(p.numel())]
        mine = torch.tensor([n == "scale" for n in names])
        assert relative(alone, truth[mine][:, mine]) < TOLERANCE


def test_thin_factors_are_the_same_operator():
    """Few samples: rows instead of factors, in one batch; two batches make dense ones."""
    model = nn.Sequential(
        nn.Conv2d(8, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 4, 40), nn.Tanh(), nn.Linear(40, 3)
    )
    x, y = torch.randn(4, 8, 4, 4), torch.arange(4) % 3
    thin = hf.KFAC(model, F.cross_entropy, (x, y), fisher_type="empirical")
    dense = hf.KFAC(model, F.cross_entropy, [(x[:2], y[:2]), (x[2:], y[2:])], fisher_type="empirical")
    assert "Thin" in repr([block.a for block in thin.blocks()] + [block.g for block in thin.blocks()])
    assert "Thin" not in repr([block.a for block in dense.blocks()])
    v = torch.randn(thin.shape[0], 3)
    assert relative(thin @ v, dense @ v) < TOLERANCE
    assert relative(thin.diagonal(), dense.diagonal()) < TOLERANCE
    for method in ("exact", "pi", "uniform"):
        assert relative(thin.inverse(0.1, method) @ v, dense.inverse(0.1, method) @ v) < TOLERANCE
    ekfac = [
        hf.EKFAC(model, F.cross_entropy, data, fisher_type="empirical")
        for data in ((x, y), [(x[:2], y[:2]), (x[2:], y[2:])])
    ]
    assert relative(ekfac[0].inverse(0.1) @ v, ekfac[1].inverse(0.1) @ v) < TOLERANCE


def test_the_model_is_left_alone():
    case = make("attention")
    y = torch.arange(6) % 3
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    case.model.train()
    loss = F.cross_entropy(call(case.model, case.inputs), y)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in case.model.named_parameters()}
    hf.EKFAC(case.model, F.cross_entropy, (case.inputs, y)).trace()
    assert case.model.training and not case.model._forward_hooks
    for name, p in case.model.named_parameters():
        assert torch.equal(p, before[name]) and torch.equal(p.grad, grads[name])
    assert len(parameters(case.model)) == len(before)
