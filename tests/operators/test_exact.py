"""Hessian, GGN and empirical Fisher against dense matrices from plain autograd, float64, to 1e-10."""

import pytest
import torch
from torch import nn
from truths import block_mask, call, dense_ggn, dense_hessian, own_gradients, parameters, relative, take
from zoo import LOSSES, MODELS, make, unequal

import hvpfast as hf

TOLERANCE = 1e-10


def problem(model_name, loss_name):
    case = make(model_name)
    build, targets = LOSSES[loss_name]
    n = 6
    return case.model, build(case.classes), case.inputs, targets(n, case.classes)


def forms(inputs, target):
    return {"one batch": (inputs, target), "unequal batches": unequal(inputs, target)}


def mask_of(operator):
    return block_mask(list(operator.space.names), list(operator.space.sizes))


def shares(loss, output, target):
    """c_n with loss = sum c_n l_n, from the definition of torch's reductions."""
    n = target.shape[0]
    if getattr(loss, "reduction", "mean") == "sum" or loss is LOSSES["smooth l1, lambda"][0](3):
        return torch.ones(n, dtype=torch.float64)
    if isinstance(loss, nn.CrossEntropyLoss) and not target.dtype.is_floating_point:
        weight = torch.ones(output.shape[1], dtype=torch.float64) if loss.weight is None else loss.weight
        d = torch.where(target == loss.ignore_index, 0.0, weight[target.clamp(min=0)])
        return d / d.sum()
    return torch.full((n,), 1 / n, dtype=torch.float64)


PAIRS = [(model, "cross entropy") for model in MODELS] + [("mlp", loss) for loss in LOSSES if loss != "cross entropy"]
PAIRS += [("cnn, groups and dilation", "all options"), ("attention", "mse"), ("tied", "all options, sum")]


@pytest.mark.parametrize(("model_name", "loss_name"), PAIRS)
def test_hessian(model_name, loss_name):
    model, loss, inputs, target = problem(model_name, loss_name)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = dense_hessian(loss(call(model, inputs), target), parameters(model))
    for form, data in forms(inputs, target).items():
        assert relative(hf.Hessian(model, loss, data).to_dense(), truth) < TOLERANCE, form


@pytest.mark.parametrize(("model_name", "loss_name"), PAIRS)
def test_ggn(model_name, loss_name):
    model, loss, inputs, target = problem(model_name, loss_name)
    truth = dense_ggn(model, loss, inputs, target)
    for form, data in forms(inputs, target).items():
        full, blocks = hf.GGN(model, loss, data), hf.GGN(model, loss, data, blocks=True)
        assert relative(full.to_dense(), truth) < TOLERANCE, form
        assert relative(blocks.to_dense(), truth * mask_of(blocks)) < TOLERANCE, form


@pytest.mark.parametrize(("model_name", "loss_name"), PAIRS)
def test_empirical_fisher(model_name, loss_name):
    model, loss, inputs, target = problem(model_name, loss_name)
    c = shares(loss, call(model, inputs), target)
    g = torch.nan_to_num(own_gradients(model, loss, inputs, target))  # an ignored sample's own mean is 0 / 0
    truth = g.T @ (c[:, None] * g)
    mean = (c @ g) / c.sum()
    centered = truth - c.sum() * torch.outer(mean, mean)
    for form, data in forms(inputs, target).items():
        fisher = hf.EmpiricalFisher(model, loss, data)
        assert relative(fisher.to_dense(), truth) < TOLERANCE, form
        blocks = hf.EmpiricalFisher(model, loss, data, blocks=True)
        assert relative(blocks.to_dense(), truth * mask_of(blocks)) < TOLERANCE, form
        covariance = hf.EmpiricalFisher(model, loss, data, centered=True)
        assert relative(covariance.to_dense(), centered) < TOLERANCE, form
        both = hf.EmpiricalFisher(model, loss, data, centered=True, blocks=True)
        assert relative(both.to_dense(), centered * mask_of(both)) < TOLERANCE, form


@pytest.mark.parametrize("loss_name", ["all options", "mse", "bce, weighted, sum", "custom"])
def test_monte_carlo_ggn_converges_to_the_exact_one(loss_name):
    """The error of k draws falls like 1 / sqrt(k), and the draw is one fixed matrix."""
    model, loss, inputs, target = problem("mlp", loss_name)
    truth = dense_ggn(model, loss, inputs, target)
    errors = [
        sum(relative(hf.GGN(model, loss, (inputs, target), mc_samples=k, seed=s).to_dense(), truth) for s in range(4))
        / 4
        for k in (40, 4000)
    ]
    assert errors[1] < 0.05
    assert 4 < errors[0] / errors[1] < 25  # 10 expected
    fixed = hf.GGN(model, loss, (inputs, target), mc_samples=3, seed=5)
    again = hf.GGN(model, loss, (inputs, target), mc_samples=3, seed=5).to_dense()
    assert torch.equal(fixed.to_dense(), again)
    blocks = hf.GGN(model, loss, (inputs, target), mc_samples=3, seed=5, blocks=True)
    assert relative(blocks.to_dense(), again * mask_of(blocks)) < TOLERANCE


def test_batches_with_ignored_targets():
    """A mean over valid targets, whatever batch they are in; a batch without any adds nothing."""
    case = make("mlp")
    target = torch.tensor([1, -100, 2, -100, 0, 1])
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    truth = dense_hessian(loss(case.model(case.inputs), target), parameters(case.model))
    batches = [(take(case.inputs, cut), target[cut]) for cut in (slice(0, 1), slice(1, 2), slice(2, 6))]
    assert relative(hf.Hessian(case.model, loss, batches).to_dense(), truth) < TOLERANCE
    with pytest.raises(hf.NonFiniteError, match="every target of every batch is ignored"):
        hf.Hessian(case.model, loss, batches[1:2]).to_dense()


