"""Rows in another basis: in halves where there are many, and then right to what statistics state."""

import pytest
import tiers
import torch

import hvpfast as hf
from hvpfast import ops
from hvpfast.ops.rotation import rotated

SHAPES = ((2100, 200, 190), (3, 700, 160, 250), (5, 40, 30), (0, 7, 9), (4, 2, 0, 3), (1030, 300, 1))


def relative(x, y):
    return float((x - y).norm() / y.norm().clamp(min=1e-30))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("precision", ["auto", "ieee", "bf16x3"])
def test_against_float64(shape, shifted, precision):
    torch.manual_seed(0)
    *rows, i, p = shape
    x, q = torch.randn(*rows, i), torch.linalg.qr(torch.randn(max(i, p), max(i, p)))[0][:i, :p].contiguous()
    shift = torch.randn(p) if shifted else None
    truth = x.double() @ q.double() + (shift.double() if shifted else 0)
    bound = 1e-6 if precision == "ieee" else 5e-6
    with hf.precision(precision):
        for data in (x, x.mT.contiguous().mT):
            for basis in (q, q.T.contiguous().T):
                found = rotated(data, basis, shift, samples=64)
                assert found.shape == truth.shape and relative(found, truth) <= bound
        wide = rotated(x.double(), q.double(), None if shift is None else shift.double(), samples=64)
        assert wide.dtype is torch.float64 and relative(wide, truth) < 1e-14


@pytest.mark.parametrize("t", [1, 64, 128])
def test_moments_of_rotated_rows(t):
    """What the halves lose is random from row to row: the moments keep more than the rows."""
    torch.manual_seed(1)
    a, g = torch.randn(2048 // t, t, 256).relu(), torch.randn(2048 // t, t, 256)
    qa, qg = (torch.linalg.qr(torch.randn(256, 256))[0] for _ in range(2))
    truth = ops.rotated_second_moment.reference(a.double(), g.double(), qa.double(), qg.double())
    found = ops.second_moment(rotated(a, qa, samples=len(a)), rotated(g, qg, samples=len(a)))
    assert relative(found, truth) <= 5e-6
    assert float(((found - truth) / truth).abs().max()) < 1e-4


@pytest.mark.skipif(tiers.WHY_NONE is not None, reason=str(tiers.WHY_NONE))
@pytest.mark.parametrize("tier", tiers.TIERS)
def test_tiers_and_values_out_of_range(tier):
    torch.manual_seed(2)
    x, q = torch.randn(1200, 250), torch.linalg.qr(torch.randn(250, 250))[0]
    with tiers.forced(tier):
        assert relative(rotated(x, q, samples=64), x.double() @ q.double()) <= 5e-6
        small = rotated(
            x * 1e-30, q, samples=64
        )  # halves of such numbers are no normal ones: the product is taken in full
        assert relative(small.double() * 1e30, x.double() @ q.double()) <= 5e-6
        x[7, 3] = torch.inf
        assert not rotated(x, q, samples=64)[7].isfinite().any() and rotated(x, q, samples=64)[8].isfinite().all()
