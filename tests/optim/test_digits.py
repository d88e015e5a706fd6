"""Real digits: what K-FAC reaches in 30 full-batch steps, SGD needs 100 for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hvpfast.optim import EKFACPreconditioner, KFACPreconditioner

RATES = (0.1, 0.3, 1.0, 1.5, 2.0, 3.0)  # of SGD with momentum 0.9: the best one counts
LR, DAMPING, CLIP = 0.1, 0.003, 0.01  # of K-FAC, the same for all


@pytest.fixture(scope="module")
def digits():
    found = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


def final_loss(net, data, steps, lr, preconditioner=None):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        output = net(data[0])
        if preconditioner is not None and preconditioner.fisher_type == "mc":
            preconditioner.sample(output, data[1])
        F.cross_entropy(output, data[1]).backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(net(data[0]), data[1]))


@pytest.fixture(scope="module")
def of_sgd(digits):
    """The least loss after 100 steps over all learning rates, by seed."""
    return {seed: min(final_loss(model(seed), digits, 100, lr) for lr in RATES) for seed in (0, 1, 2)}


KINDS = [
    (KFACPreconditioner, {}),
    (KFACPreconditioner, {"compute_method": "inverse", "factor_update_steps": 2, "inv_update_steps": 4}),
    (KFACPreconditioner, {"fisher_type": "mc", "loss_fn": nn.CrossEntropyLoss()}),
    (EKFACPreconditioner, {}),
]


@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=("eigen", "inverse", "mc", "ekfac"))
def test_thirty_steps_reach_what_sgd_reaches_in_a_hundred(digits, of_sgd, kind, options, seed):
    net = model(seed)
    preconditioner = kind(net, damping=DAMPING, lr=LR, kl_clip=CLIP, **options)
    reached = final_loss(net, digits, 30, LR, preconditioner)
    assert reached < of_sgd[seed]
