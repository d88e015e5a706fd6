"""The preconditioned gradient: against hf.KFAC, against dense solves, and in every way that a batch can come in."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from truths import call, flat_grad, parameters, relative, take
from zoo import MODELS, make

import hvpfast as hf

TOLERANCE = 1e-10
DAMPING = 0.03
KFACPreconditioner = functools.partial(hf.optim.KFACPreconditioner, tolerance=0.0)  # exact: every direction
# What no rule covers, or a rule leaves out in training: plain gradients.
PLAIN = {
    "tied": {"first.weight"},
    "recurrent": {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"},
    "keywords": {"right.weight", "right.bias"},
    "tuple": {"right.weight", "right.bias"},
    "low rank": {"down", "up", "scale", "head.weight", "head.bias"},
    "batchnorm in eval": {"1.weight", "1.bias"},
}


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def training(case):
    """The case's model in training mode, its batch norms as they were."""
    case.model.train()
    for module in case.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return case.model, case.inputs, torch.arange(6) % case.classes


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, inputs, target, loss=F.cross_entropy):
    model.zero_grad()
    loss(call(model, inputs), target).backward()
    return grads(model)


def quiet(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("method", ["eigen", "inverse", "newton-schulz"])
@pytest.mark.parametrize("name", MODELS)
def test_the_step_is_the_inverse_of_kfac(name, method, approx):
    """Tied weights, groups, dilation, embeddings, norms, attention, modules called twice: all as the operator has them."""
    model, inputs, target = training(make(name))
    options = {"kl_clip": None, "damping": DAMPING, "compute_method": method, "kfac_approx": approx}
    preconditioner = KFACPreconditioner(model, **options)
    plain = backward(model, inputs, target)
    quiet(preconditioner.step)
    operator = quiet(
        lambda: hf.KFAC(model, F.cross_entropy, (inputs, target), fisher_type="empirical", kfac_approx=approx)
    )
    wanted = quiet(operator.inverse, DAMPING, "exact" if method == "eigen" else "pi") @ plain
    for key, grad in grads(model).items():
        if key in PLAIN.get(name, ()):
            assert torch.equal(grad, plain[key])
        else:
            assert relative(grad, wanted[key]) < TOLERANCE, key


def deep_linear():
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 2))


def dense_solve(model, columns, gradient):
    """(sum over columns of their outer products, one block a module, + damping)^-1 gradient, by name."""
    result = {}
    for prefix in {name.rpartition(".")[0] for name in gradient}:
        names = [name for name in gradient if name.rpartition(".")[0] == prefix]
        rows = torch.stack([torch.cat([column[name].reshape(-1) for name in names]) for column in columns])
        flat = torch.cat([gradient[name].reshape(-1) for name in names])
        solved = torch.linalg.solve(rows.T @ rows + DAMPING * torch.eye(len(flat)), flat)
        parts = solved.split([gradient[name].numel() for name in names])
        result.update({n: part.view_as(gradient[n]) for n, part in zip(names, parts, strict=True)})
    return result


def test_one_sample_is_the_dense_solve():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x, y = torch.randn(1, 4), torch.tensor([1])
    preconditioner = KFACPreconditioner(model, kl_clip=None, damping=DAMPING)
    plain = backward(model, x, y)
    wanted = dense_solve(model, [plain], plain)
    preconditioner.step()
    assert all(relative(grad, wanted[name]) < TOLERANCE for name, grad in grads(model).items())


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_drawn_targets_are_the_dense_solve(loss):
    """mc, one sample: the blocks are J'u u'J for the draw u, made without a gradient of a weight."""
    model, x = deep_linear(), torch.randn(1, 4)
    y = torch.randn(1, 2) if isinstance(loss, nn.MSELoss) else torch.tensor([1])
    preconditioner = KFACPreconditioner(model, kl_clip=None, damping=DAMPING, fisher_type="mc", loss_fn=loss, seed=3)
    drawn = hf.capture.torch_losses.as_loss(loss, "test")
    drawn.settle(model(x).detach(), y)
    u = drawn.draw(model(x).detach(), y, 1, torch.Generator().manual_seed(3))[0]
    column = dict(zip(dict(model.named_parameters()), _pulled(model, x, u), strict=True))
    output = model(x)
    preconditioner.sample(output, y)
    assert all(p.grad is None for p in model.parameters())
    loss(output, y).backward()
    plain = grads(model)
    preconditioner.step()
    wanted = dense_solve(model, [column], plain)
    assert all(relative(grad, wanted[name]) < TOLERANCE for name, grad in grads(model).items())


def _pulled(model, x, u):
    params = parameters(model)
    flat = flat_grad((model(x) * u).sum(), params)
    return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]


