"""Passes that do not count, and bad input: each a clear error or a documented safe path."""

import copy

import pytest
import torch
import torch.nn.functional as F
from runs import batch, net, sgd, train
from torch import nn
from truths import relative

import hvpfast as hf
from hvpfast.capture.errors import StateError
from hvpfast.operators import eigen
from hvpfast.operators.factor import Dense
from hvpfast.optim import KFACPreconditioner, inverses

# What does not count, and what goes wrong -------------------------------------------------------------------------------


def test_only_training_passes_count():
    """Passes in eval mode, without grad, without a backward pass, and batches that were reset leave nothing."""
    results = []
    for disturbed in (True, False):
        model = net()
        preconditioner = KFACPreconditioner(model)
        if disturbed:
            with torch.no_grad():
                model(batch(5)[0])
            model.eval()
            model(batch(6)[0]).sum().backward()
            model.train()
            model(batch(7)[0])
            model(batch(8)[0]).sum().backward()
            preconditioner.reset_batch()
            with pytest.raises(RuntimeError):
                model(torch.randn(2, 2))
            assert len(model[0]._forward_hooks) == 0 or model(batch(0)[0]) is not None
        train(model, preconditioner, sgd(model), range(2))
        assert all(len(m._forward_hooks) == 0 for m in model)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_masks_are_part_of_the_factors():
    """Dropped inputs are zero in A: the pass is the user's own, and so is the random state."""
    model = net(dropout=0.5)
    preconditioner = KFACPreconditioner(model)
    inputs = []
    handle = model[5].register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    train(model, preconditioner, sgd(model), [0])
    handle.remove()
    rows = torch.cat([inputs[0], torch.ones(8, 1)], 1)
    kept = preconditioner.state_dict()["layers"]["5.weight, 5.bias"]["factors"][0][0]
    assert float((inputs[0] == 0).float().mean()) > 0.4
    hf.testing.assert_accurate(kept, lambda x: x.T @ x / 8, rows)


def test_batch_norm_keeps_its_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    preconditioner = KFACPreconditioner(model)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    preconditioner.step()
    same = {name for name, p in model.named_parameters() if torch.equal(p.grad, plain[name])}
    assert same == {"1.weight", "1.bias"}


