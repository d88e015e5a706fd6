"""Thresholds: closed forms, and optimisers that converge just below theirs and diverge just above it."""

import math

import pytest
import torch

from hvpfast.dynamics import preconditioner, stability_threshold


def parameter(value=1.0):
    return torch.nn.Parameter(torch.tensor([value], dtype=torch.float64))


CASES = [
    (torch.optim.SGD, {"lr": 0.1}, 20.0, "H"),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 38.0, "H"),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 3.8 / 0.28, "H"),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "dampening": 0.5}, 3.0 / 0.05, "H"),
    (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.5}, 19.5, "H"),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 2.0}, 36.0, "H"),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 1.0}, 3.6 / 0.26 - 1, "H"),
    (torch.optim.Adam, {"lr": 1e-3}, 38e3, "P^-1 H"),
    (torch.optim.Adam, {"lr": 0.01, "betas": (0.5, 0.99), "amsgrad": True}, 600.0, "P^-1 H"),
    (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.0}, 38e3, "P^-1 H"),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.5}, 1.95 * 1.9 / 0.01, "P^-1 H"),
    (torch.optim.RMSprop, {"lr": 0.01}, 200.0, "P^-1 H"),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}, 300.0, "P^-1 H"),
]


@pytest.mark.parametrize(("kind", "options", "value", "matrix"), CASES)
def test_closed_forms(kind, options, value, matrix):
    threshold = stability_threshold(kind([parameter()], **options))
    assert float(threshold) == pytest.approx(value, rel=1e-12)
    assert threshold.matrix == matrix
    assert threshold.formula.endswith(f"= {value:.4g}")  # the printed formula and the number agree
    assert "full batches" in str(threshold)


@pytest.mark.parametrize(("kind", "options"), [(kind, options) for kind, options, _, matrix in CASES if matrix == "H"])
@pytest.mark.parametrize("side", [0.99, 1.01])
def test_a_quadratic_converges_below_and_diverges_above(kind, options, side):
    x = parameter()
    optimizer = kind([x], **options)
    h = side * float(stability_threshold(optimizer))
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * h * x.square().sum()).backward()
        optimizer.step()
        if abs(float(x.detach())) > 1e6:
            break
    assert (abs(float(x.detach())) < 1e-3) if side < 1 else (abs(float(x.detach())) > 1e6)


@pytest.mark.parametrize(("kind", "options"), [(kind, options) for kind, options, _, matrix in CASES if matrix != "H"])
@pytest.mark.parametrize("side", [0.97, 1.03])
def test_adaptive_optimisers_with_their_second_moment_held(kind, options, side):
    """Before each step v is set so that the step brings it to 1: then P = 1, and the eigenvalue is h itself."""
    x = parameter(0.0)
    optimizer = kind([x], **{**options, "eps": 0.0, "amsgrad": False} if kind is not torch.optim.RMSprop else options)
    h = side * float(stability_threshold(optimizer))
    group = optimizer.param_groups[0]
    x.grad = torch.zeros_like(x)
    optimizer.step()  # makes the state
    optimizer.state[x]["step"].fill_(1e6)  # bias corrections are over
    with torch.no_grad():
        x.fill_(1e-3)
    for _ in range(2000):
        g = h * float(x.detach())
        x.grad = torch.full_like(x, g)
        state = optimizer.state[x]
        if kind is torch.optim.RMSprop:
            beta, target, key = group["alpha"], (1 - group["eps"]) ** 2, "square_avg"
        else:
            beta, target, key = group["betas"][1], 1.0, "exp_avg_sq"
        state[key].fill_((target - (1 - beta) * g * g) / beta)
        optimizer.step()
        if not abs(float(x.detach())) < 1e2:
            break
    assert (abs(float(x.detach())) < 1e-6) if side < 1 else (abs(float(x.detach())) > 1e2)


def test_what_has_no_single_threshold_raises():
    x, y = parameter(), parameter()
    with pytest.raises(TypeError, match="Adagrad"):
        stability_threshold(torch.optim.Adagrad([x]))
    with pytest.raises(ValueError, match="maximize"):
        stability_threshold(torch.optim.SGD([x], lr=0.1, maximize=True))
    with pytest.raises(ValueError, match=r"differ in lr \(0.1, 0.2\)"):
        stability_threshold(torch.optim.SGD([{"params": [x]}, {"params": [y], "lr": 0.2}], lr=0.1))
    with pytest.raises(ValueError, match="differ in momentum"):
        stability_threshold(torch.optim.SGD([{"params": [x]}, {"params": [y], "momentum": 0.2}], lr=0.1))
    decays = torch.optim.SGD([{"params": [x]}, {"params": [y], "weight_decay": 0.5}], lr=0.1)
    assert float(stability_threshold(decays)) == pytest.approx(19.5)
    assert math.isinf(float(stability_threshold(torch.optim.SGD([x], lr=0.0))))
    assert float(stability_threshold(torch.optim.SGD([x], lr=torch.tensor(0.1)))) == pytest.approx(20)


def test_minibatch_range_of_the_heavy_ball():
    threshold = stability_threshold(torch.optim.SGD([parameter()], lr=0.1, momentum=0.9))
    assert "between 2 (small batches) and 38 (large)" in threshold.note
    assert threshold.symbol == r"(2+2\beta)/\eta" and threshold.optimiser == "heavy ball"


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_preconditioner_is_what_adam_divides_by(kind):
    torch.manual_seed(0)
    x, y = (torch.nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    optimizer = kind([x, y], lr=0.1, betas=(0.0, 0.9), weight_decay=0.0)
    with pytest.raises(ValueError, match="no step"):
        preconditioner(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        (x.square().sum() + y.exp().sum()).backward()
        before = torch.cat([x, y]).detach().clone()
        optimizer.step()
    moved = before - torch.cat([x, y]).detach()
    torch.testing.assert_close(0.1 * torch.cat([x.grad, y.grad]) / preconditioner(optimizer), moved)
    torch.testing.assert_close(preconditioner(optimizer, [y, x]), preconditioner(optimizer).roll(3))
    with pytest.raises(ValueError, match="not among"):
        preconditioner(optimizer, [parameter()])
    with pytest.raises(TypeError, match="SGD"):
        preconditioner(torch.optim.SGD([x], lr=1))