def test_drawn_factors_converge_to_the_ggn():
    """Deep linear, squared error: with the average over many draws, (G + damping)^-1 gradient, G the exact GGN's blocks."""
    model, x, y, loss = deep_linear(), torch.randn(9, 4), torch.randn(9, 2), nn.MSELoss()
    steps = 3000
    preconditioner = KFACPreconditioner(
        model, kl_clip=None, damping=DAMPING, fisher_type="mc", loss_fn=loss, inv_update_steps=steps,
        factor_decay=lambda step: step / (step + 1),
    )  # fmt: skip
    for _ in range(steps + 1):
        output = model(x)
        preconditioner.sample(output, y)
        model.zero_grad()
        loss(output, y).backward()
        plain = grads(model)
        preconditioner.step()
    wanted = hf.KFAC(model, loss, (x, y), fisher_type="type-2").inverse(DAMPING) @ plain
    assert all(relative(grad, wanted[name]) < 0.05 for name, grad in grads(model).items())


@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
@pytest.mark.parametrize("name", ["cnn, groups and dilation", "attention", "called twice"])
def test_micro_batches_add_up(name, fisher_type):
    """Three passes, the loss of each divided by three, are one batch. (mc: one class, whose draw is certain.)"""
    model, inputs, target = training(make(name))
    options = {"kl_clip": None, "damping": DAMPING, "fisher_type": fisher_type}
    loss = _certain if fisher_type == "mc" else F.cross_entropy
    whole = KFACPreconditioner(model, **options, loss_fn=_Certain() if fisher_type == "mc" else None)
    _take_step(whole, model, inputs, target, loss)
    wanted = grads(model)
    whole.close()
    parts = KFACPreconditioner(
        model, **options, loss_fn=_Certain() if fisher_type == "mc" else None, accumulation_steps=3
    )
    model.zero_grad()
    for start in (0, 2, 4):
        cut = slice(start, start + 2)
        output = call(model, take(inputs, cut))
        if fisher_type == "mc":
            parts.sample(output, target[cut])
        (loss(output, target[cut]) / 3).backward()
    parts.step()
    assert all(relative(grad, wanted[key]) < TOLERANCE for key, grad in grads(model).items())


def _take_step(preconditioner, model, inputs, target, loss):
    model.zero_grad()
    output = call(model, inputs)
    if preconditioner.fisher_type == "mc":
        preconditioner.sample(output, target)
    loss(output, target).backward()
    preconditioner.step()


def _certain(output, target):
    return (output[:, 0] - target).square().mean()


class _Certain(hf.capture.losses.Loss):
    """A squared error whose pseudo-gradients do not depend on a random number."""

    def __init__(self):
        super().__init__(_certain, "mean")

    def draw(self, output, target, k, generator):
        u = torch.zeros(k, *output.shape)
        u[:, :, 0] = (2 / output.shape[0]) ** 0.5
        return u


def test_a_sum_has_the_scale_of_its_own_operator():
    model, inputs, target = training(make("cnn, groups and dilation"))
    preconditioner = KFACPreconditioner(model, kl_clip=None, damping=DAMPING, reduction="sum")
    loss = nn.CrossEntropyLoss(reduction="sum")
    plain = backward(model, inputs, target, loss)
    preconditioner.step()
    wanted = hf.KFAC(model, loss, (inputs, target), fisher_type="empirical").inverse(DAMPING) @ plain
    assert all(relative(grad, wanted[name]) < TOLERANCE for name, grad in grads(model).items())


