"""trace, diagonal, frobenius_norm: exact limits, unbiased, standard errors that mean what they say."""

import json
import math

import numpy as np
import pytest
import torch

from hvpfast.probes import diagonal, frobenius_norm, product, stochastic, trace

METHODS = ("hutchinson", "hutch++", "xtrace")
SEEDS = 250


def matrix_with(eigenvalues, seed=0):
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (Q * eigenvalues) @ Q.T


SPECTRA = {
    "flat indefinite": np.linspace(-0.5, 1.5, 150),
    "slow decay": 100.0 / np.arange(1, 151) ** 1.0,
    "decay": 100.0 / np.arange(1, 151) ** 2.0,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECTRA)
def test_unbiased_and_calibrated(name, method):
    """Over 250 seeds: mean error within 3.5 standard errors, RMS error / mean stderr near 1, 2-sigma coverage."""
    A = matrix_with(SPECTRA[name])
    truth = float(A.trace())
    results = [trace(A, matvecs=48, method=method, seed=seed) for seed in range(SEEDS)]
    errors = np.array([result.value for result in results]) - truth
    stderrs = np.array([result.stderr for result in results])
    assert abs(errors.mean()) < 3.5 * errors.std() / math.sqrt(SEEDS)
    assert 0.8 < math.sqrt((errors**2).mean()) / stderrs.mean() < 1.25
    assert (np.abs(errors) < 2 * stderrs).mean() > 0.88
    assert all(result.matvecs == 48 for result in results)


def test_better_methods_are_better_where_they_should_be():
    A = matrix_with(SPECTRA["decay"])
    stderr = {method: trace(A, matvecs=48, method=method).stderr for method in METHODS}
    assert stderr["xtrace"] < stderr["hutch++"] < stderr["hutchinson"] / 10


@pytest.mark.parametrize("method", METHODS)
def test_exact_limits(method):
    D = torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64))
    if method == "hutchinson":  # signs see a diagonal matrix exactly
        result = trace(D, matvecs=10)
        assert result.value == pytest.approx(5050, rel=1e-14) and result.stderr < 1e-12
    else:  # a range of rank 7 is captured whole
        L = matrix_with([5.0, 4.0, 3.0, 3.0, -2.0, 1.0, 1.0] + [0.0] * 93)
        result = trace(L, matvecs=30, method=method)
        assert result.value == pytest.approx(15, abs=1e-10) and result.stderr < 1e-10
        single = trace(L.float(), matvecs=30, method=method)
        assert single.value == pytest.approx(15, abs=1e-3)
        assert trace(torch.zeros(50, 50), matvecs=12, method=method).value == 0
    for matvecs in (100, 1000):  # the identity
        result = trace(D, matvecs=matvecs, method=method)
        assert (result.value, result.stderr, result.matvecs) == (5050.0, 0.0, 100)
    assert trace(torch.tensor([[3.0]]), matvecs=1, method=method).value == 3.0


@pytest.mark.parametrize("method", METHODS)
def test_nonsymmetric_matrices_too(method):
    generator = torch.Generator().manual_seed(4)
    A = torch.randn(60, 60, generator=generator, dtype=torch.float64) + 2 * torch.eye(60, dtype=torch.float64)
    results = [trace(A, matvecs=30, method=method, seed=seed) for seed in range(SEEDS)]
    errors = np.array([result.value for result in results]) - float(A.trace())
    assert abs(errors.mean()) < 3.5 * errors.std() / math.sqrt(SEEDS)
    assert 0.8 < math.sqrt((errors**2).mean()) / np.mean([result.stderr for result in results]) < 1.25


@pytest.mark.parametrize("method", METHODS)
def test_rtol_stops_on_the_standard_error(method):
    A = matrix_with(np.linspace(0, 2, 600))
    loose = trace(A, matvecs=599, method=method, rtol=0.02)
    tight = trace(A, matvecs=599, method=method, rtol=0.005)
    assert loose.stderr <= 0.02 * loose.value and tight.stderr <= 0.005 * tight.value
    assert 16 <= loose.matvecs < tight.matvecs < 599
    capped = trace(A, matvecs=40, method=method, rtol=1e-9)
    assert capped.matvecs <= 40 and capped.stderr > 1e-9 * capped.value


def test_rtol_does_not_stop_on_a_still_mean():
    """Trace near zero: the mean barely moves, the relative error is huge; all matvecs are spent."""
    A = matrix_with(np.linspace(-1, 1, 300))
    assert trace(A, matvecs=128, rtol=1e-2).matvecs == 128


@pytest.mark.parametrize("method", METHODS)
def test_seeds_and_chunks(method, monkeypatch):
    A = matrix_with(SPECTRA["decay"])
    first = trace(A, matvecs=30, method=method, seed=3)
    assert trace(A, matvecs=30, method=method, seed=3).value == first.value
    assert trace(A, matvecs=30, method=method, seed=4).value != first.value
    monkeypatch.setattr(product, "COLUMNS", 3)
    monkeypatch.setattr(stochastic, "COLUMNS", 5)
    assert trace(A, matvecs=30, method=method, seed=3).value == pytest.approx(first.value, rel=1e-10)


