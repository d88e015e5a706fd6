"""density, logdet, inertia: Gauss quadrature identities, distances to dense spectra, calibrated errors."""

import json
import math

import numpy as np
import pytest
import torch

from hvpfast.probes import density, inertia, logdet, product, quadrature


def matrix_with(eigenvalues, seed=0):
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_moments_of_each_probe(steps):
    """R6: sum w theta^k = v'A^k v for k <= 2 steps - 1, and not for 2 steps."""
    A = matrix_with(np.linspace(-1.1, 1, 90))
    result = density(A, probes=5, steps=steps, seed=2)
    V = product.rademacher(product.Product(A, "test"), 2, range(5)) / math.sqrt(90)
    for power in range(2 * steps + 1):
        rule = (result.weights * result.nodes**power).sum(dim=1)
        truth = (V * (torch.linalg.matrix_power(A, power) @ V)).sum(dim=0)
        if power < 2 * steps:
            torch.testing.assert_close(rule, truth, rtol=1e-10, atol=1e-12)
        else:
            assert float((rule - truth).abs().max()) > 1e-6
    assert result.matvecs == 5 * steps


def test_moment_is_the_trace_of_a_power():
    A = matrix_with(np.linspace(0, 2, 120))
    result = density(A, probes=40, steps=5)
    for power in (1, 2, 3):
        moment = result.moment(power)
        truth = float(torch.linalg.matrix_power(A, power).trace()) / 120
        assert abs(moment.value - truth) < 4 * moment.stderr
    assert result.moment(0).value == pytest.approx(1, abs=1e-12)


def test_density_is_a_density_near_the_dense_spectrum():
    eigenvalues = np.concatenate([np.random.default_rng(0).normal(size=380), np.linspace(8, 9, 20)])
    A = matrix_with(eigenvalues)
    result = density(A, probes=16, steps=50)
    assert float(torch.trapezoid(result.values, result.grid)) == pytest.approx(1, abs=1e-12)
    assert (result.values >= 0).all() and (result.stderr >= 0).all()
    torch.testing.assert_close(result.weights.sum(dim=1), torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-12)
    points = torch.linspace(-4, 10, 300, dtype=torch.float64)
    truth = (torch.as_tensor(eigenvalues)[None] <= points[:, None]).double().mean(dim=1)
    assert float((result.cdf(points) - truth).abs().mean()) < 0.01
    assert float((result.cdf(points) - truth).abs().max()) < 0.05
    outliers = result.grid > 6
    mass = float(torch.trapezoid(result.values[outliers], result.grid[outliers]))
    assert mass == pytest.approx(0.05, abs=0.02)


def test_standard_error_is_that_of_the_mean_over_probes():
    A = matrix_with(np.linspace(-1, 1, 100))
    grid = torch.linspace(-1, 1, 21, dtype=torch.float64)
    many = [density(A, probes=6, steps=12, grid=grid, width=0.2, seed=seed) for seed in range(80)]
    spread = torch.stack([result.values for result in many]).std(dim=0)
    said = torch.stack([result.stderr**2 for result in many]).mean(dim=0).sqrt()
    torch.testing.assert_close(said, spread, rtol=0.3, atol=0)
    assert torch.equal(many[0].grid, grid)
    assert density(A, probes=1, steps=5).stderr.isnan().all()


