"""Softmax cross-entropy's square root and drawn labels, as what they are roots and draws of."""

import pytest
import torch

from hvpfast import ops


def dense(product, shape, classes):
    """(..., C, C) from products with unit vectors, column by column."""
    columns = torch.eye(classes, dtype=torch.float64).reshape(classes, *[1] * (len(shape) - 1), classes)
    return product(columns.expand(classes, *shape)).movedim(0, -1)


@pytest.mark.parametrize("shape", [(1,), (2,), (65,), (3, 1), (3, 7), (2, 3, 10)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_root_times_its_transpose(shape, weighted):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    weight = torch.rand(shape[:-1], generator=generator, dtype=torch.float64) if weighted else None
    v = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    back = ops.softmax_root(logits, v, weight=weight, transpose=True)
    product = ops.softmax_root(logits, back, weight=weight)
    assert (product - ops.softmax_hvp(logits, v, weight=weight)).abs().max() < 1e-14
    root = dense(lambda z: ops.softmax_root(logits, z, weight=weight), shape, shape[-1])
    turned = dense(lambda z: ops.softmax_root(logits, z, weight=weight, transpose=True), shape, shape[-1])
    assert (root.mT - turned).abs().max() < 1e-15
    assert (root.sum(-2)).abs().max() < 1e-14  # adding a constant to all logits changes nothing


@pytest.mark.parametrize("shape", [(4,), (2, 7), (2, 3, 5)])
def test_draws_have_the_hessian_as_second_moment(shape):
    """Over evenly spaced numbers the frequency of a class is its probability to 1 / K."""
    generator = torch.Generator().manual_seed(1)
    logits, k = torch.randn(*shape, generator=generator, dtype=torch.float64), 4000
    weight = torch.rand(shape[:-1], generator=generator, dtype=torch.float64)
    numbers = ((torch.arange(k, dtype=torch.float64) + 0.5) / k).reshape(k, *[1] * (len(shape) - 1))
    u = ops.softmax_sample(logits, numbers.expand(k, *shape[:-1]), weight=weight)
    moment = torch.einsum("k...c,k...d->...cd", u, u) / k
    exact = dense(lambda z: ops.softmax_hvp(logits, z, weight=weight), shape, shape[-1])
    assert (moment - exact).abs().max() < 2 / k
    assert (u.mean(0)).abs().max() < 2 / k


def test_independent_draws_converge_like_the_root_of_their_number():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, generator=generator, dtype=torch.float64)
    exact = dense(lambda z: ops.softmax_hvp(logits, z), (6,), 6)
    for k in (400, 40000):
        u = ops.softmax_sample(logits, torch.rand(k, generator=generator, dtype=torch.float64))
        products = u[:, :, None] * u[:, None, :]
        assert ((products.mean(0) - exact).abs() < 4.5 * products.std(0) / k**0.5).all()


def test_labels_are_those_of_the_numbers_whatever_the_dtype():
    """16-bit logits are numbers too: the same numbers in float64 draw the same labels; and never one without probability."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 3000, generator=generator).bfloat16()
    logits[:, ::2] = -torch.inf
    numbers = torch.rand(20, 50, generator=generator)
    numbers[0] = 0
    labels = [ops.softmax_sample(logits.to(dtype), numbers).argmin(-1) for dtype in (torch.bfloat16, torch.float64)]
    assert torch.equal(*labels) and bool((labels[0] % 2 == 1).all()) and bool((labels[0][0] == 1).all())
    assert torch.equal(ops.softmax_sample(torch.zeros(3, 1), numbers[:, :3]), torch.zeros(20, 3, 1))


def test_a_vocabulary_is_drawn_from_a_few_rows_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(7, 1000, generator=generator)
    numbers = torch.rand(2, 7, generator=generator, dtype=torch.float64)
    whole = ops.softmax_sample(logits, numbers)
    monkeypatch.setattr("hvpfast.ops.loss._CHUNK", 2500)
    assert torch.equal(ops.softmax_sample(logits, numbers), whole)
