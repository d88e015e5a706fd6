"""What `@` takes and returns, the algebra, the ways out, and what is kept between products."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn
from truths import dense_hessian, parameters, relative
from zoo import classes_of, make, unequal

import hvpfast as hf


@pytest.fixture
def hessian():
    case = make("mlp")
    return hf.Hessian(case.model, nn.CrossEntropyLoss(), (case.inputs, classes_of(6, 3)))


def test_every_form_gives_the_same_product(hessian):
    dense = hessian.to_dense()
    v = torch.randn(hessian.shape[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = dense @ v
    assert relative(hessian @ v, expected) < 1e-12
    assert relative(hessian @ v[:, 0], expected[:, 0]) < 1e-12
    assert (hessian @ v).shape == v.shape and (hessian @ v[:, 0]).shape == (hessian.shape[0],)
    names, shapes = hessian.space.names, hessian.space.shapes
    single = {n: p.reshape(s) for n, p, s in zip(names, v[:, 0].split(hessian.space.sizes), shapes, strict=True)}
    columns = {n: p.reshape(*s, 3) for n, p, s in zip(names, v.split(hessian.space.sizes), shapes, strict=True)}
    got = hessian @ single
    assert list(got) == list(names) and all(got[n].shape == s for n, s in zip(names, shapes, strict=True))
    assert relative(torch.cat([got[n].reshape(-1) for n in names]), expected[:, 0]) < 1e-12
    listed = hessian @ list(single.values())
    assert isinstance(listed, list) and all(torch.equal(x, got[n]) for x, n in zip(listed, names, strict=True))
    assert isinstance(hessian @ tuple(single.values()), tuple)
    wide = hessian @ columns
    assert relative(torch.cat([wide[n].reshape(-1, 3) for n in names]), expected) < 1e-12
    shuffled = dict(reversed(list(single.items())))
    assert torch.equal((hessian @ shuffled)[names[0]], got[names[0]])  # dicts go by name
    assert relative(v[:, 0] @ hessian, expected[:, 0]) < 1e-12
    assert relative(v.T @ hessian, expected.T) < 1e-12


def test_algebra(hessian):
    case = make("mlp")
    data = (case.inputs, classes_of(6, 3))
    ggn = hf.GGN(case.model, nn.CrossEntropyLoss(), data)
    # The operators must share their parameters, not only the shapes: build both on one model.
    hessian = hf.Hessian(case.model, nn.CrossEntropyLoss(), data)
    h, g, eye = hessian.to_dense(), ggn.to_dense(), torch.eye(hessian.shape[0], dtype=torch.float64)
    built = {
        "sum": (hessian + ggn, h + g),
        "difference": (hessian - ggn, h - g),
        "negative": (-hessian, -h),
        "scaled": (2 * hessian * 3 / 4, 1.5 * h),
        "scaled by a tensor": (torch.tensor(2.0) * hessian, 2 * h),
        "damped": (ggn + 0.1 * hf.Identity(ggn), g + 0.1 * eye),
        "product": (hessian @ ggn, h @ g),
        "transposed product": ((hessian @ ggn).T, g @ h),
    }
    for name, (operator, dense) in built.items():
        assert relative(operator.to_dense(), dense) < 1e-12, name
    v = torch.ones(hessian.shape[0], dtype=torch.float64)
    assert relative(v @ (hessian @ ggn), v @ h @ g) < 1e-12
    assert abs(float(hessian.quadratic_form(v) - v @ h @ v)) < 1e-12
    two = torch.stack([v, 2 * v], 1)
    assert torch.allclose(hessian.quadratic_form(two), torch.stack([v @ h @ v, 4 * (v @ h @ v)]))
    other = hf.Hessian(nn.Linear(2, 3).double(), nn.MSELoss(), (torch.ones(1, 2).double(), torch.ones(1, 3).double()))
    with pytest.raises(ValueError, match="different parameters"):
        hessian + other
    with pytest.raises(TypeError):
        hessian * "2"


def test_scipy(hessian):
    exported = hessian.to_scipy()
    dense = hessian.to_dense().numpy()
    v = np.random.default_rng(0).standard_normal((hessian.shape[0], 2))
    assert exported.dtype == np.float64
    np.testing.assert_allclose(exported @ v, dense @ v, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(exported @ v[:, :1], dense @ v[:, :1], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(exported.rmatvec(v[:, 0]), dense @ v[:, 0], rtol=1e-10, atol=1e-12)
    top = scipy.sparse.linalg.eigsh(exported, k=1, which="LA", return_eigenvectors=False)[0]
    assert abs(top - np.linalg.eigvalsh(dense)[-1]) < 1e-8


def test_parameters_may_be_chosen():
    case = make("mlp")
    loss, data = nn.CrossEntropyLoss(), (case.inputs, classes_of(6, 3))
    whole = hf.Hessian(case.model, loss, data).to_dense()
    second = whole[-18:, -18:]  # the last layer's 15 + 3
    weight, bias = case.model[2].weight, case.model[2].bias
    for params in (
        ["2.weight", "2.bias"],
        [weight, bias],
        {"2.weight": weight, "2.bias": bias},
        case.model[2].parameters(),
    ):
        assert relative(hf.Hessian(case.model, loss, data, params=params).to_dense(), second) < 1e-12
    assert relative(hf.Hessian(case.model, loss, data, params="2.bias").to_dense(), whole[-3:, -3:]) < 1e-12
    assert list(hf.Hessian(case.model, loss, data, params=[bias, weight]).params) == ["2.bias", "2.weight"]


@pytest.mark.parametrize("kind", [hf.Hessian, hf.GGN, hf.EmpiricalFisher])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_changes_between_products_are_seen(kind, budget, monkeypatch):
    """Parameters written by an optimiser, or behind autograd's back; data written to; a mode changed."""
    monkeypatch.setattr("hvpfast.operators.curvature.CACHE_BYTES", budget)
    case = make("batchnorm in eval")
    loss, target = nn.CrossEntropyLoss(), classes_of(6, 3)
    operator = kind(case.model, loss, unequal(case.inputs, target))
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    seen = [operator @ v]

    def expect_change():
        got, fresh = operator @ v, kind(case.model, loss, unequal(case.inputs, target)) @ v
        assert relative(got, fresh) < 1e-12
        assert relative(got, seen[-1]) > 1e-9
        seen.append(got)

    assert torch.equal(operator @ v, seen[0])
    with torch.no_grad():
        case.model[0].weight.mul_(1.5)
    expect_change()
    case.model[3].bias.data[1] += 1  # leaves the version counter alone
    expect_change()
    case.model[1].running_mean.add_(0.3)
    expect_change()
    case.inputs.mul_(0.7)
    expect_change()
    operator.release()
    assert torch.equal(operator @ v, seen[-1])


