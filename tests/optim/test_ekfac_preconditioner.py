"""EKFAC in training: against hf.EKFAC, its moments in closed form, and their way from one basis to the next."""

import functools

import pytest
import torch
import torch.nn.functional as F
from runs import batch, net, sgd, train
from torch import nn
from truths import call, own_gradients, relative
from zoo import MODELS, make

import hvpfast as hf
from hvpfast.operators.eigen import Eigen
from hvpfast.optim.ekfac import EKFACLayer

TOLERANCE = 1e-9
DAMPING = 0.03
EKFACPreconditioner = functools.partial(hf.optim.EKFACPreconditioner, tolerance=0.0)  # exact: every direction


pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", MODELS)
def test_the_step_is_the_inverse_of_ekfac(name, approx):
    if (name, approx) == ("attention", "reduce"):
        pytest.skip("six summed rows for twelve outputs: the rest of the basis is anyone's choice")
    case = make(name)
    model, target = case.model.train(), torch.arange(6) % case.classes
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    preconditioner = EKFACPreconditioner(model, kl_clip=None, damping=DAMPING, kfac_approx=approx)
    F.cross_entropy(call(model, case.inputs), target).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    preconditioner.step()
    options = {"fisher_type": "empirical", "kfac_approx": approx}
    operator = hf.EKFAC(model, F.cross_entropy, (case.inputs, target), **options)
    wanted, covered = operator.inverse(DAMPING) @ plain, 0
    for key, grad in plain.items():
        got = dict(model.named_parameters())[key].grad
        if not torch.equal(got, grad):
            covered += 1
            assert relative(got, wanted[key]) < TOLERANCE, key
    assert covered >= 2 or name in ("low rank",)


def test_the_running_moments_in_closed_form():
    """With a basis that stays: d s + (1 - d) mean of the rotated gradients' squares."""
    model, decay = nn.Linear(4, 3), 0.6
    batches = [(torch.randn(5, 4), torch.randint(0, 3, (5,))) for _ in range(3)]
    rows = [own_gradients(model, F.cross_entropy, *one) for one in batches]
    preconditioner = EKFACPreconditioner(model, inv_update_steps=10, factor_decay=decay, kl_clip=None, damping=DAMPING)
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        plain = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
        preconditioner.step()
    kept = preconditioner.state_dict()["layers"]["weight, bias"]
    qa, qg = (eigen["vectors"][0] for eigen in kept["eigen"])
    squares = []
    for some in rows:
        matrices = torch.cat([some[:, :12].view(5, 3, 4), some[:, 12:].view(5, 3, 1)], 2)
        squares.append((qg.T @ matrices @ qa).square().mean(0))
    s = decay**2 * squares[0] + (1 - decay) * (decay * squares[1] + squares[2])
    assert relative(kept["moments"][0][0], s) < TOLERANCE
    wanted = qg @ ((qg.T @ plain @ qa) / (s + DAMPING)) @ qa.T
    assert relative(torch.cat([model.weight.grad, model.bias.grad[:, None]], 1), wanted) < TOLERANCE


def layer_with(moments, g, a):
    layer = EKFACLayer.__new__(EKFACLayer)
    layer.eigen, layer.dtype, layer.inv_dtype = (a, g), torch.float64, torch.float64
    layer.moments = hf.optim.layers.Running([moments], torch.tensor(True))
    return layer


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n))[0][None]


def test_moments_go_over_to_a_new_basis():
    """(R o R) s is the diagonal, in the new basis, of what s was the diagonal of: trace kept, permutations exact."""
    s = torch.rand(1, 3, 4)
    old_g, old_a = Eigen(torch.ones(1, 3), orthogonal(3), 3), Eigen(torch.ones(1, 4), orthogonal(4), 4)
    new_g, new_a = Eigen(torch.ones(1, 3), orthogonal(3), 3), Eigen(torch.ones(1, 4), orthogonal(4), 4)
    layer = layer_with(s.clone(), old_g, old_a)
    layer.set_eigen(new_a, new_g)
    old, new = (torch.kron(g.vectors[0], a.vectors[0]) for g, a in ((old_g, old_a), (new_g, new_a)))
    block = old @ s.reshape(-1).diag() @ old.T
    assert relative(layer.moments.values[0].reshape(-1), (new.T @ block @ new).diagonal()) < TOLERANCE
    order = [2, 0, 1]
    layer = layer_with(s.clone(), old_g, old_a)
    layer.set_eigen(old_a, Eigen(torch.ones(1, 3), -old_g.vectors[:, :, order], 3))
    assert relative(layer.moments.values[0], s[:, order]) < TOLERANCE


def test_micro_batches_and_scale():
    results = []
    for k, scale in ((1, 1.0), (2, 64.0)):
        case = make("cnn, groups and dilation")
        model, target = case.model.train(), torch.arange(6) % case.classes
        preconditioner = EKFACPreconditioner(model, accumulation_steps=k, grad_scaler=lambda scale=scale: scale)
        for part in torch.arange(6).chunk(k):
            (scale / k * F.cross_entropy(model(case.inputs[part]), target[part])).backward()
        for p in model.parameters():
            p.grad.div_(scale)
        preconditioner.step()
        results.append([p.grad for p in model.parameters()])
    assert all(relative(a, b) < TOLERANCE for a, b in zip(*results, strict=True))


def test_it_is_never_further_from_the_fisher_than_kfac_after_many_steps():
    """The moments of turning bases stay those of the data: on one batch again and again they are its own exactly."""
    model = net().double()
    x, y = batch(0)
    x = x.double()
    preconditioner = EKFACPreconditioner(model, inv_update_steps=2, factor_decay=0.5, kl_clip=None)
    for _ in range(5):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters()}
        preconditioner.step()
    wanted = hf.EKFAC(model, F.cross_entropy, (x, y), fisher_type="empirical").inverse(0.001) @ plain
    for name, p in model.named_parameters():
        assert relative(p.grad, wanted[name]) < 1e-6, name


def test_memory_and_refusals():
    model = net().double()
    preconditioner = EKFACPreconditioner(model)
    train(model, preconditioner, sgd(model), [0])
    assert preconditioner.memory_usage()["moments"] == 8 * (4 * 10 + 3 * 65)
    with pytest.raises(ValueError, match="must be 'eigen'"):
        EKFACPreconditioner(model, compute_method="inverse")
    assert len(model._forward_hooks) == 1
    with pytest.raises(ValueError, match="of a EKFACPreconditioner, not of a KFACPreconditioner"):
        hf.optim.KFACPreconditioner(model).load_state_dict(preconditioner.state_dict())
