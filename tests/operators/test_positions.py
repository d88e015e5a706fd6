"""Outputs of other shapes than (N, C), K-FAC by its definition, whatever was asked before; in-place changes; float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from truths import dense_ggn, own_gradients, relative

import hvpfast as hf

TOLERANCE = 1e-10
N, T = 3, 4


pytestmark = pytest.mark.usefixtures("float64")


class Folded(nn.Module):
    """Positions folded into the batch's axis."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x):
        return self.inner(x.reshape(-1, 3)).reshape(*x.shape[:2], 2)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
def test_what_was_asked_before_changes_nothing(kind, n):
    """Folded rows are a Kronecker block of "expand" and are left to autograd by the rest: there positions mix."""
    model, x, y = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Folded()), torch.randn(n, T, 3), torch.randn(n, T, 2)
    truth = dense_ggn(model, nn.MSELoss(), x, y)[12:, 12:]
    hf.KFAC(model, nn.MSELoss(), (x, y), fisher_type="type-2").to_dense()
    mine = kind(model, nn.MSELoss(), (x, y), fisher_type="type-2", kfac_approx="reduce").to_dense()
    assert relative(mine[12:, 12:], truth) < TOLERANCE


class Halves(nn.Module):
    """One layer on both halves of the features, as attention heads share a projection."""

    def __init__(self):
        super().__init__()
        self.each, self.head = nn.Linear(2, 2), nn.Linear(4, 2)

    def forward(self, x):
        left, right = x.chunk(2, -1)
        return self.head(torch.cat([self.each(left), torch.tanh(self.each(right))], -1))


class HalvesOfTable(nn.Module):
    """One table that two words of every position are looked up in."""

    def __init__(self):
        super().__init__()
        self.each, self.head = nn.Embedding(5, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.cat([self.each(x[..., 0]), torch.tanh(self.each(x[..., 1]))], -1))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [Halves, HalvesOfTable])
def test_corrected_eigenvalues_of_a_layer_called_twice_a_position(kind, approx):
    """A position's gradient is the sum over the calls at it, and its square has their cross terms: the block's own trace."""
    model = kind()
    x = torch.randn(N, T, 4) if kind is Halves else torch.randint(0, 5, (N, T, 2))
    y = torch.randn(N, T, 2)
    truth = dense_ggn(model, nn.MSELoss(reduction="sum"), x, y)
    size = sum(p.numel() for p in model.each.parameters())
    made = hf.EKFAC(model, nn.MSELoss(reduction="sum"), (x, y), fisher_type="type-2", kfac_approx=approx).to_dense()
    for part in (slice(0, size), slice(size, None)):
        assert relative(made[part, part].trace(), truth[part, part].trace()) < TOLERANCE


@pytest.mark.parametrize("model_of", [lambda: nn.Linear(3, 2), lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))])
def test_reduce_does_not_mix_the_terms_of_positions(model_of):
    """G sums a term's gradients over positions, never those of several terms: with one a position it is that of "expand"."""
    model, x, y = model_of(), torch.randn(N, T, 3), torch.randn(N, T, 2)
    given = x if isinstance(model, nn.Linear) else model[0](x).detach()
    mean = torch.cat([given.mean(1), torch.ones(N, 1)], 1)
    options = {"fisher_type": "type-2", "kfac_approx": "reduce"}
    factors = list(hf.KFAC(model, nn.MSELoss(reduction="sum"), (x, y), **options).factors.values())[-1]
    assert relative(factors.G, 2.0 * N * T * torch.eye(2)) < TOLERANCE
    assert relative(factors.A, mean.T @ mean / N) < TOLERANCE


def test_reduce_of_a_layer_called_twice_a_position():
    model, x, y = Halves(), torch.randn(N, T, 4), torch.randn(N, T, 2)
    made = hf.KFAC(model, nn.MSELoss(reduction="sum"), (x, y), fisher_type="type-2", kfac_approx="reduce")
    left, right = x.chunk(2, -1)
    slope = 1 - torch.tanh(model.each(right)).square()
    weight = model.head.weight.detach()
    columns = weight[:, None, None, :2] + weight[:, None, None, 2:] * slope  # d output_k / d (both calls' output)
    truth = 2 * torch.einsum("knto,kntp->op", columns, columns).detach()
    assert relative(made.factors["each"].G, truth) < TOLERANCE
    mean = torch.cat([(left + right).mean(1) / 2, torch.ones(N, 1)], 1)
    assert relative(made.factors["each"].A, mean.T @ mean / N) < TOLERANCE


@pytest.mark.parametrize("classes", [2, 3])
def test_instance_norm_of_one_image(classes):
    """torch's backward pass of it misreads a gradient of one image whose channels are last in memory: none is handed to it."""
    model = nn.InstanceNorm2d(classes, affine=True)
    nn.init.normal_(model.weight)
    x, y = torch.randn(1, classes, 2, 3), torch.randint(0, classes, (1, 2, 3))
    loss = nn.CrossEntropyLoss(weight=torch.rand(classes))
    truth = dense_ggn(model, loss, x, y)
    assert relative(hf.GGN(model, loss, (x, y)).to_dense(), truth) < TOLERANCE
    assert relative(hf.GGN(model, loss, (x, y), blocks=True).to_dense(), truth) < TOLERANCE
    assert relative(hf.KFAC(model, loss, (x, y), fisher_type="type-2").to_dense(), truth) < TOLERANCE


