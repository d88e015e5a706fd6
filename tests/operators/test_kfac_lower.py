"""Factors that were summed as lower triangles, against those summed whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from truths import relative
from zoo import make, unequal

import hvpfast as hf
from hvpfast import backend, ops
from hvpfast.operators import accumulate

pytestmark = pytest.mark.usefixtures("float64")
TOLERANCE = 1e-10


@pytest.mark.parametrize("name", ["mlp", "cnn, groups and dilation", "tied", "called twice", "attention"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
def test_sums_of_lower_triangles(monkeypatch, kind, approx, name):
    """Small factors are summed whole; that the rest holds its lower triangle until it is read changes nothing."""
    case = make(name)
    y = torch.arange(6) % case.classes
    lower, run = [], ops.gram.reference
    monkeypatch.setattr(
        ops.gram, "reference", lambda *a, **k: (lower.append(not k.get("mirror", True)), run(*a, **k))[1]
    )
    for data in ((case.inputs, y), unequal(case.inputs, y)):
        options = {"fisher_type": "type-2", "kfac_approx": approx}
        with backend("reference"):
            want = kind(case.model, F.cross_entropy, data, **options)
            expected, v = want.to_dense(), torch.randn(want.shape[0], 2)
            assert not any(lower)
            with monkeypatch.context() as patch:
                patch.setattr(accumulate, "LEAST_LOWER", 1)
                patch.setattr(accumulate, "BOTH_FIRST", 1)
                patch.setattr(accumulate, "_kernel_adds", lambda total: True)
                found = kind(case.model, F.cross_entropy, data, **options)
                assert relative(found.to_dense(), expected) < TOLERANCE
                assert relative(found.inverse(0.1) @ v, want.inverse(0.1) @ v) < TOLERANCE
            for factor in (one for pair in found.factors.values() for one in pair):
                assert factor.dim() == 1 or torch.equal(factor, factor.mT)
        assert any(lower) == (not name.startswith("cnn"))  # patches give whole matrices
        lower.clear()


def test_lower_triangles_only_where_a_kernel_adds_them(monkeypatch):
    monkeypatch.setattr(accumulate, "LEAST_LOWER", 1)
    total = torch.zeros(1, 300, 300)
    with backend("reference"):
        assert accumulate._whole_first(total, 100) == math.inf
    if ops.gram.choose(torch.zeros(256, 300), out=total[0], mirror=False).backend != "reference":
        assert (accumulate._whole_first(total, 100), accumulate._whole_first(total, 1)) == (0, accumulate.BOTH_FIRST)
    assert accumulate._whole_first(None, 100) == accumulate._whole_first(total[0], 100) == math.inf