class Branches(nn.Module):
    """Layers that run only where `way` says so."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.way = nn.Linear(4, 3), nn.Linear(4, 3), "left"

    def forward(self, x):
        return getattr(self, self.way)(x)


def test_layers_that_did_not_run():
    model, x, y = Branches(), torch.randn(6, 4), torch.arange(6) % 3
    preconditioner = KFACPreconditioner(model, kl_clip=None, factor_update_steps=1, inv_update_steps=3, damping=0.1)
    for way in ("left", "right", "left"):
        model.way = way
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        preconditioner.step()
        assert {name.split(".")[0] for name in plain} == {way}
        wanted = (
            hf.KFAC(
                model, F.cross_entropy, (x, y), fisher_type="empirical", params=[f"{way}.weight", f"{way}.bias"]
            ).inverse(0.1)
            @ plain
        )
        for name, grad in wanted.items():  # `right` got its inverse when it first ran, between two turns
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, rtol=1e-4, atol=1e-6)
    assert preconditioner.steps == 3


def test_a_changed_model_is_refused():
    model = net()
    preconditioner = KFACPreconditioner(model)
    train(model, preconditioner, sgd(model), [0])
    model[5] = nn.Linear(64, 3)
    F.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
    with pytest.raises(StateError, match="'5.weight' is another tensor"):
        preconditioner.step()
    del model[5]
    with pytest.raises(StateError, match="'5.weight' is gone"):
        preconditioner.step()


def test_parameters_used_in_another_way_are_refused():
    model, x, y = Branches(), torch.randn(6, 4), torch.arange(6) % 3
    preconditioner = KFACPreconditioner(model)
    F.cross_entropy(model(x), y).backward()
    preconditioner.step()
    model.forward = lambda x: model.left(x) + model.right(x)
    model.right.weight = model.left.weight  # now one weight with two biases
    with pytest.raises(StateError):
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()


def test_a_step_without_a_backward_pass_is_refused():
    model = net().eval()
    preconditioner = KFACPreconditioner(model)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    with pytest.raises(StateError, match=r"no backward pass was seen.*model\.train\(\)"):
        preconditioner.step()
    drawn = KFACPreconditioner(net(), fisher_type="mc", loss_fn=nn.CrossEntropyLoss())
    F.cross_entropy(drawn.model(batch(0)[0]), batch(0)[1]).backward()
    with pytest.raises(StateError, match="call preconditioner.sample"):
        drawn.step()
    with pytest.raises(StateError, match="only 'mc' draws"):
        preconditioner.sample(torch.randn(3), None)
    drawn.reset_batch()
    with pytest.raises(StateError, match="no forward pass"):
        drawn.sample(torch.randn(3, 3), torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["eigen", "inverse"])
def test_singular_factors_and_a_batch_of_one(method, dtype):
    """One sample, a dead unit, an input that is zero: everything stays finite, and is the damped solve."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).to(dtype)
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-100.0, 1.0, 1.0]))
    preconditioner = KFACPreconditioner(model, compute_method=method, damping=1e-6, kl_clip=None)
    F.cross_entropy(model(torch.zeros(1, 4, dtype=dtype)), torch.tensor([1])).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    preconditioner.step()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    dots = [float((p.grad * g).sum()) for p, g in zip(model.parameters(), plain, strict=True)]
    assert min(dots) >= 0 and dots[-1] > 0
    if method == "eigen" and dtype is torch.float64:  # the last layer's block is g g' (x) a a' with a' = (0, 1, 1, 1)
        g = plain[3]
        assert relative(model[2].bias.grad, g / (3 * g.square().sum() + 1e-6)) < 1e-8


def test_a_gradient_with_nan_stays_as_it_is():
    """The layer's plain gradient is kept, the others are preconditioned, the factors stay; and it is said so."""
    model = net()
    preconditioner = KFACPreconditioner(model, inv_update_steps=2, kl_clip=None)
    optimizer = sgd(model)
    train(model, preconditioner, optimizer, [0])
    factors = copy.deepcopy(preconditioner.state_dict()["layers"])
    x, y = batch(1)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model[5].weight.grad[0, 0] = float("nan")
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    preconditioner.step()
    same = {n for n, p in model.named_parameters() if torch.equal(p.grad.nan_to_num(9), plain[n].nan_to_num(9))}
    assert same == {"5.weight", "5.bias"}
    assert all(torch.isfinite(p.grad).all() for n, p in model.named_parameters() if n != "5.weight")
    model.zero_grad()
    before = copy.deepcopy(preconditioner.state_dict()["layers"])
    assert not torch.equal(before["0.weight, 0.bias"]["factors"][0], factors["0.weight, 0.bias"]["factors"][0])
    (F.cross_entropy(model(x), y) * float("inf")).backward()
    with pytest.warns(RuntimeWarning, match="factors of a layer left as they were 3 times.*kept 2 times|kept 1 times"):
        preconditioner.step()
    after = preconditioner.state_dict()["layers"]
    for key, kept in before.items():
        assert all(torch.equal(a, b) for a, b in zip(kept["factors"], after[key]["factors"], strict=True))


def test_a_first_batch_with_nan_is_no_factor():
    model = net()
    preconditioner = KFACPreconditioner(model)
    (F.cross_entropy(model(batch(0)[0]), batch(0)[1]) * float("nan")).backward()
    with pytest.warns(RuntimeWarning, match="left as they were 3 times"):
        preconditioner.step()
    model.zero_grad()
    fresh = KFACPreconditioner(model)
    F.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    preconditioner.step()
    mine = [p.grad.clone() for p in model.parameters()]
    for p, g in zip(model.parameters(), plain, strict=True):
        p.grad.copy_(g)
    fresh.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), mine, strict=True))