class ChangedInPlace(nn.Module):
    """Outputs that are views, changed in place: one layer both with and without."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        hidden = self.inner(x)
        hidden += x
        hidden = torch.tanh(self.inner(hidden))
        hidden = self.inner(hidden).relu_()
        return self.head(hidden)


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize(
    "model_of", [ChangedInPlace, lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))]
)
def test_outputs_changed_in_place(model_of, n):
    """A Linear of three axes returns a view, which leaves the graph when it is changed."""
    model, x, y = model_of(), torch.randn(n, T, 3), torch.randn(n, T, 2)
    batch, own = (x, y), own_gradients(model, nn.MSELoss(), x, y)
    truth = dense_ggn(model, nn.MSELoss(), x, y)

    def flat(grads):
        return torch.cat([g.reshape(n, -1) for g in grads.values()], 1)

    assert relative(flat(hf.per_sample_grads(model, nn.MSELoss(), batch)), own) < TOLERANCE
    assert relative(hf.per_sample_gram(model, nn.MSELoss(), batch), own @ own.T) < TOLERANCE
    with hf.record(model) as tape:
        F.mse_loss(model(x), y).backward()
    assert relative(flat(hf.per_sample_grads(tape, reduction="mean")), own) < TOLERANCE
    assert relative(hf.EmpiricalFisher(model, nn.MSELoss(), batch).to_dense(), own.T @ own / n) < TOLERANCE
    for approx in ("expand", "reduce"):
        made = hf.EKFAC(model, nn.MSELoss(), batch, fisher_type="type-2", kfac_approx=approx)
        assert relative(made.trace(), truth.trace()) < TOLERANCE
        assert hf.KFAC(model, nn.MSELoss(), batch, kfac_approx=approx).trace() > 0


def test_a_preconditioner_sees_outputs_changed_in_place():
    """The same step as with the ReLU out of place."""
    x, y, steps = torch.randn(N, T, 3), torch.randn(N, T, 2), []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 2))
        preconditioner = hf.optim.KFACPreconditioner(model, damping=0.1)
        F.mse_loss(model(x), y).backward()
        plain = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        preconditioner.step()
        steps.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        assert relative(steps[-1], plain) > 1e-3
    assert relative(steps[1], steps[0]) < TOLERANCE


class Squeezed(nn.Module):
    """One number a sample, without an axis of its own: outputs (N,)."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x).squeeze(-1)


SCALARS = {
    "mse": nn.MSELoss(),
    "bce": nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0), reduction="sum"),
    "huber": nn.HuberLoss(delta=9.0),
    "custom": lambda output, target: (output - target).square().mean(),
}


@pytest.mark.parametrize("loss", SCALARS)
@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "curvature-propagation", "empirical"])
def test_outputs_without_an_axis_of_features(loss, fisher_type):
    """They give what the same outputs give as (N, 1)."""
    model, x, y = Squeezed(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(N, 3), torch.rand(N).round()
    for kind in (hf.KFAC, hf.EKFAC):
        one = kind(model, SCALARS[loss], (x, y), fisher_type=fisher_type)
        other = kind(model.layers, SCALARS[loss], (x, y.unsqueeze(1)), fisher_type=fisher_type)
        assert relative(one.to_dense(), other.to_dense()) < TOLERANCE
    if fisher_type == "type-2":
        assert relative(one.trace(), dense_ggn(model, SCALARS[loss], x, y).trace()) < TOLERANCE


@pytest.mark.parametrize("kind", [hf.Hessian, hf.GGN, hf.EmpiricalFisher, hf.KFAC])
def test_data_made_in_inference_mode(kind):
    """Autograd takes no such tensors: they are copied."""
    model, x, y = nn.Linear(3, 2), torch.randn(N, 3), torch.randint(0, 2, (N,))
    truth = kind(model, F.cross_entropy, (x, y)).to_dense()
    with torch.inference_mode():
        made = x.clone(), y.clone()
        assert made[0].is_inference()
        for data in (made, [made], torch.utils.data.DataLoader(list(zip(*made, strict=True)), batch_size=N)):
            assert relative(kind(model, F.cross_entropy, data).to_dense(), truth) < TOLERANCE


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_forward_only_is_a_mean_over_batches(reduction):
    """Of a norm layer the mean square of what it scales, as the input factors are means, whatever the loss's reduction."""
    model, x, y = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), torch.randn(5, 3), torch.randn(5, 2)
    loss, batches = nn.MSELoss(reduction=reduction), [(x[:1], y[:1]), (x[1:3], y[1:3]), (x[3:], y[3:])]
    made = hf.KFAC(model, loss, batches, fisher_type="forward-only").to_dense()
    squares = F.layer_norm(x, (3,)).square().mean(0)
    assert relative(made[:6, :6].diagonal(), torch.cat([squares, torch.ones(3)])) < TOLERANCE
    assert relative(made, hf.KFAC(model, loss, (x, y), fisher_type="forward-only").to_dense()) < TOLERANCE


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_a_bias_on_its_own(approx):
    """Its rows have no features but the one."""
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(N, T, 3), torch.randn(N, T, 2)
    truth = dense_ggn(model, nn.MSELoss(), x, y)[12:16, 12:16]
    options = {"params": ["0.bias"], "fisher_type": "type-2", "kfac_approx": approx}
    assert relative(hf.EKFAC(model, nn.MSELoss(), (x, y), **options).trace(), truth.trace()) < TOLERANCE
