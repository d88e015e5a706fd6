"""Slices of the loss: exact centre, untouched model, right axes, right curvature, right norms."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hvpfast.capture.errors import StateError
from hvpfast.landscape import line, normalised, plane
from hvpfast.landscape.directions import filters


def mlp(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3)
    ).double()


def batch(n=17, shape=(6,), dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (n,), generator=generator)


def state(model):
    return copy.deepcopy(
        (
            [p.detach().clone() for p in model.parameters()],
            [b.clone() for b in model.buffers()],
            [m.training for m in model.modules()],
            [p.grad for p in model.parameters()],
            torch.get_rng_state(),
        )
    )


def assert_same(before, after):
    for x, y in zip(before[0] + before[1] + [before[4]], after[0] + after[1] + [after[4]], strict=True):
        assert x.dtype == y.dtype and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
    assert before[2] == after[2]
    for x, y in zip(before[3], after[3], strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalise", ["filter", "layer", "global", "none"])
def test_the_centre_is_the_unperturbed_loss_exactly(dtype, normalise):
    model, (x, y) = mlp(dtype), batch(dtype=dtype)
    found = plane(model, nn.CrossEntropyLoss(), (x, y), normalise=normalise, extent=0.3, steps=5)
    with torch.no_grad():
        truth = float(nn.functional.cross_entropy(model(x), y))
    assert found.losses[2, 2] == truth == found.centre
    assert found.alphas[2] == found.betas[2] == 0.0
    assert found.losses.shape == (5, 5) and np.isfinite(found.losses).all()
    assert abs(found.cosine) < (1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("train", [True, False])
def test_the_model_is_untouched(train):
    model = cnn().train(train)
    model[1].train(not train)  # modes differ between submodules
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = state(model)
    versions = [p._version for p in model.parameters()]
    plane(model, nn.CrossEntropyLoss(), batch(9, (2, 4, 4)), steps=3, extent=0.1)
    line(model, nn.CrossEntropyLoss(), batch(9, (2, 4, 4)), steps=3, extent=0.1)
    assert_same(before, state(model))
    assert versions == [p._version for p in model.parameters()]  # a graph of the user's stays valid


def test_an_exception_in_the_middle_of_the_grid_changes_nothing():
    model = cnn().train()
    before, calls = state(model), []

    def loss(output, target):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("injected")
        return nn.functional.cross_entropy(output, target)

    with pytest.raises(RuntimeError, match="injected"):
        plane(model, loss, batch(9, (2, 4, 4)), steps=3)
    assert len(calls) == 6
    assert_same(before, state(model))


def test_second_derivative_along_a_direction_is_dHd():
    model, data = mlp(), batch()
    params = dict(model.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])

    def of(vector):
        pieces = vector.split([p.numel() for p in params.values()])
        replaced = {name: piece.view_as(p) for (name, p), piece in zip(params.items(), pieces, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, replaced, (data[0],)), data[1])

    hessian = torch.autograd.functional.hessian(of, flat)
    for normalise in ("filter", "global"):
        h = 1e-4
        found = plane(model, nn.CrossEntropyLoss(), data, normalise=normalise, extent=h, steps=3, seed=3)
        grid = found.losses
        for d, (low, high) in ((found.d1, grid[1, [0, 2]]), (found.d2, grid[[0, 2], 1])):
            assert (low + high - 2 * grid[1, 1]) / h**2 == pytest.approx(float(d @ hessian @ d), rel=1e-4)
        mixed = (grid[2, 2] - grid[2, 0] - grid[0, 2] + grid[0, 0]) / (4 * h * h)
        assert mixed == pytest.approx(float(found.d1 @ hessian @ found.d2), rel=1e-3, abs=1e-5)
    top = torch.linalg.eigh(hessian).eigenvectors[:, -1]
    along = line(model, nn.CrossEntropyLoss(), data, top, extent=1e-3, steps=3)
    curvature = (along.losses[0] + along.losses[2] - 2 * along.losses[1]) / 1e-6
    assert curvature == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-4)
    assert torch.equal(along.d, top) and along.normalise == "none"


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.y = nn.Parameter(torch.tensor([1.0]).double()), nn.Parameter(torch.tensor([2.0]).double())

    def forward(self, inputs):
        return self.x + 10 * self.y + 0 * inputs.sum()


def test_rows_are_beta_and_columns_alpha():
    e1, e2 = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    data = (torch.zeros(1, 1).double(), torch.zeros(1).double())
    found = plane(Point(), lambda out, _: out.sum(), data, directions=(e1, e2), extent=(0, 1), steps=3)
    assert found.losses[0, 2] - found.losses[0, 0] == pytest.approx(1.0)  # along a row: alpha, so x
    assert found.losses[2, 0] - found.losses[0, 0] == pytest.approx(10.0)  # down a column: beta, so y
    named = plane(
        Point(), lambda out, _: out.sum(), data, directions=({"x": e1[:1], "y": e1[1:]}, [e2[:1], e2[1:]]), steps=3
    )
    assert torch.equal(named.d1, e1.double()) and torch.equal(named.d2, e2.double())


def test_filter_norms_are_the_parameters():
    model = cnn()
    params = {name: p.detach() for name, p in model.named_parameters()}
    found = plane(model.eval(), nn.CrossEntropyLoss(), batch(5, (2, 4, 4)), steps=3, extent=0.1, seed=7)
    for flat in (found.d1, found.d2):
        for (_, p), piece in zip(params.items(), flat.split([p.numel() for p in params.values()]), strict=True):
            d = piece.view_as(p)
            if p.dim() < 2:
                assert not d.any()
            else:
                torch.testing.assert_close(filters(d).norm(dim=1), filters(p).norm(dim=1))
    layer = plane(model, nn.CrossEntropyLoss(), batch(5, (2, 4, 4)), steps=3, extent=0.1, normalise="layer")
    whole = plane(model, nn.CrossEntropyLoss(), batch(5, (2, 4, 4)), steps=3, extent=0.1, normalise="global")
    weights = [p.norm() for p in params.values() if p.dim() > 1]
    assert float(layer.d2.norm()) == pytest.approx(float(torch.stack(weights).norm()))
    assert float(whole.d1.norm()) == pytest.approx(float(torch.stack([p.norm() for p in params.values()]).norm()))
    assert abs(layer.cosine) < 1e-13 and abs(whole.cosine) < 1e-13
    again = normalised({n: torch.ones_like(p) for n, p in params.items()}, params, "filter")
    torch.testing.assert_close(filters(again["0.weight"]).norm(dim=1), filters(params["0.weight"]).norm(dim=1))


def test_batches_are_weighted_as_one():
    model, (x, y) = mlp(), batch(17)
    y = y.clone()
    y[:3], y[12:] = -100, -100
    losses = [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double(), label_smoothing=0.1),
        lambda out, target: nn.functional.cross_entropy(out, target.clamp(min=0)),
    ]
    parts = [(x[:3], y[:3]), (x[3:4], y[3:4]), (x[4:], y[4:])]
    for loss in losses:
        whole = plane(model, loss, (x, y), steps=3, extent=0.2)
        for data in (parts, DataLoader(TensorDataset(x, y), batch_size=5)):
            torch.testing.assert_close(
                plane(model, loss, data, steps=3, extent=0.2).losses, whole.losses, rtol=1e-12, atol=0
            )


def test_cells_that_are_not_finite_are_masked_with_a_warning():
    data = (torch.zeros(1, 1).double(), torch.zeros(1).double())
    with pytest.warns(RuntimeWarning, match="3 of 9 cells"):
        found = plane(
            Point(),
            lambda out, _: out.log().sum(),
            data,
            directions=(torch.tensor([100.0, 0]), torch.tensor([0, 1.0])),
            steps=3,
        )
    assert found.mask.sum() == 3 and np.isfinite(found.losses[~found.mask]).all()
    with pytest.raises(FloatingPointError, match="own parameters"):
        plane(Point(), lambda out, _: out.sum() * math.nan, data, directions=(torch.ones(2), torch.ones(2)), steps=3)


def test_bad_arguments_say_what_to_do():
    model, data, loss = mlp(), batch(), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"flat direction must be \(83,\)"):
        line(model, loss, data, torch.ones(5))
    with pytest.raises(ValueError, match="NaN"):
        line(model, loss, data, torch.full((83,), math.nan))
    with pytest.raises(ValueError, match="pair"):
        plane(model, loss, data, directions=torch.ones(83))
    with pytest.raises(ValueError, match="filter, layer, global, none"):
        plane(model, loss, data, normalise="filters")
    with pytest.raises(ValueError, match="steps"):
        plane(model, loss, data, steps=1)
    with pytest.raises(ValueError, match="extent"):
        plane(model, loss, data, extent=-1.0)
    with pytest.raises(ValueError, match="global"):
        plane(Point(), loss, data)
    with pytest.raises(StateError, match="dropout"):
        plane(nn.Sequential(model, nn.Dropout(0.5)), loss, data)
    frozen = mlp().requires_grad_(False)
    with pytest.raises(ValueError, match="requires grad"):
        plane(frozen, loss, data)


def test_frozen_tied_and_saved(tmp_path):
    model, data = mlp(), batch()
    model[0].requires_grad_(False)
    found = plane(model, nn.CrossEntropyLoss(), data, steps=3, progress=lambda cells: cells)
    assert found.d1.numel() == 27
    assert plane(mlp(), nn.CrossEntropyLoss(), data, params=["2.weight"], steps=3).d1.numel() == 24
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    tied[2].weight = tied[0].weight
    x, y = torch.randn(5, 4).double(), torch.randint(0, 4, (5,))
    names = [name for name, _ in tied.named_parameters()]
    d = {name: torch.zeros_like(p) for name, p in tied.named_parameters()}
    d["0.weight"] += 0.1
    moved = copy.deepcopy(tied)
    with torch.no_grad():
        moved[0].weight += 0.1
        truth = float(nn.functional.cross_entropy(moved(x), y))
    assert names == ["0.weight", "0.bias", "2.bias"]
    assert line(tied, nn.CrossEntropyLoss(), (x, y), d, steps=3).losses[-1] == pytest.approx(truth, rel=1e-12)
    found.save(tmp_path / "plane.npz")
    with np.load(tmp_path / "plane.npz") as stored:
        np.testing.assert_array_equal(stored["losses"], found.losses)
        assert str(stored["normalise"]) == "filter" and int(stored["seed"]) == 0
