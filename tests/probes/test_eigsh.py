"""eigsh: prescribed spectra, copies, both ends, honesty about convergence, wrong inputs."""

import json
import math
import warnings

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpfast.probes import eigsh, lanczos

WHICH = ("LA", "SA", "LM", "BE")


def matrix_with(eigenvalues, seed=0):
    """Symmetric float64 matrix with these eigenvalues and random eigenvectors."""
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


class Operator:
    """A matrix behind `@` only; counts columns, takes blocks or not, lets a function edit the answer."""

    def __init__(self, matrix, blocks=True, edit=None):
        self.matrix, self.blocks, self.edit = matrix, blocks, edit
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device
        self.columns = self.calls = 0

    def __matmul__(self, v):
        assert v.dtype == self.dtype and not v.requires_grad
        if v.ndim == 2 and not self.blocks:
            raise ValueError("vectors only")
        self.columns += v[0].numel()
        self.calls += 1
        product = self.matrix @ v
        return product if self.edit is None else self.edit(product, self.columns)


def expected(eigenvalues, k, which):
    """What the documentation promises, by a full sort."""
    ordered = sorted(eigenvalues, reverse=True)
    if which == "LM":
        return sorted(eigenvalues, key=abs, reverse=True)[:k]
    bottom = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return ordered[: k - bottom] + ordered[len(ordered) - bottom :]


def check(A, result, k, which, tol=1e-8):
    """Values of a dense solver, orthonormal vectors, residuals that are what they say."""
    A = A.double()
    eigenvalues = torch.linalg.eigvalsh(A)
    scale = float(eigenvalues.abs().max())
    wanted = torch.tensor(expected(eigenvalues.tolist(), k, which), dtype=torch.float64)
    got = result.values.abs() if which == "LM" else result.values
    torch.testing.assert_close(got, wanted.abs() if which == "LM" else wanted, rtol=0, atol=tol * max(scale, 1e-300))
    V = result.vectors.double()
    eps = torch.finfo(result.vectors.dtype).eps
    torch.testing.assert_close(V.T @ V, torch.eye(k, dtype=torch.float64), rtol=0, atol=50 * eps)
    residuals = (A @ V - V * result.values).norm(dim=0)
    torch.testing.assert_close(result.residuals, residuals, rtol=1e-2, atol=100 * eps * max(scale, 1e-300))


SPECTRA = {
    "triple top": [10.0] * 3 + [5.0, 4.0, 3.0] + np.linspace(0, 1, 74).tolist(),
    "double pairs": [7.0, 7.0, 6.0, 6.0, 6.0, -8.0, -8.0] + np.linspace(-1, 1, 73).tolist(),
    "clustered": (2 + 1e-4 * np.arange(6)).tolist() + np.linspace(0, 1, 74).tolist(),
    "indefinite": np.linspace(-3, 2, 80).tolist(),
    "low rank": [3.0, 2.0, 2.0, -1.0] + [0.0] * 76,
    "decaying": (0.7 ** np.arange(80)).tolist(),
}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
def test_prescribed_spectra(name, which):
    A = matrix_with(SPECTRA[name])
    for k in (1, 4, 7):
        result = eigsh(A, k, which=which, tol=1e-10)
        assert result.converged
        check(A, result, k, which)


@pytest.mark.parametrize("n", [30, 500])
@pytest.mark.parametrize("k", [2, 4])
def test_identity_and_zero(n, k):
    identity = eigsh(torch.eye(n, dtype=torch.float64), k)
    torch.testing.assert_close(identity.values, torch.ones(k, dtype=torch.float64))
    assert identity.converged and identity.verified and identity.matvecs <= 2 * k + 1
    zero = eigsh(torch.zeros(n, n), k, which="LM")
    assert zero.converged and not zero.values.any() and not zero.residuals.any()


