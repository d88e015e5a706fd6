"""Bags of embeddings by plain ops, and sums over equal indices: values, two derivatives, and one order of summing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hvpfast as hf
from hvpfast import ops
from hvpfast.capture.state import _embedding_bag
from hvpfast.ops.shared import summed

ROWS, WIDTH = 7, 3
INDICES = torch.tensor([2, 5, 5, 0, 6, 2, 1, 1, 3, 2, 2])
OFFSETS = torch.tensor([0, 2, 2, 2, 7, 9])  # two empty bags, one of padding alone at the end


def bag_inputs(last: bool):
    torch.manual_seed(0)
    offsets = torch.cat([OFFSETS, torch.tensor([len(INDICES)])]) if last else OFFSETS
    return torch.randn(ROWS, WIDTH, dtype=torch.float64), offsets, torch.rand(len(INDICES), dtype=torch.float64) + 0.5


def by_index_add(weight, factors, offsets, mode, padding):
    """The same bags by indexing and `index_add`, whose order of summing is nobody's."""
    bag = torch.searchsorted(offsets, torch.arange(len(INDICES)), right=True) - 1
    kept = torch.ones(len(INDICES), dtype=weight.dtype) if padding is None else (INDICES != padding).to(weight.dtype)
    rows = weight[INDICES] * (kept if factors is None else kept * factors).unsqueeze(1)
    total = weight.new_zeros(len(offsets), WIDTH).index_add(0, bag, rows)
    if mode == "mean":
        total = total / kept.new_zeros(len(offsets)).index_add(0, bag, kept).clamp(min=1).unsqueeze(1)
    return total


@pytest.mark.parametrize("last", [False, True], ids=["offsets", "last offset too"])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)])
def test_bags_are_those_of_torch(mode, weighted, padding, last):
    """Values and first derivatives are torch's, second ones those of indexing and `index_add`; bags may be empty."""
    weight, offsets, factors = bag_inputs(last)
    weight.requires_grad_()
    leaves = (weight, factors.requires_grad_()) if weighted else (weight,)
    factors = factors if weighted else None
    options = {"mode": mode, "per_sample_weights": factors, "include_last_offset": last, "padding_idx": padding}
    got, theirs = (f(INDICES, weight, offsets, **options) for f in (_embedding_bag, F.embedding_bag))
    torch.testing.assert_close(got, theirs, rtol=0, atol=1e-15)
    slope = torch.randn_like(theirs)
    for mine, truth in zip(
        torch.autograd.grad(got, leaves, slope, retain_graph=True),
        torch.autograd.grad(theirs, leaves, slope),
        strict=True,
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-14, atol=1e-15)
    if mode == "max":
        return
    former = by_index_add(weight, factors, OFFSETS, mode, padding)
    torch.testing.assert_close(got, former, rtol=0, atol=1e-15)
    seconds = []
    for bags in (got, former):
        first = torch.autograd.grad(bags.sin().square().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(x.sin().sum() for x in first), leaves))
    for mine, truth in zip(*seconds, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_long_bags_in_sixteen_bits(mode):
    """More rows than bfloat16 counts, 256 + 1 being 256 there: sums and counts are wider, the result rounded once."""
    torch.manual_seed(0)
    weight = (torch.rand(5, 4) + 0.5).bfloat16()
    indices = torch.randint(0, 5, (2, 600))
    got, truth = (_embedding_bag(indices, x, mode=mode) for x in (weight, weight.double()))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), truth, rtol=2**-8, atol=0)


class Watch(TorchDispatchMode):
    """The names of the functions that ran."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.__name__)
        return function(*args, **(kwargs or {}))


# What adds by atomics on CUDA, or may: the documentation of torch.use_deterministic_algorithms. What runs off the CPU is seen on
# "meta", where nothing is computed; that it gives the same bits on a GPU, only a GPU can say.
ATOMIC = ("index_add", "scatter_add", "scatter_reduce", "put", "bincount", "index_select_backward", "histc", "cumsum")


def atomic(seen):
    return {name for name in seen if name.split(".")[0].strip("_") in ATOMIC}


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_use_no_atomics_off_the_cpu(mode):
    weight = torch.zeros(ROWS, WIDTH, device="meta", requires_grad=True)
    factors = torch.zeros(len(INDICES), device="meta", requires_grad=True) if mode == "sum" else None
    leaves = [weight] if factors is None else [weight, factors]
    with Watch() as watch:
        out = _embedding_bag(
            INDICES.to("meta"), weight, OFFSETS.to("meta"), mode=mode, per_sample_weights=factors, padding_idx=2
        )
        slopes = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        torch.autograd.grad(sum(x.sin().sum() for x in slopes), leaves)
    assert any("index_put" in name for name in watch.seen) and "embedding_dense_backward.default" in watch.seen
    assert atomic(watch.seen) == set()


def test_table_statistics_use_no_atomics_off_the_cpu():
    g, indices = torch.zeros(6, 4, 3, device="meta"), torch.zeros(3, 4, device="meta", dtype=torch.int64)
    with Watch() as watch:
        ops.embedding_sample_norms.reference(g, indices)
        ops.embedding_second_moment.reference(g, indices, 5)
    assert any("index_put" in name for name in watch.seen)
    assert atomic(watch.seen) == {"cumsum.default"}  # of integers


def test_the_sum_off_the_cpu_is_the_same_sum():
    """What `summed` calls there, called here: values, two derivatives, and a batch of them."""
    torch.manual_seed(0)
    rows, index = (
        torch.randn(11, 3, dtype=torch.float64, requires_grad=True),
        torch.tensor([4, 0, 0, 1, 4, 4, 2, 2, 2, 2, 0]),
    )

    def there(x):
        return x.new_zeros(6, 3).index_put((index,), x, accumulate=True)

    assert torch.equal(there(rows), summed(rows, index, 6)) and torch.equal(
        summed(rows, index, 6)[5], torch.zeros(3).double()
    )
    assert torch.autograd.gradgradcheck(lambda x: there(x).sin(), rows) and torch.autograd.gradcheck(there, rows)
    several = torch.randn(4, 11, 3, dtype=torch.float64)
    together = torch.func.vmap(there)(several)
    assert torch.equal(together, torch.stack([summed(x, index, 6) for x in several]))
    assert torch.equal(together, torch.func.vmap(lambda x: summed(x, index, 6))(several))


@pytest.mark.parametrize("kind", [hf.Hessian, hf.GGN])
def test_products_have_the_same_bits_every_time(kind):
    """By two threads, rows looked up often; and those of torch's deterministic algorithms, as far as a CPU has them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 64, mode="mean"), nn.Tanh(), nn.Linear(64, 3))
    data = torch.randint(0, 20, (200, 100)), torch.randint(0, 3, (200,))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        v = torch.randn(sum(p.numel() for p in model.parameters()))
        found = [kind(model, nn.CrossEntropyLoss(), data) @ v for _ in range(8)]
        torch.use_deterministic_algorithms(True)
        found.append(kind(model, nn.CrossEntropyLoss(), data) @ v)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[0]) for x in found[1:])