def test_breakdown_leaves_fewer_nodes():
    A = matrix_with([2.0] * 3 + [-1.0] * 3 + [0.0] * 34)
    result = density(A, probes=3, steps=10)
    used = result.weights > 1e-12
    assert used.sum(dim=1).tolist() == [3, 3, 3] and result.matvecs <= 12
    torch.testing.assert_close(result.weights.sum(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(result.nodes[used].reshape(3, 3), torch.tensor([[-1.0, 0, 2]] * 3).double())
    for constant, value in ((torch.eye(9), 1.0), (torch.zeros(9, 9), 0.0), (torch.tensor([[5.0]]), 5.0)):
        result = density(constant, probes=2, steps=4)
        torch.testing.assert_close(result.nodes, torch.full((2, 4), value, dtype=torch.float64))
        assert float(torch.trapezoid(result.values, result.grid)) == pytest.approx(1, abs=1e-9)
    small = density(matrix_with([1.0, 2, 4]), probes=3, steps=64)
    assert small.nodes.shape == (3, 64) and small.matvecs <= 9


def test_without_room_for_reorthogonalisation(monkeypatch):
    """Ghost nodes appear, the low moments and the masses stay."""
    A = matrix_with(np.concatenate([np.linspace(0, 1, 295), [20, 30, 40, 50, 60]]))
    full = density(A, probes=4, steps=60)
    monkeypatch.setattr(quadrature, "BASIS_BYTES", 60 * 300 * 8 * 2 + 100)  # two probes at a time
    paired = density(A, probes=4, steps=60)
    torch.testing.assert_close(paired.values, full.values, rtol=1e-6, atol=1e-9)
    monkeypatch.setattr(quadrature, "BASIS_BYTES", 0)
    bare = density(A, probes=4, steps=60)
    for power in range(4):
        assert bare.moment(power).value == pytest.approx(full.moment(power).value, rel=1e-9)
    points = torch.tensor([2.0, 25.0, 45.0], dtype=torch.float64)
    torch.testing.assert_close(bare.cdf(points), full.cdf(points), rtol=0, atol=1e-8)


def test_one_product_a_step_and_same_seed_same_bits():
    A = matrix_with(np.linspace(-1, 1, 50))

    class Counting:
        shape, dtype, device, calls = A.shape, A.dtype, A.device, 0

        def __matmul__(self, V):
            self.calls += 1
            return A @ V

    counting = Counting()
    first = density(counting, probes=8, steps=10)
    assert counting.calls == 10 and first.matvecs == 80
    assert torch.equal(first.values, density(A, probes=8, steps=10).values)
    fewer = density(A, probes=3, steps=10)
    torch.testing.assert_close(fewer.nodes, first.nodes[:3])
    single = density(A.float(), probes=8, steps=10)
    torch.testing.assert_close(single.values, first.values, rtol=1e-3, atol=1e-3)


def test_logdet():
    A = matrix_with(np.linspace(0.2, 3, 400))
    truth = float(torch.linalg.slogdet(A + 0.1 * torch.eye(400, dtype=torch.float64))[1])
    results = [logdet(A, damping=0.1, probes=6, steps=20, seed=seed) for seed in range(60)]
    errors = np.array([result.value for result in results]) - truth
    assert abs(errors.mean()) < 3.5 * errors.std() / math.sqrt(60)
    stderrs = np.array([result.stderr for result in results])
    assert 0.75 < math.sqrt((errors**2).mean()) / math.sqrt((stderrs**2).mean()) < 1.3
    exact = logdet(A, damping=0.1, probes=8, steps=50)
    assert exact.value == pytest.approx(truth, rel=1e-10) and exact.stderr == 0 and exact.matvecs == 400
    low_rank = logdet(matrix_with([1.0, 2.0] + [0.0] * 498), damping=0.5, probes=4, steps=10)
    assert abs(low_rank.value - (math.log(1.5) + math.log(2.5) + 498 * math.log(0.5))) < 5 * low_rank.stderr + 1e-9


def test_logdet_refuses_what_has_none():
    A = matrix_with(np.linspace(-0.3, 1, 500))
    for steps, what in ((20, "a Ritz value"), (64, "an eigenvalue")):
        with pytest.raises(
            ValueError, match=rf"logdet: A has {what} of -0\.\d+, with damping=0\.1.*damping above 0\.\d"
        ):
            logdet(A, damping=0.1, probes=8, steps=steps)
    assert math.isfinite(logdet(A, damping=0.31, probes=4, steps=20).value)


def test_inertia():
    A = matrix_with([-3.0, -1.0, 0.0, 0.0, 1e-18] + [0.5] * 10)
    exact = inertia(A)
    assert (exact.negative, exact.zero, exact.positive) == (2, 3, 10) and exact.exact
    assert exact.stderr == (0, 0, 0) and "negative 2" in repr(exact)
    raised = inertia(A, rtol=0.4)
    assert (raised.negative, raised.zero, raised.positive) == (1, 14, 0)
    spread = matrix_with(np.concatenate([np.linspace(-2, -1, 80), np.zeros(100), np.linspace(1, 3, 220)]))
    estimate = inertia(spread, dense_limit=100, rtol=1e-3, probes=16, steps=40)
    for count, error, truth in zip(
        (estimate.negative, estimate.zero, estimate.positive), estimate.stderr, (80, 100, 220), strict=True
    ):
        assert abs(count - truth) < 4 * error + 1e-6 and 0 < error < 20
    assert estimate.negative + estimate.zero + estimate.positive == pytest.approx(400)
    assert not estimate.exact and estimate.matvecs <= 640 and "estimated" in repr(estimate)
    saddle = torch.diag(torch.tensor([2.0, -2.0]))  # x^2 - y^2
    assert (inertia(saddle).negative, inertia(saddle).positive) == (1, 1)


def test_prints_and_serialises():
    A = matrix_with(np.linspace(-1, 1, 30))
    for result in (density(A, probes=1, steps=5, progress=True), inertia(A), logdet(A, damping=2.0)):
        assert "matvecs" in repr(result)
        json.dumps(result.to_dict(), allow_nan=False)


def test_wrong_inputs():
    A = matrix_with(np.linspace(-1, 1, 30))
    for arguments, message in (
        ({"probes": 0}, "probes=0; needs an integer >= 1"),
        ({"steps": 0}, "steps=0"),
        ({"width": 0.0}, "width=0.0; needs a number > 0"),
        ({"width": 1e-6}, "points lie .* apart.*needs grid >="),
        ({"grid": torch.ones(2, 2)}, r"grid has shape \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            density(A, **arguments)
    for probe in (inertia, logdet):
        with pytest.raises(ValueError, match="probes=1; needs an integer >= 2"):
            probe(A, probes=1)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="needs a symmetric A"):
        density(torch.randn(40, 40, generator=generator), probes=2, steps=5)
    A[1, 2] = A[2, 1] = math.nan
    with pytest.raises(FloatingPointError, match="density: matvec 1 has NaN"):
        density(A)