def test_a_decomposition_that_fails_keeps_the_last(monkeypatch):
    model = net()
    preconditioner = KFACPreconditioner(model, tolerance=0.0, kl_clip=None)
    train(model, preconditioner, sgd(model), [0])
    real = inverses.eigendecompose

    def failing(factors, **options):
        if any(factor.size == 65 for factor in factors):
            raise ValueError("LAPACK gave up")
        return real(factors, **options)

    monkeypatch.setattr(inverses, "eigendecompose", failing)
    before = preconditioner.state_dict()["layers"]
    with pytest.warns(RuntimeWarning, match="'5' keeps its last inverse: LAPACK gave up"):
        train(model, preconditioner, sgd(model), [1])
    after = preconditioner.state_dict()["layers"]
    vectors = {
        key: (before[key]["eigen"][0]["vectors"], after[key]["eigen"][0]["vectors"])
        for key in before
        if "eigen" in before[key]
    }
    assert torch.equal(*vectors["5.weight, 5.bias"]) and not torch.equal(*vectors["0.weight, 0.bias"])
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    "dtype, condition", [(torch.float32, 1e2), (torch.float32, 1e6), (torch.float64, 1e2), (torch.float64, 1e9)]
)
def test_inverses_by_products_are_checked(monkeypatch, dtype, condition):
    """Where products do not get there (or end in NaN), Cholesky does: float64's truth, and which factors went there."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(2, 17, 17, dtype=torch.float64))[0]
    values = torch.logspace(0, -12, 17, dtype=torch.float64)
    matrices = (q * values) @ q.mT
    factors = [Dense(x[None].to(dtype)) for x in matrices]
    seen, real = [], inverses.cholesky_inverses

    def watched(some, shifts):
        seen.append(len(some))
        return real(some, shifts)

    monkeypatch.setattr(inverses, "cholesky_inverses", watched)
    d = torch.full((1,), 1 / condition, dtype=dtype)
    found = inverses._by_products(factors, [d] * 2)
    assert seen == [0 if condition == 1e2 else 2]
    z = torch.randn(17, 4, dtype=torch.float64)
    for factor, x in zip(factors, found, strict=True):
        back = (factor.data[0].double() + d.double() * torch.eye(17)) @ (x[0].double() @ z)
        rounding = 17 * torch.finfo(dtype).eps * condition
        assert x.dtype is dtype and float((back - z).norm() / z.norm()) < max(1e-5, 3 * rounding)


def test_earlier_bases_serve_while_they_fit(monkeypatch):
    """The mass that they leave off the diagonal decides: kept on the same data, anew on other data."""
    seen, real = [], inverses.eigendecompose

    def watched(factors, **options):
        found = real(factors, **options)
        seen.append({one.route for one in found})
        return found

    monkeypatch.setattr(inverses, "eigendecompose", watched)
    model = net()
    preconditioner, optimizer = KFACPreconditioner(model, factor_decay=0.0), sgd(model)
    train(model, preconditioner, torch.optim.SGD(model.parameters(), lr=0.0), [0, 0])
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(4, 1, 3, 3))
    train(model, preconditioner, optimizer, [99])
    assert seen[0] == {"eigh"} and seen[1] == {"kept"} and "eigh" in seen[2]
    assert eigen.TOLERANCE <= hf.optim.kfac.TOLERANCE <= 0.1


ARGUMENTS = [
    ({"damping": 0.0}, ValueError, "damping is 0.0; it must be a finite number > 0"),
    ({"damping": "x"}, TypeError, "damping is 'x'"),
    ({"factor_decay": 1.5}, ValueError, r"factor_decay is 1.5; it must be a number in \[0, 1\]"),
    ({"kl_clip": -1}, ValueError, "kl_clip is -1"),
    ({"lr": -0.1}, ValueError, "lr is -0.1"),
    ({"factor_update_steps": 0}, ValueError, "factor_update_steps is 0"),
    ({"inv_update_steps": 1.5}, ValueError, "inv_update_steps is 1.5"),
    ({"accumulation_steps": 0}, ValueError, "accumulation_steps is 0"),
    ({"compute_method": "svd"}, ValueError, "compute_method is 'svd'; it must be one of 'eigen', 'inverse'"),
    ({"fisher_type": "mc"}, ValueError, "needs loss_fn="),
    ({"loss_fn": F.cross_entropy}, ValueError, "must not have one"),
    ({"factor_dtype": torch.float16}, TypeError, "factor_dtype is torch.float16"),
    ({"skip_layers": "conv"}, TypeError, "skip_layers is a string"),
    ({"skip_layers": ["("]}, ValueError, "no regular expression"),
    ({"grad_worker_fraction": 0.5}, TypeError, "'grad_worker_fraction': it divides work over processes"),
    ({"update_factors_in_hook": True}, TypeError, "'update_factors_in_hook': factors are always"),
    ({"colour": 1}, TypeError, "there is no argument 'colour'; see"),
    ({"grad_scaler": 3}, TypeError, "grad_scaler is a int"),
    ({"tolerance": 1}, ValueError, "tolerance is 1"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), ARGUMENTS, ids=[f"{i}-{next(iter(a[0]))}" for i, a in enumerate(ARGUMENTS)]
)
def test_arguments_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        KFACPreconditioner(net(), **options)


def test_a_schedule_out_of_range_says_when():
    model = net()
    preconditioner = KFACPreconditioner(model, damping=lambda step: 0.1 - 0.1 * step)
    train(model, preconditioner, sgd(model), [0])
    with pytest.raises(ValueError, match="damping is 0.0 at step 1"):
        train(model, preconditioner, sgd(model), [1])


def test_models_that_it_cannot_work_in():
    with pytest.raises(TypeError, match="wrapped in DataParallel"):
        KFACPreconditioner(nn.DataParallel(net()))
    with pytest.raises(TypeError, match="compiled"):
        KFACPreconditioner(torch.compile(net()))
    with pytest.raises(TypeError, match="a list"):
        KFACPreconditioner([])


def test_close_takes_the_hooks_off_and_copies_do_not_feed_it():
    model = net()
    preconditioner = KFACPreconditioner(model)
    copied = copy.deepcopy(model)
    F.cross_entropy(copied(batch(0)[0]), batch(0)[1]).backward()
    assert preconditioner.memory_usage()["total"] == 0
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    preconditioner.close()
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 0


def test_the_graph_is_freed():
    """No cycle through autograd's nodes: a pass that was never used goes with its output, and a used one with the step."""
    import gc
    import weakref

    model = net()
    preconditioner = KFACPreconditioner(model)
    gone = []
    real = hf.optim.passes.Pass.__init__

    def noted(self, *arguments):
        real(self, *arguments)
        gone.append(weakref.ref(self))

    hf.optim.passes.Pass.__init__ = noted
    try:
        output = model(batch(0)[0])
        del output
        train(model, preconditioner, sgd(model), [0])
    finally:
        hf.optim.passes.Pass.__init__ = real
    gc.collect()
    assert len(gone) == 2 and all(one() is None for one in gone)


def test_autocast_and_16_bit_models():
    for half in (False, True):
        model = net().bfloat16() if half else net()
        preconditioner = KFACPreconditioner(model, damping=0.1)
        x, y = batch(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=not half):
            F.cross_entropy(model(x.bfloat16() if half else x).float(), y).backward()
            preconditioner.step()
        exact = net()
        reference = KFACPreconditioner(exact, damping=0.1)
        F.cross_entropy(exact(x), y).backward()
        reference.step()
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            assert p.grad.dtype is p.dtype
            assert float((p.grad.float() - q.grad).norm() / q.grad.norm()) < 0.1