def test_positions_of_the_output_are_terms():
    """Logits (N, T, C) under a mean over N T terms, against the same rows as N T samples; and (N, C, T) of a convolution."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(4, 6, 4), torch.randint(0, 3, (4, 6))
    first = KFACPreconditioner(net, kl_clip=None, damping=DAMPING)
    backward(net, x, y, lambda f, t: F.cross_entropy(f.flatten(0, 1), t.flatten()))
    first.step()
    together = grads(net)
    first.close()
    second = KFACPreconditioner(net, kl_clip=None, damping=DAMPING)
    backward(net, x.flatten(0, 1), y.flatten())
    second.step()
    assert all(relative(grad, together[name]) < TOLERANCE for name, grad in grads(net).items())
    conv = nn.Sequential(nn.Conv1d(4, 5, 1), nn.Tanh(), nn.Conv1d(5, 3, 1))
    conv.load_state_dict(
        {name: p.detach().unsqueeze(-1) if p.dim() == 2 else p for name, p in net.state_dict().items()}
    )
    third = KFACPreconditioner(conv, kl_clip=None, damping=DAMPING)
    backward(conv, x.mT, y)
    third.step()
    for name, grad in grads(conv).items():
        assert relative(grad.view_as(together[name]), together[name]) < TOLERANCE


def test_the_running_average_in_closed_form():
    """First factor as it is, then d F + (1 - d) new; what the step uses are these."""
    model, decay = nn.Linear(4, 3), 0.7
    preconditioner = KFACPreconditioner(model, kl_clip=None, damping=DAMPING, factor_decay=decay)
    batches = [(torch.randn(5, 4), torch.randint(0, 3, (5,))) for _ in range(4)]
    factors = [
        hf.KFAC(model, F.cross_entropy, batch, fisher_type="empirical").factors["weight, bias"] for batch in batches
    ]
    for x, y in batches:
        plain = backward(model, x, y)
        preconditioner.step()
    weights = [decay**3] + [(1 - decay) * decay**k for k in (2, 1, 0)]
    a, g = (sum(w * f[side] for w, f in zip(weights, factors, strict=True)) for side in (0, 1))
    v = torch.cat([plain["weight"], plain["bias"][:, None]], 1)
    solved = torch.linalg.solve(torch.kron(g, a) + DAMPING * torch.eye(15), v.reshape(-1)).view(3, 5)
    assert relative(torch.cat([model.weight.grad, model.bias.grad[:, None]], 1), solved) < TOLERANCE


@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
def test_the_scale_of_mixed_precision_cancels(fisher_type):
    case, loss = make("cnn, groups and dilation"), nn.CrossEntropyLoss()
    results = []
    for scale in (1.0, 1024.0):
        model, inputs, target = training(copy.deepcopy(case))
        preconditioner = KFACPreconditioner(
            model, damping=DAMPING, grad_scaler=lambda scale=scale: scale, fisher_type=fisher_type,
            loss_fn=loss if fisher_type == "mc" else None,
        )  # fmt: skip
        output = model(inputs)
        if fisher_type == "mc":
            preconditioner.sample(output, target)
        (loss(output, target) * scale).backward()
        for p in model.parameters():
            p.grad.div_(scale)
        preconditioner.step()
        results.append(grads(model))
    assert all(relative(results[1][name], grad) < TOLERANCE for name, grad in results[0].items())


def test_kl_clip_in_closed_form():
    """nu = min(1, sqrt(kl_clip / (lr^2 |sum V . P V|))), one for all layers."""
    model, inputs, target = training(make("cnn, groups and dilation"))
    free = KFACPreconditioner(model, kl_clip=None, damping=DAMPING)
    plain = backward(model, inputs, target)
    free.step()
    unclipped = grads(model)
    free.close()
    total = sum((unclipped[name] * plain[name]).sum() for name in plain)
    for clip, lr in ((1e-3, 0.1), (1e-6, 0.5), (10.0, 0.1)):
        clipped = KFACPreconditioner(model, kl_clip=clip, lr=lr, damping=DAMPING)
        backward(model, inputs, target)
        clipped.step()
        clipped.close()
        nu = min(1.0, float(clip / (lr**2 * total.abs())) ** 0.5)
        assert clip != 1e-6 or nu < 0.1
        assert all(relative(grad, nu * unclipped[name]) < TOLERANCE for name, grad in grads(model).items())


def test_bfloat16_inverses_are_near():
    torch.set_default_dtype(torch.float32)
    model, x, y = (
        nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)),
        torch.randn(64, 20),
        torch.arange(64) % 5,
    )
    results = []
    for dtype in (None, torch.bfloat16):
        preconditioner = KFACPreconditioner(model, damping=0.1, inv_dtype=dtype, compute_method="inverse")
        backward(model, x, y)
        preconditioner.step()
        results.append(grads(model))
        preconditioner.close()
    for name, grad in results[0].items():
        assert 0 < relative(results[1][name], grad) < 0.02


def test_directions_that_the_damping_drowns_change_little():
    """Left out of the products: the step changes by less than a tenth of the tolerance, relative to itself."""
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 5))
    x, y = torch.randn(64, 30) * torch.logspace(0, -3, 30), torch.arange(64) % 5
    steps, sizes = {}, {}
    for tolerance in (0.0, 0.02, 0.2):
        preconditioner = hf.optim.KFACPreconditioner(model, kl_clip=None, damping=DAMPING, tolerance=tolerance)
        backward(model, x, y)
        preconditioner.step()
        steps[tolerance] = torch.cat([grad.reshape(-1) for grad in grads(model).values()])
        sizes[tolerance] = preconditioner.memory_usage()["g_inverses"]
        preconditioner.close()
    for tolerance in (0.02, 0.2):
        assert 0 < relative(steps[tolerance], steps[0.0]) < 0.1 * tolerance
    assert sizes[0.2] < sizes[0.02] < sizes[0.0]


@pytest.mark.parametrize(("rate", "steps"), [(0.1, 5), (0.6, 19)])
def test_a_falling_damping_brings_directions_back(rate, steps):
    """In leaps, and in steps each of which is too small to do so."""
    model, x, y = nn.Linear(30, 5), torch.randn(64, 30) * torch.logspace(0, -3, 30), torch.arange(64) % 5
    falling = hf.optim.KFACPreconditioner(
        model, kl_clip=None, damping=lambda step: rate**step, inv_update_steps=100, factor_update_steps=100
    )
    for _ in range(steps):
        backward(model, x, y)
        falling.step()
    last = grads(model)
    falling.close()
    exact = KFACPreconditioner(model, kl_clip=None, damping=rate ** (steps - 1))
    backward(model, x, y)
    exact.step()
    assert all(relative(last[name], grad) < 0.005 for name, grad in grads(model).items())
