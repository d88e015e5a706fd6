"""Natural-gradient steps against the dense damped solve, and what the preconditioner does to their iterations."""

import pytest
import torch
import torch.nn.functional as F
from truths import call, dense_ggn, flat_grad, parameters, relative
from zoo import LOSSES, make, unequal

import hvpfast as hf

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", ["mlp", "cnn, groups and dilation", "attention", "recurrent", "tied", "keywords"])
@pytest.mark.parametrize("loss", ["cross entropy", "all options", "mse", "custom"])
def test_the_step_is_the_dense_solve(name, loss):
    case = make(name)
    function, target = (make_one(case.classes) for make_one in (LOSSES[loss][0], lambda c: LOSSES[loss][1](6, c)))
    data = unequal(case.inputs, target) if loss != "custom" else (case.inputs, target)
    found = hf.optim.natural_gradient(case.model, function, data, damping=0.05, tol=1e-10)
    slope = flat_grad(function(call(case.model, case.inputs), target), parameters(case.model))
    matrix = dense_ggn(case.model, function, case.inputs, target)
    wanted = torch.linalg.solve(matrix + 0.05 * torch.eye(len(slope)), slope)
    assert found.solution.converged
    for got, truth in ((found.step, wanted), (found.gradient, slope)):
        assert list(got) == [n for n, p in case.model.named_parameters() if p.requires_grad]
        assert relative(torch.cat([part.reshape(-1) for part in got.values()]), truth) < 1e-8
    assert all(p.grad is None for p in case.model.parameters())


def test_kfac_saves_iterations():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 10))
    x, y = torch.randn(200, 20) @ torch.diag(torch.logspace(-1, 1.5, 20)), torch.randint(0, 10, (200,))
    options = {"damping": 1e-3, "tol": 1e-6}
    with_kfac = hf.optim.natural_gradient(model, F.cross_entropy, (x, y), fisher_type="type-2", **options)
    ready = hf.KFAC(model, F.cross_entropy, (x, y), fisher_type="type-2")
    given = hf.optim.natural_gradient(model, F.cross_entropy, (x, y), preconditioner=ready, **options)
    without = hf.optim.natural_gradient(model, F.cross_entropy, (x, y), preconditioner=hf.Identity(ready), **options)
    assert with_kfac.solution.iterations == given.solution.iterations
    assert with_kfac.solution.iterations < 0.6 * without.solution.iterations
    assert relative(with_kfac.solution.x, without.solution.x) < 1e-3


def test_a_step_lowers_the_loss_of_least_squares_to_its_minimum():
    """One layer, squared error: with little damping one step is the solution of the normal equations."""
    layer, x = torch.nn.Linear(5, 3), torch.randn(40, 5)
    y = torch.randn(40, 3)
    found = hf.optim.natural_gradient(layer, torch.nn.MSELoss(), (x, y), damping=1e-10, tol=1e-12)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p -= found.step[name]
    design = torch.cat([x, torch.ones(40, 1)], 1)
    best = torch.linalg.lstsq(design, y).solution
    assert relative(torch.cat([layer.weight, layer.bias[:, None]], 1).T, best) < 1e-7


def test_bad_input():
    case = make("mlp")
    y = torch.arange(6) % 3
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="natural_gradient: damping is"):
            hf.optim.natural_gradient(case.model, F.cross_entropy, (case.inputs, y), damping=damping)
    broken = case.inputs.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(hf.NonFiniteError, match="input holds NaN"):
        hf.optim.natural_gradient(case.model, F.cross_entropy, (broken, y), damping=0.1)
