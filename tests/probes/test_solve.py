"""solve: against dense solves, true residuals, negative curvature, preconditioners."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpfast.probes import solve


def matrix_with(eigenvalues, seed=0):
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


def right_sides(n, K=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*((n,) if K is None else (n, K)), generator=generator, dtype=torch.float64)


def true_residual(A, x, b, damping):
    return (b - A @ x - damping * x).norm(dim=0) / b.norm(dim=0)


@pytest.mark.parametrize("K", [None, 1, 3, 19])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_against_dense(K, damping):
    A, b = matrix_with(np.linspace(0.1, 5, 80)), right_sides(80, K)
    result = solve(A, b, damping=damping, tol=1e-11)
    truth = torch.linalg.solve(A + damping * torch.eye(80, dtype=torch.float64), b)
    torch.testing.assert_close(result.x, truth, rtol=1e-8, atol=1e-9)
    residual = true_residual(A, result.x, b, damping)
    torch.testing.assert_close(torch.as_tensor(result.residual, dtype=torch.float64), residual, rtol=1e-3, atol=1e-14)
    assert result.converged and result.x.shape == b.shape and result.iterations <= 90
    assert isinstance(result.residual, float) == (K is None)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20), st.integers(1, 4), st.integers(0, 3))
def test_any_positive_definite_matrix(spectrum, K, seed):
    A, b = matrix_with(spectrum, seed), right_sides(len(spectrum), K, seed)
    result = solve(A, b, tol=1e-10)
    assert result.converged
    assert float(true_residual(A, result.x, b, 0.0).max()) <= 1.01e-10


def test_distinct_eigenvalues_bound_the_iterations():
    A = matrix_with([1.0] * 30 + [5.0] * 30 + [9.0] * 30)
    assert solve(A, right_sides(90), tol=1e-10).iterations == 3


def test_columns_stop_on_their_own():
    """A column that is an eigenvector needs one product; products are counted by columns still going."""
    A = matrix_with(np.linspace(1, 50, 100))
    b = right_sides(100, 2)
    b[:, 0] = torch.linalg.eigh(A)[1][:, 4]
    result = solve(A, b, tol=1e-8)
    assert result.converged and result.matvecs == 1 + result.iterations + 2
    zeros = solve(A, torch.zeros(100, dtype=torch.float64))
    assert not zeros.x.any() and zeros.residual == 0 and zeros.converged and zeros.iterations == 0


def test_singular_but_consistent():
    A = matrix_with([0.0] * 10 + np.linspace(1, 2, 30).tolist())
    b = A @ right_sides(40)
    result = solve(A, b, tol=1e-10)
    torch.testing.assert_close(result.x, torch.linalg.pinv(A, rtol=1e-10) @ b, rtol=1e-7, atol=1e-8)


def test_negative_curvature_raises_and_says_the_damping():
    A = matrix_with([-0.5] + np.linspace(1, 2, 40).tolist())
    b = right_sides(41)
    with pytest.raises(ValueError, match=r"curvature .* = -0\.\d+ in iteration \d+, damping=0; .*damping above 0\.\d+"):
        solve(A, b)
    assert solve(A, b, damping=0.51).converged


def test_preconditioners():
    d = torch.logspace(0, 6, 200, dtype=torch.float64)
    A = d.diag() + 0.1 * matrix_with(np.linspace(0, 1, 200))
    b = right_sides(200, 2)
    with pytest.warns(RuntimeWarning, match="after 50 iterations"):
        assert not solve(A, b, tol=1e-8, max_iterations=50).converged
    for preconditioner in (torch.diag(1 / d), lambda r: r / (d if r.ndim == 1 else d[:, None])):
        for side in (b, b[:, 0]):
            result = solve(A, side, tol=1e-8, max_iterations=50, preconditioner=preconditioner)
            assert result.converged and result.iterations < 25
            torch.testing.assert_close(A @ result.x, side, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="preconditioner M has r'Mr = -"):
        solve(A, b, preconditioner=-torch.eye(200, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"preconditioner gave \(3,\) for \(200,\)"):
        solve(A, b[:, 0], preconditioner=lambda r: r[:3])


def test_float32_residual_is_the_true_one():
    """Ill-conditioned in float32: the recurrence reaches any tol, the solution does not, and the result says so."""
    A, b = matrix_with(np.logspace(-4, 0, 100)).float(), right_sides(100).float()
    with pytest.warns(RuntimeWarning, match="wider dtype than torch.float32"):
        result = solve(A, b, tol=1e-7)
    assert result.x.dtype == torch.float32 and not result.converged
    assert result.residual == pytest.approx(float(true_residual(A.double(), result.x.double(), b.double(), 0)), rel=0.5)
    easy = solve(A, b, damping=1.0, tol=1e-5)
    assert easy.converged
    bfloat = solve(A.bfloat16(), b.bfloat16(), damping=1.0, tol=1e-5)
    assert bfloat.converged and bfloat.x.dtype == torch.float32


def test_prints_and_serialises():
    result = solve(matrix_with([1.0, 2, 3]), right_sides(3, 2), progress=True)
    assert "converged" in repr(result) and json.loads(json.dumps(result.to_dict()))["converged"]


def test_wrong_inputs():
    A, b = matrix_with([1.0, 2, 3]), right_sides(3)
    for arguments, message in (
        ({"b": right_sides(4)}, r"b has shape \(4,\); needs \(3,\) or \(3, K\)"),
        ({"method": "lu"}, "method='lu'; needs 'cg'"),
        ({"damping": math.nan}, "damping=nan"),
        ({"tol": -1.0}, "tol=-1.0"),
        ({"max_iterations": -1}, "max_iterations=-1"),
        ({"b": torch.tensor([1.0, math.inf, 0.0])}, "b has NaN or inf"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(A, **{"b": b, **arguments})
    with pytest.raises(TypeError, match="b is a list"):
        solve(A, [1.0, 2.0, 3.0])
    A[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="solve: matvec 1"):
        solve(A, b)
