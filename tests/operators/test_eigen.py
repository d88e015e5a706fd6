"""Factors and their eigenbases, against dense float64 linear algebra."""

import pytest
import torch
from factor_cases import CASES, NAMES, TOLERANCE, everything, eye, orthogonal, prescribed, randn, scaled_rows
from truths import relative

from hvpfast.operators import eigen
from hvpfast.operators.factor import Dense, Diagonal, Thin, from_state
from hvpfast.operators.spectral import (
    Eigen,
    cholesky_inverses,
    eigendecompose,
)

# Factors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_factor_parts(name):
    factor = CASES[name]()
    dense, x = factor.dense(), randn(factor.groups, factor.size, 3, seed=5)
    assert dense.shape == (factor.groups, factor.size, factor.size)
    torch.testing.assert_close(factor.trace(), dense.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factor.diagonal(), dense.diagonal(dim1=1, dim2=2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factor.matmul(x), dense @ x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(factor.scaled(2.5).dense(), 2.5 * dense)
    c = torch.arange(1.0, factor.groups + 1, dtype=torch.float64)
    torch.testing.assert_close(factor.scaled(c).dense(), c[:, None, None] * dense)
    back = from_state(factor.state())
    assert type(back) is type(factor) and torch.equal(back.dense(), dense)
    assert factor.nbytes == sum(x.numel() * 8 for x in factor.tensors())
    assert factor.to(torch.float32).dtype is torch.float32


@pytest.mark.parametrize("first", ["dense", "thin", "short"])
@pytest.mark.parametrize("second", ["dense", "thin", "short"])
def test_ema(first, second):
    make = {
        "dense": lambda seed: Dense(randn(2, 9, 12, seed=seed) @ randn(2, 9, 12, seed=seed).mT),
        "thin": lambda seed: Thin(randn(2, 6, 9, seed=seed)),
        "short": lambda seed: Thin(randn(2, 2, 9, seed=seed)),
    }
    a, b = make[first](1), make[second](2)
    truth, untouched = 0.9 * a.dense() + 0.1 * b.dense(), b.dense().clone()
    result = a.ema(b, 0.9)
    assert relative(result.dense(), truth) < 1e-14
    assert torch.equal(b.dense(), untouched)
    total = result.plus(b)
    assert relative(total.dense(), truth + untouched) < 1e-14
    assert isinstance(result, Thin) == ({first, second} <= {"thin", "short"} and (first, second) != ("thin", "thin"))


def test_ema_works_in_place_on_a_dense_factor():
    a = Dense(randn(1, 5, 5).square())
    storage = a.matrix.data_ptr()
    assert a.ema(Thin(randn(1, 2, 5)), 0.5).matrix.data_ptr() == storage
    assert a.ema(Dense(randn(1, 5, 5)), 0.5).matrix.data_ptr() == storage
    values = Diagonal(randn(1, 5).square())
    truth = 0.25 * values.values + 0.75
    assert torch.allclose(values.ema(Diagonal(torch.ones(1, 5, dtype=torch.float64)), 0.25).values, truth)


def test_ema_at_its_ends():
    a, b = Dense(randn(1, 4, 4)), Thin(randn(1, 2, 4))
    assert torch.equal(a.ema(b, 1.0).dense(), a.dense())
    fresh = a.ema(b, 0.0)
    assert torch.equal(fresh.dense(), b.dense()) and fresh.data.data_ptr() != b.data.data_ptr()


def test_factor_refusals():
    with pytest.raises(ValueError, match=r"Dense: got shape \(3, 4\); it must be \(B, I, I\).*unsqueeze"):
        Dense(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="Dense: got shape"):
        Dense(torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="Thin: got shape"):
        Thin(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="int64"):
        Diagonal(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        Diagonal([1.0])
    with pytest.raises(ValueError, match="decay is 1.5"):
        Diagonal(torch.zeros(1, 4)).ema(Diagonal(torch.zeros(1, 4)), 1.5)
    with pytest.raises(ValueError, match="same groups and size"):
        Diagonal(torch.zeros(1, 4)).plus(Diagonal(torch.zeros(2, 4)))
    with pytest.raises(ValueError, match="diagonal one only"):
        Diagonal(torch.zeros(1, 4)).plus(Dense(torch.zeros(1, 4, 4)))
    with pytest.raises(ValueError, match="weights"):
        Diagonal(torch.zeros(1, 4)).plus(Diagonal(torch.zeros(1, 4)), others=-1.0)
    with pytest.raises(ValueError, match="from_state"):
        from_state({"spare": torch.zeros(1)})
    assert Dense(torch.zeros(1, 2, 2, dtype=torch.bfloat16)).dtype is torch.float32


# Eigenbases -----------------------------------------------------------------------------------------------------------


def check_eigen(found, factor, tolerance):
    """A = Q diag Q', Q'Q = I, the eigenvalues those of a dense float64 eigvalsh."""
    truth = factor.dense().double()
    norm = truth.norm().clamp_min(1e-300)
    q, values = found.basis().double(), found.values.double()
    assert (values >= 0).all() and found.values.dtype is factor.dtype
    assert float((q.mT @ q - eye(found.rank)).abs().max()) < tolerance
    assert float(((q * values[:, None]) @ q.mT - truth).norm() / norm) < tolerance
    assert float((truth @ q - q * values[:, None]).norm() / norm) < tolerance
    padded = torch.cat([values.new_zeros(found.groups, found.size - found.rank), values], 1).sort().values
    assert float((padded - torch.linalg.eigvalsh(truth).clamp_min(0)).abs().max() / norm) < tolerance


def test_eigendecompose():
    factors = everything()
    for name, factor, found in zip(NAMES, factors, eigendecompose(factors), strict=True):
        check_eigen(found, factor, 1e-12)
        truth = factor.dense()
        torch.testing.assert_close(found.dense(), truth, rtol=1e-12, atol=1e-12)
        x = randn(2, factor.groups, factor.size, 3, seed=4)
        inverse = torch.linalg.inv(truth + 0.1 * eye(factor.size))
        assert relative(found.apply(lambda v: 1 / (v + 0.1), x), inverse @ x) < TOLERANCE, name
        d = torch.linspace(0.1, 0.3, factor.groups, dtype=torch.float64)[:, None]
        inverse = torch.linalg.inv(truth + d[..., None] * eye(factor.size))
        assert relative(found.apply(lambda v: 1 / (v + d), x), inverse @ x) < TOLERANCE, name  # noqa: B023
        thin = "thin" in name and "nearly" not in name
        assert found.route == ("thin" if thin else "diagonal" if "diagonal" in name else "eigh"), name
        assert found.complete == (not thin)


def test_batched_is_one_by_one():
    factors = everything() + everything()
    for factor, found in zip(factors, eigendecompose(factors), strict=True):
        (alone,) = eigendecompose([factor])
        torch.testing.assert_close(found.values, alone.values, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found.dense(), alone.dense(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("low", [1.0, 1e-2, 1e-4, 1e-6])
def test_float32_rows_give_orthonormal_vectors(low):
    factor = scaled_rows(1, 40, 150, low).to(torch.float32)
    (found,) = eigendecompose([factor])
    check_eigen(found, factor, 2e-6)
    # Squared singular values: what is left out is below 8 eps of the largest.
    singular = torch.linalg.svdvals(factor.rows.double())[0].square()
    assert found.rank == int((singular > 8 * torch.finfo(torch.float32).eps * singular[0]).sum())


@pytest.mark.parametrize("n", [1, 31, 257])
def test_float32(n):
    factor = Dense(randn(2, n, 2 * n, dtype=torch.float32) @ randn(2, n, 2 * n, dtype=torch.float32).mT / n)
    (found,) = eigendecompose([factor])
    check_eigen(found, factor, 1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_extreme_scales(scale):
    factor = Dense(scale * randn(1, 9, 20, dtype=torch.float32) @ randn(1, 9, 20, dtype=torch.float32).mT)
    (found,) = eigendecompose([factor])
    check_eigen(Eigen(found.values / scale, found.vectors, 9), factor.scaled(1 / scale), 1e-5)


def test_not_finite():
    factors = everything()
    factors[2] = Dense(torch.full((1, 3, 3), torch.nan))
    factors[4] = Thin(torch.tensor([[[1.0, torch.inf]]]))
    for solve in (eigendecompose, lambda f: cholesky_inverses(f, [1.0] * len(f))):
        with pytest.raises(ValueError, match=r"factor 2, 4 \(of 16\) holds NaN or infinity"):
            solve(factors)
    largest = torch.finfo(torch.float32).max  # finite, though its sum is not
    (found,) = eigendecompose([Dense(torch.diag(torch.full((3,), largest / 2))[None])])
    assert torch.isfinite(found.values).all()


def test_lapack_fails_once(monkeypatch):
    """float32 that fails, or gives what does not fit, goes through float64; where that fails too, the factor is named."""
    factor = Dense(randn(1, 6, 6, dtype=torch.float32) @ randn(1, 6, 6, dtype=torch.float32).mT)
    real, calls = torch.linalg.eigh, []

    def failing(a):
        calls.append(a.dtype)
        if a.dtype is torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(a)

    def skewed(a):
        values, vectors = real(a)
        return (values, vectors * 1.01) if a.dtype is torch.float32 else (values, vectors)

    def silent(a):
        values, vectors = real(a)
        return (values * torch.nan, vectors) if a.dtype is torch.float32 else (values, vectors)

    for fake in (failing, skewed, silent):
        monkeypatch.setattr(torch.linalg, "eigh", fake)
        (found,) = eigendecompose([factor])
        check_eigen(found, factor, 1e-6)
    assert calls == [torch.float32, torch.float64]

    def never(a):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", never)
    with pytest.raises(ValueError, match="factor 1 could not be decomposed in torch.float32 nor in float64"):
        eigendecompose([Diagonal(torch.ones(1, 3)), factor])


# Warm start -----------------------------------------------------------------------------------------------------------


def separated(n, seed=0):
    return prescribed(torch.linspace(1, n, n), seed=seed)


def test_kept_basis():
    before = eigendecompose([separated(20)])
    scaled = [separated(20).scaled(3.0)]
    (found,) = eigendecompose(scaled, previous=before)
    assert found.route == "kept" and found.vectors is before[0].vectors and found.offdiagonal < 1e-12
    check_eigen(found, scaled[0], 1e-12)


def nudged(factor, size, seed=7):
    noise = randn(*factor.matrix.shape, seed=seed)
    noise = noise + noise.mT
    return Dense(factor.matrix + size * factor.matrix.norm() / noise.norm() * noise)


def test_offdiagonal_mass_is_what_it_says():
    first = separated(24)
    before = eigendecompose([first])
    moved = nudged(first, 5e-3)
    (found,) = eigendecompose([moved], previous=before)
    q = before[0].vectors
    s = q.mT @ moved.dense() @ q
    off = (s - torch.diag_embed(s.diagonal(dim1=1, dim2=2))).norm() / s.norm()
    assert found.route == "kept" and abs(found.offdiagonal - float(off)) < 1e-12
    assert relative(found.dense(), moved.dense()) == pytest.approx(found.offdiagonal, rel=1e-9)


def test_refined_basis():
    first = separated(24)
    before = eigendecompose([first])
    moved = nudged(first, 5e-4)
    (found,) = eigendecompose([moved], previous=before, tolerance=1e-4)
    assert found.route == "refined" and found.offdiagonal < 1e-4
    truth = torch.linalg.eigvalsh(moved.dense())
    assert relative(found.values.sort().values, truth) < 1e-7  # their error is of second order in what is left
    assert float((found.vectors.mT @ found.vectors - eye(24)).abs().max()) < 1e-4
    assert relative(found.dense(), moved.dense()) < 1e-4
    skewed = Eigen(found.values, found.vectors + 1e-3 * randn(1, 24, 24), 24)  # turns do not mend a basis: it is left
    (again,) = eigendecompose([moved], previous=[skewed], tolerance=1e-4)
    assert again.route == "eigh"
    check_eigen(again, moved, 1e-12)


def test_large_bases_are_not_refined_where_that_is_slower(monkeypatch):
    monkeypatch.setattr(eigen, "REFINE_UP_TO", 23)
    first = separated(24)
    (found,) = eigendecompose([nudged(first, 5e-4)], previous=eigendecompose([first]), tolerance=1e-4)
    assert found.route == "eigh"


def test_far_basis_is_computed_anew():
    before = eigendecompose([separated(24, seed=3)])
    (found,) = eigendecompose([separated(24)], previous=before)
    assert found.route == "eigh"
    check_eigen(found, separated(24), 1e-12)


def test_a_cluster_alone_does_not_ask_for_more():
    """Within an eigenvalue's own space any basis will do; the mass sees none."""
    values = torch.tensor([1.0] * 6 + [2.0] * 6)
    factor = prescribed(values)
    (before,) = eigendecompose([factor])
    turned = before.vectors.clone()
    turned[:, :, :6] = turned[:, :, :6] @ orthogonal(1, 6, seed=4)
    (found,) = eigendecompose([factor], previous=[Eigen(before.values, turned, 12)], tolerance=1e-12)
    assert found.route == "kept"


def test_previous_of_all_kinds():
    factors = everything()
    before = eigendecompose(factors)
    for index, (factor, found) in enumerate(zip(factors, eigendecompose(factors, previous=before), strict=True)):
        check_eigen(found, factor, 1e-12)
        dense = before[index].vectors is not None and before[index].complete
        assert found.route == ("kept" if dense and before[index].route == "eigh" else before[index].route)
    shifted = eigendecompose(factors, previous=[None, *before[:-1]])
    for factor, found in zip(factors, shifted, strict=True):
        check_eigen(found, factor, eigen.TOLERANCE * 3)
    with pytest.raises(ValueError, match="16 factors and 1 previous"):
        eigendecompose(factors, previous=before[:1])


def test_eigen_state():
    for found in eigendecompose(everything()):
        back = Eigen.from_state(found.state())
        assert torch.equal(back.dense(), found.dense()) and back.size == found.size
        assert found.to(torch.float32).values.dtype is torch.float32
        assert found.nbytes == sum(8 * x.numel() for x in found.tensors())
