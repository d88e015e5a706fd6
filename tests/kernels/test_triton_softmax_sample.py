"""softmax_sample's Triton kernels, both routes: the labels of the reference, whatever the vocabulary."""

import math

import pytest
import torch
from hvpfast.kernels import softmax_sample as kernel
from on_triton import DEVICE, DTYPES, poisoned, tensor

from hvpfast import ops, testing

ROUTES = [{}, {"narrow": 0}]


def draw(rows, classes, columns, dtype=torch.float32, layout="contiguous", spread=3.0):
    x = testing.laid_out(spread * tensor(rows, classes, dtype=dtype), layout)
    u = torch.rand(columns, rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    return x, testing.laid_out(u, layout), testing.laid_out(tensor(rows, dtype=dtype, seed=2).abs(), layout)


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_every_route(route, dtype, layout):
    for size in ((1, 1, 1), (3, 17, 2), (1, 2500, 3), *(((130, 5, 1), (2, 1024, 2)) if not route else ())):
        x, u, weight = draw(*size, dtype=dtype, layout=layout)
        for factor in (None, weight):
            out = poisoned(*u.shape, x.shape[1])
            kernel.launch(x, u, factor, out, **route)
            testing.assert_accurate(out, ops.softmax_sample, x, u, weight=factor)


def test_a_vocabulary():
    x, u, weight = draw(2, 128 * 1024 + 1, 2, dtype=torch.bfloat16, spread=0.5)
    result = ops.softmax_sample.on("triton")(x, u, weight=weight)
    testing.assert_accurate(result, ops.softmax_sample, x, u, weight=weight)
    assert torch.equal(result, ops.softmax_sample.on("triton")(x, u, weight=weight))
    assert len(set(result.argmin(-1).flatten().tolist())) == 4


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_the_ends_of_the_unit_interval(route):
    """The first and the last class that have any probability, and none that has not."""
    x, _, _ = draw(1, 2600, 1)
    x[0, :3], x[0, -2:] = -math.inf, -math.inf
    u = torch.tensor([[0.0], [1 - 2.0**-53]], dtype=torch.float64, device=DEVICE)
    out = poisoned(2, 1, 2600)
    kernel.launch(x, u, None, out, **route)
    assert out.argmin(-1).flatten().tolist() == [3, 2597]
    testing.assert_accurate(out, ops.softmax_sample, x, u)


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
def test_non_finite_values_as_the_reference_has_them(route, value):
    for where in ("logits", "weight", "row"):
        x, u, weight = draw(3, 2100, 2)
        {"logits": x[1, 7], "weight": weight[1], "row": x[1]}[where].fill_(value)
        out = poisoned(2, 3, 2100)
        kernel.launch(x, u, weight, out, **route)
        torch.testing.assert_close(out, ops.softmax_sample.reference(x, u, weight=weight), equal_nan=True)
    x, u, _ = draw(3, 20, 1, spread=1e30)
    out = poisoned(1, 3, 20)
    kernel.launch(x, u, None, out, **route)
    torch.testing.assert_close(out, ops.softmax_sample.reference(x, u))


def test_leading_axes_and_nothing():
    x, u = tensor(2, 3, 9), torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    testing.assert_accurate(kernel.softmax_sample(x, u), ops.softmax_sample, x, u)
    testing.assert_accurate(kernel.softmax_sample(x[0, 0], u[0, 0, 0]), ops.softmax_sample, x[0, 0], u[0, 0, 0])
    for shape in ((0, 3), (3, 0)):
        assert kernel.softmax_sample(torch.empty(shape), torch.empty(shape[0])).shape == shape
    assert "float64" in kernel.supports(x.double(), u)