def test_the_forward_pass_is_not_repeated():
    """What is kept between products serves them: one run of the model, however many products."""
    case = make("mlp")
    calls = []
    case.model.register_forward_hook(lambda *_: calls.append(1))
    for kind in (hf.Hessian, hf.GGN, hf.EmpiricalFisher):
        calls.clear()
        operator = kind(case.model, nn.CrossEntropyLoss(), (case.inputs, classes_of(6, 3)))
        assert not calls  # nothing at construction
        for _ in range(3):
            operator @ torch.ones(operator.shape[0], 2, dtype=torch.float64)
        assert len(calls) == 1


def test_dtypes():
    """float32 keeps float32 and its accuracy; bfloat16 parameters give bfloat16 or, for float32 vectors, float32 products."""
    case = make("mlp")
    truth = dense_hessian(nn.CrossEntropyLoss()(case.model(case.inputs), classes_of(6, 3)), parameters(case.model))
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        model = make("mlp").model.to(dtype)
        operator = hf.Hessian(model, nn.CrossEntropyLoss(), (case.inputs.to(dtype), classes_of(6, 3)))
        v = torch.eye(operator.shape[0], dtype=torch.float32)
        assert operator.dtype == dtype
        product = operator @ v
        assert product.dtype == torch.float32
        assert relative(product.double(), truth) < bound
        assert (operator @ v[:, 0].to(dtype)).dtype == dtype


def test_empty_selection_of_columns(hessian):
    assert (hessian @ torch.zeros(hessian.shape[0], 0, dtype=torch.float64)).shape == (hessian.shape[0], 0)


def test_a_compiled_model_is_taken_as_the_module_behind_it():
    """Compiled graphs have no second derivative; the module has, and the same parameters."""
    case = make("mlp")
    data = (case.inputs, classes_of(6, 3))
    plain = hf.Hessian(case.model, nn.CrossEntropyLoss(), data)
    compiled = hf.Hessian(torch.compile(case.model, backend="eager"), nn.CrossEntropyLoss(), data)
    assert compiled.space.names == plain.space.names
    assert torch.equal(compiled.to_dense(), plain.to_dense())
    with pytest.raises(TypeError, match="the model is compiled"):
        hf.record(torch.compile(case.model, backend="eager"))