def test_all_copies_of_a_large_multiplicity_in_few_products():
    """Three copies of 10 in a sea of zeros: a random vector's first Ritz value there is 0.1 and says nothing."""
    d = torch.zeros(3000, dtype=torch.float64)
    d[[5, 500, 2500]] = 10.0
    result = eigsh(d.diag(), 3)
    torch.testing.assert_close(result.values, torch.full((3,), 10.0, dtype=torch.float64))
    assert result.verified and result.matvecs < 30


def test_well_separated_pairs_are_verified_cheaply():
    A = matrix_with([100.0, 90.0, 80.0, 70.0] + np.linspace(0, 1, 396).tolist())
    plain, verified = eigsh(A, 4, verify=False), eigsh(A, 4)
    assert plain.verified is None and verified.verified is True
    assert verified.matvecs - plain.matvecs <= 5


def test_signs_and_magnitudes():
    """E1, E2: the eigenvalue, not its size; LA is not LM."""
    A = torch.diag(torch.tensor([-10.0, 3.0, 1.0], dtype=torch.float64))
    assert float(eigsh(A, 1).values) == pytest.approx(3)
    assert float(eigsh(A, 1, which="LM").values) == pytest.approx(-10)
    assert float(eigsh(A, 1, which="SA").values) == pytest.approx(-10)
    assert eigsh(A, 2, which="LM").values.tolist() == pytest.approx([-10, 3])
    assert eigsh(A, 2, which="BE").values.tolist() == pytest.approx([3, -10])
    assert eigsh(A, 2, which="SA").values.tolist() == pytest.approx([1, -10])


@pytest.mark.parametrize("which", WHICH)
def test_everything_and_one_by_one(which):
    A = matrix_with(np.linspace(-2, 3, 17))
    whole = eigsh(A, 17, which=which)
    check(A, whole, 17, which, tol=1e-12)
    assert whole.converged and whole.matvecs == 17
    check(A, eigsh(A, 16, which=which), 16, which, tol=1e-12)
    one = eigsh(torch.tensor([[-4.0]]), 1, which=which)
    assert one.values.tolist() == [-4] and one.vectors.abs().tolist() == [[1]] and one.converged


@pytest.mark.parametrize("which", WHICH)
def test_restarts_bound_the_basis(which, monkeypatch):
    monkeypatch.setattr(lanczos, "BASIS_ROWS", 0)
    A = matrix_with([4.0, 4.0, 3.5, -5.0, -5.0] + np.linspace(-2, 2, 295).tolist())
    result = eigsh(A, 4, which=which, tol=1e-9, max_matvecs=4000)
    assert result.converged and result.matvecs > 3 * lanczos.BASIS_MINIMUM
    check(A, result, 4, which)


def test_agrees_with_scipy():
    A = matrix_with(np.sort(np.random.default_rng(1).normal(size=250)), seed=3)
    for which in WHICH:
        reference = scipy.sparse.linalg.eigsh(A.numpy(), k=6, which=which, return_eigenvectors=False)
        result = eigsh(A, 6, which=which, tol=1e-10, max_matvecs=2000)
        np.testing.assert_allclose(np.sort(result.values.numpy()), np.sort(reference), rtol=0, atol=1e-8)


def test_needs_no_more_products_than_scipy():
    A = matrix_with(np.concatenate([[20.0, 15.0, 12.0, 10.0], np.linspace(0, 1, 396)]))
    counted = Operator(A)
    scipy_operator = scipy.sparse.linalg.LinearOperator(
        A.shape, lambda v: (counted @ torch.as_tensor(v)).numpy(), dtype=np.float64
    )
    scipy.sparse.linalg.eigsh(scipy_operator, k=4, which="LA", tol=1e-4)
    assert eigsh(A, 4, tol=1e-4).matvecs <= counted.columns


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=24),
    st.sampled_from(WHICH),
    st.integers(0, 3),
    st.data(),
)
def test_any_symmetric_matrix(spectrum, which, seed, data):
    """Small integers: many repeated eigenvalues, zero matrices and ties in magnitude."""
    k = data.draw(st.integers(1, len(spectrum)))
    A = matrix_with(spectrum, seed)
    result = eigsh(A, k, which=which, tol=1e-10, seed=seed)
    assert result.converged
    check(A, result, k, which)


