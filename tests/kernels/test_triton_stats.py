"""The Triton kernels of norm layers', biases' and tables' statistics, on each route, against float64."""

import pytest
import torch
from hvpfast.kernels import embedding_sample_norms as lookups
from hvpfast.kernels import norm_sample_stats as kernel
from on_triton import DEVICE, DTYPES, tensor

from hvpfast import ops, testing

KINDS = ({"kind": "layer", "eps": 1e-3}, {"kind": "rms", "eps": 1e-3}, {})


def pair(n, t, i, k, dtype=torch.float32, layout="contiguous", channels=False):
    shape = (i, t) if channels else (t, i)
    x, g = tensor(n, *shape, dtype=dtype, layout=layout), tensor(k * n, *shape, dtype=dtype, layout=layout, seed=1)
    return (x.mT, g.mT) if channels else (x, g)


@pytest.mark.parametrize("splits", [None, (1, 1), (2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("how", KINDS, ids=str)
@pytest.mark.parametrize("channels", [False, True])
def test_every_split(splits, how, channels):
    for n, t, i, k in ((2, 70, 33, 2), (3, 40, 150, 1)):
        x, g = pair(n, t, i, k, channels=channels)
        kind, eps = how.get("kind"), how.get("eps", 0.0)
        found = kernel.launch(x, g, kind, eps, splits=splits)
        testing.assert_accurate(found, ops.norm_sample_stats, x, g, **how)
        assert all(torch.equal(a, b) for a, b in zip(found, kernel.launch(x, g, kind, eps, splits=splits), strict=True))
        shift = kernel.launch(None, g, splits=splits)
        testing.assert_accurate((shift[1], shift[3]), ops.bias_sample_stats, g)


@pytest.mark.parametrize("shape", [(3, 5, 1), (3, 1, 7), (1, 1, 7), (1, 1, 1), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("channels", [False, True])
def test_given_statistics(shape, channels):
    x, g = pair(3, 5, 7, 2, channels=channels)
    mean, rstd = tensor(*shape, seed=2), tensor(*shape, seed=3).square()
    for how in ({"mean": mean}, {"rstd": rstd}, {"mean": mean, "rstd": rstd}):
        testing.assert_accurate(kernel.norm_sample_stats(x, g, **how), ops.norm_sample_stats, x, g, **how)
    how = {"mean": mean, "rstd": rstd}
    x, g = x.bfloat16(), g.bfloat16()
    testing.assert_accurate(kernel.norm_sample_stats(x, g, **how), ops.norm_sample_stats, x, g, **how)


@pytest.mark.parametrize("how", KINDS[:2], ids=str)
def test_more_features_than_a_program_holds(how, monkeypatch):
    monkeypatch.setattr(kernel, "WHOLE", 64)
    monkeypatch.setattr(kernel, "BLOCK", 64)
    cases = [(dtype, "contiguous", False) for dtype in DTYPES] + [
        (torch.float32, "offset", False),
        (torch.float32, "strided", True),
    ]
    for dtype, layout, channels in cases:
        x, g = pair(2, 3, 200, 2, dtype=dtype, layout=layout, channels=channels)
        testing.assert_accurate(kernel.norm_sample_stats(x, g, **how), ops.norm_sample_stats, x, g, **how)
    x, g = pair(2, 3, 200, 1)
    far = x + 1000  # the variance is that of x - 1000, not a difference of squares
    testing.assert_accurate(kernel.norm_sample_stats(far, g, **how), ops.norm_sample_stats, far, g, **how)


@pytest.mark.parametrize("how", KINDS[:2], ids=str)
def test_positions_of_5000_features_in_one_pass(how, monkeypatch):
    monkeypatch.setattr(kernel, "positions", None)  # a second pass would begin with it
    x, g = pair(2, 3, 5000, 1)
    found = kernel.norm_sample_stats(x, g, **how)
    monkeypatch.undo()
    testing.assert_accurate(found, ops.norm_sample_stats, x, g, **how)


def test_long_sums_are_split(monkeypatch):
    """No float32 sum takes more than MOST_STEPS tiles."""
    monkeypatch.setattr(kernel, "MOST_STEPS", 2)
    monkeypatch.setattr(kernel, "ELEMENTS", 64)
    x, g = pair(300, 30, 16, 1)
    found = kernel.norm_sample_stats(x[:4], g[:4])
    testing.assert_accurate(found, ops.norm_sample_stats, x[:4], g[:4])
    wide = torch.ones(1, 20000, 1, device=DEVICE)
    monkeypatch.undo()
    assert kernel.launch(None, wide)[1].tolist() == [4e8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_lookups(dtype, rows):
    """Every index the same, two, mostly different ones; positions within and across the tiles that are loaded at once."""
    for n, t, d, k in ((3, lookups.TOGETHER, 5, 2), (2, 2 * lookups.TOGETHER + 3, 130, 1), (4, 1, 16, 3)):
        g = tensor(k * n, t, d, dtype=dtype, layout="strided")
        indices = torch.randint(0, rows, (n, t), generator=torch.Generator().manual_seed(t)).to(DEVICE)
        for few in (indices, indices.int()):
            found = ops.embedding_sample_norms.on("triton")(g, few)
            testing.assert_accurate(found, ops.embedding_sample_norms, g, few)
            found = ops.embedding_second_moment.on("triton")(g, few, rows + 3)
            testing.assert_accurate(found, ops.embedding_second_moment, g, few, rows + 3)
            assert bool((found[rows:] == 0).all())


def test_what_is_not_finite_stays_in_its_sample_and_row():
    g = tensor(3, 10, 4)
    indices = torch.arange(10, device=DEVICE).expand(3, 10) % 3
    g[1, 4, 2] = torch.inf
    norms, moment = (
        ops.embedding_sample_norms.on("triton")(g, indices),
        ops.embedding_second_moment.on("triton")(g, indices, 4),
    )
    assert norms.isfinite().tolist() == [True, False, True]
    assert (~moment.isfinite()).nonzero().tolist() == [[1, 2]]


def test_they_say_what_they_cannot_do():
    g = tensor(3, 4, 5).double()
    assert "float64" in kernel.supports(g, g) and "float64" in lookups.supports(g, torch.zeros(3, 4, dtype=torch.int64))
