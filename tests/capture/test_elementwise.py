"""Scales and summands that a model applies itself: rules found in the graph, without autograd's rows."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from truths import own_gradients, relative

import hvpfast as hf

WIDTH, TOKENS = 4, 5


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


class Norm(nn.Module):
    """Root mean square normalisation as language models write it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Net(nn.Module):
    """Learned positions, a custom norm, a scaled branch, a shift that is used twice."""

    def __init__(self, shape=(TOKENS, WIDTH)):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, WIDTH), nn.Parameter(torch.randn(shape))
        self.norm, self.inner, self.scale = Norm(), nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.shift, self.head = nn.Parameter(torch.randn(1, WIDTH)), nn.Linear(WIDTH, 3)

    def forward(self, x):
        h = self.tokens(x) + self.positions
        h = h + self.shift + self.inner(self.norm(h)) * self.scale
        return self.head(torch.tanh(torch.add(h, self.shift)).mean(1))


class Decoys(nn.Module):
    """Sums and products that look alike and are not: of weights, with a factor, of both kinds at once, over an inner axis."""

    def __init__(self, n):
        super().__init__()
        self.rows, self.weight = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(n, WIDTH))
        self.factor, self.both = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.inner, self.head = nn.Parameter(torch.randn(TOKENS, 1)), nn.Linear(n, 3)

    def forward(self, x):
        h = torch.add(x, self.factor, alpha=3) * self.both + self.both
        return self.head(((h * self.inner).mean(1)) @ (self.rows * self.weight).T)


def tokens(n):
    return torch.randint(0, 7, (n, TOKENS)), torch.randint(0, 3, (n,))


def agrees(model, x, y):
    n, loss = len(x), nn.CrossEntropyLoss()
    rows = own_gradients(model, loss, x, y)
    got = hf.per_sample_grads(model, loss, (x, y))
    assert relative(torch.cat([part.reshape(n, -1) for part in got.values()], 1), rows) < 1e-12
    assert relative(hf.per_sample_gram(model, loss, (x, y)), rows @ rows.T) < 1e-12
    assert relative(hf.EKFAC(model, loss, (x, y), fisher_type="empirical").trace(), rows.square().sum() / n) < 1e-10
    one = hf.KFAC(model, loss, (x[:1], y[:1]), fisher_type="empirical").trace()
    truth = hf.EmpiricalFisher(model, loss, (x[:1], y[:1])).to_dense().trace()
    assert relative(one, truth) < (1e-10 if x.dim() == 3 else 1)  # one position: the blocks are exact


@pytest.mark.parametrize("shape", [(TOKENS, WIDTH), (1, TOKENS, WIDTH), (WIDTH,), (1, 1, WIDTH)])
@pytest.mark.parametrize("n", [1, WIDTH, TOKENS, 7])
def test_scales_and_summands(shape, n):
    model, (x, y) = Net(shape), tokens(n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no parameter is left to autograd
        agrees(model, x, y)
        with hf.record(model) as tape:
            F.cross_entropy(model(x), y).backward()
    truth = own_gradients(model, nn.CrossEntropyLoss(), x, y).norm(dim=1)
    assert relative(hf.per_sample_grad_norms(tape, reduction="mean"), truth) < 1e-12


@pytest.mark.parametrize("n", [1, WIDTH, TOKENS, 7])
def test_what_looks_alike(n):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agrees(Decoys(n), torch.randn(n, TOKENS, WIDTH), torch.randint(0, 3, (n,)))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_blocks_are_the_exact_ones(approx):
    model, (x, y) = Net(), tokens(6)
    names = ["positions", "norm.weight", "scale", "shift"]
    kfac = hf.KFAC(model, F.cross_entropy, (x, y), params=names, fisher_type="type-2", kfac_approx=approx)
    truth = hf.GGN(model, F.cross_entropy, (x, y), params=names, blocks=True)
    assert relative(kfac.to_dense(), truth.to_dense()) < 1e-10


class ScaledWeight(nn.Module):
    """A scale of a weight's columns, as many rows as samples: with activations normalised by the batch."""

    def __init__(self, n):
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.weight, self.loose = nn.Parameter(torch.randn(n, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return self.norm(self.first(x)) @ (self.loose * self.weight).T


def test_batch_statistics_leave_them_to_autograd():
    """Where samples mix, nothing tells a product of weights from one with activations: plain gradients, and a warning."""
    n = 6
    model, x, y = ScaledWeight(n), torch.randn(n, WIDTH), torch.arange(n)
    preconditioner = hf.optim.KFACPreconditioner(model, damping=0.1, kl_clip=None)
    with pytest.warns(UserWarning, match="loose"):
        F.cross_entropy(model(x), y).backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters()}
        preconditioner.step()
    assert torch.equal(model.loose.grad, plain["loose"]) and torch.equal(model.weight.grad, plain["weight"])
    assert relative(model.first.weight.grad, plain["first.weight"]) > 0.1  # a layer with a rule is preconditioned


class ChangedAfterUse(nn.Module):
    """A scale whose input is changed in place after it; `late`: the change hits what a tanh kept."""

    def __init__(self, late):
        super().__init__()
        self.inner, self.head, self.late = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), late
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        h = self.inner(x)
        h = torch.tanh(h) if self.late else h
        scaled = self.scale * h
        h.add_(1)
        return self.head(torch.tanh(scaled) + h)


@pytest.mark.parametrize("late", [False, True])
def test_activations_changed_in_place_are_refused_by_every_quantity(late):
    model, loss, batch = ChangedAfterUse(late), nn.CrossEntropyLoss(), (torch.randn(5, WIDTH), torch.arange(5) % 3)
    for ask in (
        lambda: hf.per_sample_grads(model, loss, batch),
        lambda: hf.clipped_grad(model, loss, batch, max_norm=1.0),
        lambda: hf.KFAC(model, loss, batch).trace(),
        lambda: hf.EKFAC(model, loss, batch, fisher_type="type-2").trace(),
        lambda: hf.GGN(model, loss, batch).to_dense(),
        lambda: hf.Hessian(model, loss, batch).to_dense(),
        lambda: hf.EmpiricalFisher(model, loss, batch).to_dense(),
        lambda: hf.optim.natural_gradient(model, loss, batch, damping=0.1),
    ):
        with pytest.raises(hf.StateError, match="changed in place"):
            ask()