def test_sequences_and_images_of_labels():
    """Cross-entropy over positions, (N, C, d...): the mean is over valid positions, a sample is a row of the batch."""
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 2).double()
    inputs, target = torch.randn(5, 2, 4, dtype=torch.float64), torch.randint(0, 3, (5, 3))
    target[0, 1] = target[2, 0] = -100
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), label_smoothing=0.05)
    assert (
        relative(hf.GGN(model, loss, unequal(inputs, target)).to_dense(), dense_ggn(model, loss, inputs, target))
        < TOLERANCE
    )
    d = torch.where(target == -100, 0.0, loss.weight[target.clamp(min=0)]).sum(1)
    g = own_gradients(model, loss, inputs, target)
    truth = g.T @ ((d / d.sum())[:, None] * g)
    assert relative(hf.EmpiricalFisher(model, loss, unequal(inputs, target)).to_dense(), truth) < TOLERANCE


def test_batchnorm_in_train_mode_has_a_hessian():
    """One batch normalised by its own statistics: exact, and the running statistics are put back."""
    case = make("batchnorm in eval")
    case.model.train()
    target = torch.arange(6) % 3
    before = {name: b.clone() for name, b in case.model.named_buffers()}
    got = hf.Hessian(case.model, nn.CrossEntropyLoss(), (case.inputs, target)).to_dense()
    assert all(torch.equal(before[name], b) for name, b in case.model.named_buffers())
    truth = dense_hessian(nn.CrossEntropyLoss()(case.model(case.inputs), target), parameters(case.model))
    assert relative(got, truth) < TOLERANCE


def test_deep_linear_network_has_hessian_equal_to_ggn_only_at_zero_residual():
    """H = GGN + residual term: with targets equal to the outputs of a linear network under MSE the two agree."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    exact = model(inputs).detach()
    loss = nn.MSELoss()
    assert (
        relative(hf.Hessian(model, loss, (inputs, exact)).to_dense(), hf.GGN(model, loss, (inputs, exact)).to_dense())
        < 1e-12
    )
    off = exact + 1
    difference = hf.Hessian(model, loss, (inputs, off)).to_dense() - hf.GGN(model, loss, (inputs, off)).to_dense()
    assert difference.norm() > 1e-3


@pytest.mark.parametrize(
    "loss_name", ["all options", "all options, sum", "probabilities", "mse", "bce", "bce, weighted, sum", "custom"]
)
def test_roots_of_the_losses(loss_name):
    """R R' is the loss's Hessian in the output, within each sample."""
    build, targets = LOSSES[loss_name]
    torch.manual_seed(0)
    output, target, loss = torch.randn(6, 4, dtype=torch.float64), targets(6, 4), build(4)
    product = hf.capture.torch_losses.as_loss(loss, "test").root(output, target)
    root = torch.stack([product(z.expand_as(output)) for z in torch.eye(4, dtype=torch.float64)])
    truth = torch.autograd.functional.hessian(lambda f: loss(f, target), output)
    got = torch.einsum("knc,knd->ncd", root, root)
    assert relative(got, truth[torch.arange(6), :, torch.arange(6)]) < 1e-12


COLUMNS = ["all options", "all options, sum", "probabilities", "mse", "bce, weighted, sum"]


@pytest.mark.parametrize("loss_name", COLUMNS)
def test_columns_of_the_losses(loss_name):
    """They make up the Hessian term by term; cross-entropy's are one fewer than its classes."""
    build, targets = LOSSES[loss_name]
    torch.manual_seed(0)
    output, target, loss = torch.randn(6, 4, dtype=torch.float64), targets(6, 4), build(4)
    made = hf.capture.torch_losses.as_loss(loss, "test")
    columns = torch.stack(list(made.columns(output, target, 1)))
    assert len(columns) == made.rank(4) == (4 if loss_name.startswith(("mse", "bce")) else 3)
    truth = torch.autograd.functional.hessian(lambda f: loss(f, target), output)
    got = torch.einsum("knc,knd->ncd", columns, columns)
    assert relative(got, truth[torch.arange(6), :, torch.arange(6)]) < 1e-12


@pytest.mark.parametrize("sure", [30.0, -30.0, 800.0])
def test_columns_where_the_last_class_is_certain_or_impossible(sure):
    """Against w p_i p_j off the diagonal, and their sums on it: autograd's own p - p^2 has cancelled here."""
    torch.manual_seed(0)
    output, target = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4
    output[:, -1] += sure
    made = hf.capture.torch_losses.as_loss(nn.CrossEntropyLoss(), "test")
    columns = torch.stack(list(made.columns(output, target, 1)))
    p = output.softmax(1)
    truth = -p[:, :, None] * p[:, None, :] / 6
    truth.diagonal(dim1=1, dim2=2).zero_().sub_(truth.sum(2))
    assert relative(torch.einsum("knc,knd->ncd", columns, columns), truth) < 1e-12


@pytest.mark.parametrize("loss_name", ["all options", "mse, sum", "bce", "custom"])
def test_blocks_of_a_transformer(loss_name):
    """Captured where rules cover all parameters, by the Jacobian elsewhere: one matrix."""
    model, loss, inputs, target = problem("attention", loss_name)
    truth = dense_ggn(model, loss, inputs, target)
    blocks = hf.GGN(model, loss, unequal(inputs, target), blocks=True)
    assert relative(blocks.to_dense(), truth * mask_of(blocks)) < TOLERANCE