def test_probes_are_signs_that_depend_on_seed_and_index_only():
    A = product.Product(torch.eye(1000), "test")
    V = product.rademacher(A, 5, range(12))
    assert torch.equal(V.abs(), torch.ones(1000, 12))
    assert torch.equal(V[:, 4:9], product.rademacher(A, 5, range(4, 9)))
    gram = V.T @ V / 1000 - torch.eye(12)
    assert float(gram.abs().max()) < 5 / math.sqrt(1000)
    assert not torch.equal(V[:, :1], product.rademacher(A, 6, range(1)))


@pytest.mark.parametrize("probe", [trace, diagonal, frobenius_norm])
def test_half_precision_matrices(probe):
    A = matrix_with(SPECTRA["decay"]).bfloat16()
    low, high = probe(A, matvecs=20), probe(A.double(), matvecs=20)
    low, high = (torch.as_tensor(result.value, dtype=torch.float64) for result in (low, high))
    torch.testing.assert_close(low, high, rtol=1e-5, atol=1e-4)


def test_diagonal():
    A = matrix_with(SPECTRA["slow decay"])
    n = len(A)
    results = [diagonal(A, matvecs=40, seed=seed) for seed in range(100)]
    errors = torch.stack([result.value for result in results]) - A.diagonal()
    stderrs = torch.stack([result.stderr for result in results])
    z = errors.mean(dim=0) / (errors.std(dim=0) / math.sqrt(100))
    assert float(z.abs().max()) < 4.5 and 0.8 < float(z.std()) < 1.2
    assert 0.9 < float((errors**2).mean().sqrt() / (stderrs**2).mean().sqrt()) < 1.1
    variance = ((A**2).sum(dim=1) - A.diagonal() ** 2) / 40
    torch.testing.assert_close((stderrs**2).mean(dim=0), variance, rtol=0.35, atol=0)
    exact = diagonal(A, matvecs=n)
    torch.testing.assert_close(exact.value, A.diagonal())
    assert not exact.stderr.any() and exact.matvecs == n
    assert results[0].value.shape == results[0].stderr.shape == (n,)


def test_frobenius_norm():
    A = matrix_with(SPECTRA["slow decay"])
    truth = float(A.norm())
    results = [frobenius_norm(A, matvecs=40, seed=seed) for seed in range(SEEDS)]
    squares = np.array([result.value**2 for result in results])
    assert abs(squares.mean() - truth**2) < 3.5 * squares.std() / math.sqrt(SEEDS)
    rms = math.sqrt(np.mean([(result.value - truth) ** 2 for result in results]))
    assert 0.8 < rms / np.mean([result.stderr for result in results]) < 1.25
    exact = frobenius_norm(A, matvecs=len(A))
    assert exact.value == pytest.approx(truth, rel=1e-12) and exact.stderr == 0
    stopped = frobenius_norm(A, matvecs=149, rtol=0.15)
    assert stopped.matvecs < 149 and stopped.stderr <= 0.15 * stopped.value
    assert frobenius_norm(torch.zeros(50, 50), matvecs=10).stderr == 0


def test_prints_and_serialises():
    A = matrix_with(SPECTRA["decay"])
    scalar = trace(A, matvecs=20, progress=True)
    assert "+/-" in repr(scalar) and "20 matvecs" in repr(scalar) and float(scalar) == scalar.value
    assert json.loads(json.dumps(scalar.to_dict()))["value"] == scalar.value
    entries = diagonal(A, matvecs=20)
    assert "(150,)" in repr(entries) and len(json.loads(json.dumps(entries.to_dict()))["stderr"]) == 150


def test_wrong_inputs():
    A = matrix_with(SPECTRA["decay"])
    with pytest.raises(ValueError, match="method='slq'; needs one of 'hutchinson'"):
        trace(A, method="slq")
    for method, least in zip(METHODS, (2, 4, 4), strict=True):
        with pytest.raises(ValueError, match=f"matvecs={least - 1}; needs an integer >= {least}"):
            trace(A, matvecs=least - 1, method=method)
        assert math.isfinite(trace(A, matvecs=least, method=method).stderr)
    for probe in (diagonal, frobenius_norm):
        with pytest.raises(ValueError, match="matvecs=1; needs an integer >= 2"):
            probe(A, matvecs=1)
    with pytest.raises(ValueError, match="rtol=0; needs a number > 0"):
        trace(A, rtol=0)
    A[3, 3] = math.inf
    for probe in (trace, diagonal, frobenius_norm):
        with pytest.raises(FloatingPointError, match=f"{probe.__name__}: matvec 1 has NaN or inf"):
            probe(A, matvecs=10)
