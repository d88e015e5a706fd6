"""gram with mirror=False: the lower triangle of `out` alone, on every backend and tier that can run here; and its mirror."""

import lower
import pytest
import tiers
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hvpfast import dispatch, ops
from hvpfast.ops.shared import mirror_lower
from hvpfast.testing import LAYOUTS, laid_out

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = (
    (1, 1),
    (3, 17),
    (17, 3),
    (1, 130),
    (16, 61),
    (40, 300),
    (64, 129),
    (65, 127),
    (300, 33),
    (1100, 50),
    (90, 260),
)
BLENDS = ({}, {"ones_column": True, "alpha": -0.5, "beta": 2.0}, {"alpha": 0.25, "beta": 1.0})


def draw(*shape, dtype=torch.float32, layout="contiguous"):
    return laid_out(
        torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype), layout
    )


def as_whole(x) -> bool:
    """Whether mirror=True multiplies in the same order: from 17 to 64 rows mostly the lower triangle goes a way of its own."""
    return not 16 < x.shape[0] <= 64


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu(tier, dtype):
    with tiers.forced(tier):
        for number, shape in enumerate(SHAPES):
            x = draw(*shape, dtype=dtype, layout=LAYOUTS[number % len(LAYOUTS)])
            for blend in BLENDS:
                lower.assert_lower(ops.gram.on("cpu"), x, same=as_whole(x), precision="bf16x3", **blend)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cpu_of_many_features(tier, dtype):
    """Threads share the triangle, and it is written in patches; a few rows; rows of 300, more than one partial sum."""
    with tiers.forced(tier), tiers.threads(2):
        for shape in ((70, 1601), (20, 1030), (300, 8)):
            for blend in ({}, {"beta": 1.0}):
                x = draw(*shape, dtype=dtype)
                lower.assert_lower(ops.gram.on("cpu"), x, same=as_whole(x), precision="bf16x3", **blend)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_strided_out_and_nothing_to_add(backend):
    reason = ops.gram.why_not(backend)
    if reason is not None:
        pytest.skip(reason)
    for x in (draw(50, 37), draw(9, 37), draw(80, 37), draw(0, 37), draw(2, 3, 37)):
        wide = torch.full((74, 40), lower.POISON[torch.float32], dtype=torch.int32).view(torch.float32)
        for out in (wide[::2, 1:38], wide[:37, :37].T):
            for beta in (0.0, 0.5):
                lower.assert_lower(ops.gram.on(backend), x, out, same=False, precision="bf16x3", beta=beta)
                out.view(torch.int32).fill_(lower.POISON[torch.float32])
                assert bool((wide.view(torch.int32) == lower.POISON[torch.float32]).all())
    for ones_column in (False, True):
        lower.assert_lower(ops.gram.on(backend), draw(7, 0), ones_column=ones_column)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_and_automatic_choice(dtype):
    for run in (ops.gram.on("reference"), ops.gram):
        for shape in ((5, 3), (70, 300), (20, 257), (200, 128)):
            for blend in BLENDS:
                lower.assert_lower(run, draw(*shape, dtype=dtype), same=False, precision="bf16x3", **blend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_out_may_share_memory_with_x(backend):
    if ops.gram.why_not(backend) is not None:
        pytest.skip(ops.gram.why_not(backend))
    for rows, features in ((1, 130), (12, 40), (30, 200), (60, 100), (150, 160)):
        for start in (0, 1):
            held = draw(features + 1, features)
            before, want = held.clone(), ops.gram.reference(held[start : start + rows].double())
            out = ops.gram.on(backend)(held[start : start + rows], out=held[:features], mirror=False)
            assert float((out.tril() - want.tril()).norm() / want.norm()) < 1e-5
            assert torch.equal(out.triu(1), before[:features].triu(1)) and torch.equal(held[-1], before[-1])


def test_it_is_traced_differentiated_and_counts_as_written():
    x, before = draw(9, 5), draw(5, 5)
    call = lambda x, out: ops.gram(x, out=out, beta=0.5, mirror=False)  # noqa: E731
    want = call(x, before.clone())
    traced = torch.compile(call, backend="aot_eager")(x, before.clone())
    torch.testing.assert_close(traced, want)
    with FakeTensorMode() as mode:
        assert call(mode.from_tensor(x), mode.from_tensor(before)).shape == (5, 5)
    leaf = x.clone().requires_grad_()
    call(leaf, before.clone()).tril().sum().backward()
    ones = torch.ones(5, 5).tril()
    torch.testing.assert_close(leaf.grad, x @ (ones + ones.T))
    out = before.clone()
    version = out._version
    call(x, out)
    assert out._version > version


@pytest.mark.parametrize("size", [0, 1, 5, 128, 129, 300])
def test_mirror(size):
    x = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    if size > 2:
        x[0, 2, 0], x[1, 2, 1], x[:, 0, 1] = -0.0, float("nan"), float("inf")
    wide = torch.zeros(2, size, size + 3)
    for given in (x.clone(), wide[:, :, 1 : size + 1].copy_(x), x.mT.clone().mT):
        result = mirror_lower(given)
        assert result is given
        kept = torch.ones(size, size, dtype=torch.bool).tril_()
        assert torch.equal(lower.bits(result), lower.bits(torch.where(kept, x, x.mT)))
    assert not wide[:, :, 0].any() and not wide[:, :, size + 1 :].any()


def test_a_sum_over_calls_is_mirrored_once():
    batches = [draw(40 + i, 150) for i in range(5)]
    total = torch.full((150, 150), float("nan"))
    for number, x in enumerate(batches):
        dispatch.OPS["gram"](x, out=total, beta=float(number > 0), mirror=False)
    rows = torch.cat(batches).double()
    mirror_lower(total)
    assert torch.equal(total, total.T)
    torch.testing.assert_close(total.double(), rows.T @ rows, rtol=1e-4, atol=1e-3)