@pytest.mark.parametrize("blocks", [True, False])
def test_counts_every_column_and_takes_vectors_only_operators(blocks):
    A = Operator(matrix_with(SPECTRA["triple top"]), blocks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = eigsh(A, 4)
    assert result.matvecs == A.columns
    assert len(caught) == (0 if blocks else 1)
    assert blocks or "column by column" in str(caught[0].message)


def test_float32_and_bfloat16():
    A = matrix_with([10.0, 10.0, 5.0] + np.linspace(0, 1, 97).tolist())
    single = eigsh(A.float(), 3)
    assert single.vectors.dtype == torch.float32 and single.values.dtype == torch.float64 and single.converged
    check(A.float(), single, 3, "LA", tol=1e-6)
    half = A.bfloat16()
    dense = eigsh(half, 3)  # cast up once: exact products of the rounded matrix
    assert dense.vectors.dtype == torch.float32 and dense.converged
    check(half, dense, 3, "LA", tol=1e-6)
    with pytest.warns(RuntimeWarning, match="not converged"):
        operator = eigsh(Operator(half), 3, max_matvecs=100)  # rounds its operand and its answer to 8 bits
    assert not operator.converged and operator.vectors.dtype == torch.float32
    true = (half.double() @ operator.vectors.double() - operator.vectors.double() * operator.values).norm(dim=0)
    assert float(true.max()) < 0.1 and float(operator.residuals.max()) < 0.2
    np.testing.assert_allclose(operator.values, torch.linalg.eigvalsh(half.double()).flip(0)[:3], rtol=1e-2)


def test_too_few_matvecs_is_said_not_hidden():
    A = matrix_with(np.linspace(0, 1, 300))
    with pytest.warns(RuntimeWarning, match=r"not converged after 20 matvecs; worst residual .* raise max_matvecs"):
        result = eigsh(A, 4, tol=1e-6, max_matvecs=20)
    assert not result.converged and not result.pairs_converged.any() and result.matvecs <= 20
    check(A, result, 4, "LA", tol=1)  # the residuals are true all the same
    B = matrix_with([50.0, 40.0] + np.linspace(0, 39.9, 298).tolist())
    need = eigsh(B, 2, verify=False).matvecs
    with pytest.warns(RuntimeWarning, match="rule out repeated"):
        unverified = eigsh(B, 2, max_matvecs=need + 1)
    assert unverified.verified is False and not unverified.converged and unverified.pairs_converged.all()


def test_warm_start():
    A = matrix_with([12.0, 11.0, 10.0] + np.linspace(0, 9, 197).tolist())
    cold = eigsh(A, 1, tol=1e-6)
    moved = A + 1e-4 * matrix_with(np.linspace(-1, 1, 200), seed=5)
    warm = eigsh(moved, 1, tol=1e-3, v0=cold.vectors[:, 0])
    assert warm.converged and warm.matvecs <= 3
    check(moved, eigsh(moved, 3, tol=1e-9, v0=eigsh(A, 3).vectors), 3, "LA")
    # an exact eigenvector of the wrong eigenvalue: the breakdown gives it away, a near one needs verify=True
    D = torch.diag(torch.arange(60, dtype=torch.float64))
    assert float(eigsh(D, 1, v0=torch.eye(60)[3]).values) == pytest.approx(59)
    near = torch.eye(60)[3] + 1e-9 * torch.ones(60)
    assert float(eigsh(D, 1, v0=near, verify=True).values) == pytest.approx(59)


def test_a_hidden_outlier_is_not_missed():
    """n so large that a random vector has almost nothing of the outlier: the first residual is below tol already."""

    class Outlier:
        shape, dtype, device = (1_000_000, 1_000_000), torch.float32, "cpu"

        def __matmul__(self, v):
            product = v.clone()
            product[7] *= 1.05
            return product

    assert float(eigsh(Outlier(), 1, tol=1e-3).values) == pytest.approx(1.05, abs=1e-5)


def test_same_seed_same_bits():
    A = matrix_with(SPECTRA["clustered"])
    first, second, other = eigsh(A, 3, seed=7), eigsh(A, 3, seed=7), eigsh(A, 3, seed=8)
    assert torch.equal(first.values, second.values) and torch.equal(first.vectors, second.vectors)
    assert not torch.equal(first.vectors, other.vectors)


def test_prints_and_serialises():
    result = eigsh(matrix_with(range(20)), 8)
    assert "converged" in repr(result) and "matvecs" in repr(result)
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["values"] == result.values.tolist() and "vectors" not in plain
    assert np.shape(result.to_dict(vectors=True)["vectors"]) == (20, 8)
    eigsh(matrix_with(range(20)), 2, progress=True)


def test_wrong_inputs():
    A = matrix_with(range(10))
    for arguments, message in (
        ({"k": 0}, r"k=0; needs an integer >= 1"),
        ({"k": 11}, r"k=11 but A is \(10, 10\)"),
        ({"which": "LR"}, "needs 'LA', 'SA', 'LM' or 'BE'"),
        ({"tol": math.nan}, "tol=nan"),
        ({"k": 4, "max_matvecs": 7}, "max_matvecs=7; needs an integer >= 8"),
        ({"v0": torch.ones(9)}, r"v0 is \(9,\); needs"),
        ({"v0": torch.zeros(10)}, "v0 is zero or not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            eigsh(A, **arguments)
    with pytest.raises(ValueError, match=r"shape \(10, 9\); needs a square"):
        eigsh(A[:, :9])
    with pytest.raises(TypeError, match=r"without \.device"):
        eigsh(scipy.sparse.linalg.aslinearoperator(A.numpy()))
    with pytest.raises(TypeError, match="int64; needs a real floating"):
        eigsh(torch.eye(4, dtype=torch.int64))


def test_products_no_symmetric_matrix_gives():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    for k in (3, 60):
        with pytest.raises(ValueError, match="needs a symmetric A whose products do not change"):
            eigsh(A, k)
    noisy = Operator(matrix_with(range(60)), edit=lambda product, count: product * (1 + 0.1 * (count % 2)))
    with pytest.raises(ValueError, match="dropout, shuffled data"):
        eigsh(noisy, 3)


def test_an_operators_own_error_is_passed_on():
    """Only a plain refusal of the first block means "column by column"."""

    class StaleError(RuntimeError):
        pass

    def stale(product, count):
        raise StaleError("the loader shuffles")

    with pytest.raises(StaleError, match="the loader shuffles"):
        eigsh(Operator(matrix_with(range(4)), edit=stale), 4)


def test_nan_names_the_matvec():
    def poison(product, count):
        if count == 5:
            product[2] = math.nan
        return product

    with pytest.raises(FloatingPointError, match="eigsh: matvec 5 has NaN or inf"):
        eigsh(Operator(matrix_with(range(40)), edit=poison), 3)


def test_rounding_of_a_float32_matrix_warns_and_a_float64_one_raises():
    """Asymmetry of one percent: below float64 cancellation may explain it; in float64 only a wrong matrix does."""
    torch.manual_seed(0)
    a = torch.randn(40, 40, dtype=torch.float64)
    a = a @ a.T / 40 + 0.01 * torch.randn(40, 40, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs a symmetric A"):
        eigsh(a, k=1)
    with pytest.warns(UserWarning, match="rounding of products in this dtype"):
        eigsh(a.float(), k=1)
    with pytest.raises(ValueError, match="needs a symmetric A"):
        eigsh(torch.triu(a).float(), k=1)
