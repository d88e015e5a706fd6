"""Factors, eigenbases, inverses and functions of a Kronecker block, against dense float64 linear algebra."""

import math

import pytest
import torch
from truths import relative

from hvpfast.operators import eigen
from hvpfast.operators.factor import Dense, Diagonal, Thin, from_state
from hvpfast.operators.spectral import (
    Eigen,
    Spectrum,
    cholesky_inverses,
    eigendecompose,
    newton_schulz_inverses,
    pi,
    solve_all,
    thin_solve,
)

TOLERANCE = 1e-10


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(groups, n, seed=0):
    return torch.linalg.qr(randn(groups, n, n, seed=seed))[0]


def prescribed(values, groups=1, seed=0):
    """Dense factor with these eigenvalues (n,), and its exact vectors."""
    values = torch.as_tensor(values, dtype=torch.float64).expand(groups, -1)
    q = orthogonal(groups, values.shape[-1], seed)
    return Dense((q * values[:, None]) @ q.mT)


def scaled_rows(groups, rank, n, low, seed=0):
    """Thin factor whose singular values fall from 1 to low."""
    u, v = orthogonal(groups, rank, seed), orthogonal(groups, n, seed + 1)[:, :rank]
    return Thin((u * torch.logspace(0, math.log10(low), rank, dtype=torch.float64)) @ v)


CASES = {
    "random": lambda: Dense(randn(1, 13, 17).mT.mT @ randn(1, 13, 17).mT / 17),
    "rank 3 of 11, kept dense": lambda: Dense(randn(1, 3, 11).mT @ randn(1, 3, 11)),
    "repeated eigenvalues": lambda: prescribed([0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 5.0]),
    "1e-12 to 1": lambda: prescribed(torch.logspace(-12, 0, 15)),
    "size 1": lambda: Dense(torch.tensor([[[3.0]]], dtype=torch.float64)),
    "zero": lambda: Dense(torch.zeros(1, 5, 5, dtype=torch.float64)),
    "3 groups": lambda: Dense(randn(3, 7, 9) @ randn(3, 7, 9).mT),
    "thin": lambda: Thin(randn(1, 4, 19)),
    "thin, 3 groups": lambda: Thin(randn(3, 5, 17)),
    "thin, 1e-7 to 1": lambda: scaled_rows(1, 9, 29, 1e-7),
    "thin, groups of different rank": lambda: Thin(
        torch.stack([randn(4, 12), torch.cat([randn(1, 12, seed=2)] * 4), torch.zeros(4, 12, dtype=torch.float64)])
    ),
    "thin, one row": lambda: Thin(randn(1, 1, 6)),
    "thin, zero": lambda: Thin(torch.zeros(1, 2, 9, dtype=torch.float64)),
    "thin, nearly square": lambda: Thin(randn(1, 10, 11)),
    "diagonal": lambda: Diagonal(randn(1, 8).square()),
    "diagonal, 2 groups, zeros in it": lambda: Diagonal(randn(2, 6).clamp_min(0)),
}
NAMES = list(CASES)


def everything():
    return [CASES[name]() for name in NAMES]


def eye(n):
    return torch.eye(n, dtype=torch.float64)


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


def test_refined_basis(monkeypatch):
    monkeypatch.setattr(eigen, "REFINE_FROM", 0)
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


def test_far_basis_is_computed_anew(monkeypatch):
    monkeypatch.setattr(eigen, "REFINE_FROM", 0)
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


# Inverses -------------------------------------------------------------------------------------------------------------


def test_cholesky_inverses():
    factors = everything() + everything()[:3]
    damping = [0.3, torch.tensor(0.2), *[0.1] * (len(factors) - 2)]
    damping[6] = torch.tensor([0.1, 0.2, 0.3])
    found = cholesky_inverses(factors, damping)
    for factor, d, inverse in zip(factors, damping, found, strict=True):
        d = torch.as_tensor(d, dtype=torch.float64).expand(factor.groups)[:, None, None]
        assert relative(inverse, torch.linalg.inv(factor.dense() + d * eye(factor.size))) < TOLERANCE
        assert (
            torch.equal(cholesky_inverses([factor], [d.flatten()])[0], inverse)
            or relative(cholesky_inverses([factor], [d.flatten()])[0], inverse) < 1e-13
        )
        if isinstance(factor, Thin):
            x = randn(factor.groups, factor.size, 2, seed=9)
            assert relative(thin_solve(factor, d.flatten(), x), inverse @ x) < TOLERANCE


def test_cholesky_without_damping():
    factor = CASES["random"]()
    (inverse,) = cholesky_inverses([factor], [0.0])
    assert relative(inverse, torch.linalg.inv(factor.dense())) < TOLERANCE
    ill = CASES["1e-12 to 1"]()
    (inverse,) = cholesky_inverses([ill], [0.0])
    assert float((inverse @ ill.dense() - eye(15)).abs().max()) < 1e-3  # condition number 1e12


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("rank", "zero", "thin", "diagonal, 2"))])
def test_singular_without_damping(name):
    with pytest.raises(ValueError, match=r"factor 1, .* singular with damping 0 .*give a damping > 0"):
        cholesky_inverses([CASES["random"](), CASES[name]()], [0.0, 0.0])


@pytest.mark.parametrize("kind", ["dense", "thin"])
def test_cholesky_goes_through_float64(kind):
    """Damping that float32 loses beside the factor's entries: float64 has it, and whole numbers are exact in both."""
    rows = (3 * randn(2, 5, 12)).round()
    factor = (Thin(rows) if kind == "thin" else Dense(rows.mT @ rows)).to(torch.float32)
    (inverse,) = cholesky_inverses([factor], [2.0**-20])
    truth = torch.linalg.inv(rows.mT @ rows + eye(12) * 2.0**-20)
    assert inverse.dtype is torch.float32 and relative(inverse.double(), truth) < 1e-6
    if kind == "thin":
        x = randn(2, 12, 3, dtype=torch.float32)
        assert relative(thin_solve(factor, 2.0**-20, x).double(), truth @ x.double()) < 1e-6


def test_not_semi_definite():
    with pytest.raises(ValueError, match="factor 0.*singular with damping 0.1"):
        cholesky_inverses([Dense(-torch.eye(3)[None])], [0.1])


def test_dampings_are_checked():
    factor = CASES["random"]()
    for solve in (cholesky_inverses, newton_schulz_inverses):
        with pytest.raises(ValueError, match="damping of factor 0 is -1"):
            solve([factor], [-1.0])
        with pytest.raises(ValueError, match="damping of factor 0 is nan"):
            solve([factor], [math.nan])
        with pytest.raises(ValueError, match="1 factors and 2 dampings"):
            solve([factor], [1.0, 1.0])


@pytest.mark.parametrize("root", [1, 2, 4])
def test_newton_schulz(root):
    factors = [f for f in everything() if f.size > 1]
    damping = [1e-2 * float(f.trace().max()) / f.size + 1e-3 for f in factors]
    found = newton_schulz_inverses(factors, damping, root=root, iterations=30)
    for factor, d, inverse in zip(factors, damping, found, strict=True):
        values, q = torch.linalg.eigh(factor.dense() + d * eye(factor.size))
        assert relative(inverse, (q * values.pow(-1 / root)[:, None]) @ q.mT) < TOLERANCE


@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_newton_schulz_in_float32(precision, condition):
    factor = prescribed(torch.logspace(-6, 0, 65)).to(torch.float32)
    (found,) = newton_schulz_inverses([factor], [1 / condition], precision=precision)
    truth = torch.linalg.inv(factor.dense().double() + eye(65) / condition)
    (cholesky,) = cholesky_inverses([factor], [1 / condition])
    assert relative(found.double(), truth) < max(5 * relative(cholesky.double(), truth), 1e-6)


def test_newton_schulz_refusals():
    with pytest.raises(ValueError, match="root is 3"):
        newton_schulz_inverses([], [], root=3)
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        newton_schulz_inverses([], [], precision="fp8")


# Damping ratio --------------------------------------------------------------------------------------------------------


def test_pi():
    a, g = CASES["thin, 3 groups"](), Dense(randn(3, 4, 4, seed=3) @ randn(3, 4, 4, seed=3).mT)
    truth = [
        math.sqrt((float(torch.trace(x)) / 17) / (float(torch.trace(y)) / 4))
        for x, y in zip(a.dense(), g.dense(), strict=True)
    ]
    torch.testing.assert_close(pi(a, g), torch.tensor(truth, dtype=torch.float64))
    zero = CASES["zero"]()
    assert pi(zero, CASES["random"]()).tolist() == pi(CASES["random"](), zero).tolist() == [1.0]


# One block ------------------------------------------------------------------------------------------------------------

BLOCKS = [(g, a) for a in NAMES for g in NAMES if CASES[a]().groups == CASES[g]().groups and NAMES.index(g) % 2]


def block(g, a, corrected):
    g, a = eigendecompose([g, a])
    values = randn(g.groups, g.rank, a.rank, seed=6).square() if corrected else None
    return Spectrum(g, a, values)


def kron(x, y):
    """torch.kron, which refuses some views of one column."""
    return torch.einsum("oi,pj->opij", x, y).reshape(x.shape[0] * y.shape[0], -1)


def dense_block(spectrum):
    """(B, O I, O I): the definition, with kron of the bases."""
    out = []
    for b in range(spectrum.shape[0]):
        q = kron(spectrum.g.basis()[b], spectrum.a.basis()[b])
        out.append((q * spectrum.values[b].flatten()) @ q.T)
    return torch.stack(out)


def function(matrix, f):
    values, q = torch.linalg.eigh(matrix)
    return (q * f(values)[:, None]) @ q.mT


def on(matrix, v):
    """Dense (B, P, P) on v (K, B, O, I)."""
    return (matrix @ v.flatten(2)[..., None]).reshape(v.shape)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("g_name", "a_name"), BLOCKS)
def test_block(g_name, a_name, corrected):
    g, a = CASES[g_name](), CASES[a_name]()
    spectrum = block(g, a, corrected)
    full = dense_block(spectrum)
    if not corrected:
        truth = torch.stack([kron(x, y) for x, y in zip(g.dense(), a.dense(), strict=True)])
        assert float((full - truth).norm()) <= 1e-12 * float(truth.norm())
    v = randn(2, *spectrum.shape, seed=8)
    damped = full + 0.1 * eye(full.shape[-1])
    inverse = torch.linalg.inv(damped)
    assert relative(spectrum.solve(v, 0.1), on(inverse, v)) < TOLERANCE
    assert float((spectrum.matmul(v) - on(full, v)).norm()) <= 1e-12 * float(full.norm() * v.norm())
    assert relative(spectrum.power(0.5, v, 0.1), on(function(damped, torch.sqrt), v)) < TOLERANCE
    assert relative(spectrum.sample(v, 0.1), on(function(damped, torch.rsqrt), v)) < TOLERANCE
    torch.testing.assert_close(spectrum.logdet(0.1), torch.linalg.slogdet(damped)[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(spectrum.trace(), full.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-11, atol=1e-12)
    diagonal = full.diagonal(dim1=1, dim2=2).reshape(spectrum.shape)
    torch.testing.assert_close(spectrum.diagonal(), diagonal, rtol=1e-11, atol=1e-11)

    def f(x):
        return 1 / (x + 0.1)

    torch.testing.assert_close(spectrum.trace(f), inverse.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-11, atol=1e-11)
    diagonal = inverse.diagonal(dim1=1, dim2=2).reshape(spectrum.shape)
    torch.testing.assert_close(spectrum.diagonal(f), diagonal, rtol=1e-10, atol=1e-10)
    assert relative(spectrum.apply(lambda x: (x + 1).log(), v + 1), on(function(full, torch.log1p), v + 1)) < 1e-9


def test_a_damping_for_each_group():
    spectrum = block(CASES["3 groups"](), CASES["thin, 3 groups"](), False)
    full, v = dense_block(spectrum), randn(2, *spectrum.shape)
    d = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    damped = full + d[:, None, None] * eye(full.shape[-1])
    assert relative(spectrum.solve(v, d), on(torch.linalg.inv(damped), v)) < TOLERANCE
    torch.testing.assert_close(spectrum.logdet(d), torch.linalg.slogdet(damped)[1], rtol=1e-11, atol=1e-11)
    trace = torch.linalg.inv(damped).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(spectrum.trace(lambda x: 1 / (x + eigenshape(d, x))), trace)


def eigenshape(d, x):
    return d[:, None, None]


def test_samples_have_the_inverse_as_covariance():
    spectrum = block(CASES["thin, one row"](), CASES["repeated eigenvalues"](), True)
    noise = randn(60000, *spectrum.shape, seed=11)
    samples = spectrum.sample(noise, 0.5).flatten(1)
    covariance = samples.T @ samples / len(samples)
    truth = torch.linalg.inv(dense_block(spectrum)[0] + 0.5 * eye(42))
    assert float((covariance - truth).abs().max()) < 5 * 2 * math.sqrt(2 / 60000)


def test_solve_all():
    pairs = [("random", "3"), ("repeated eigenvalues", "random"), ("3 groups", "thin, 3 groups"), ("size 1", "thin")]
    pairs = [(g, a if a != "3" else "zero") for g, a in pairs] + [("random", "diagonal")]
    spectra = [block(CASES[g](), CASES[a](), True) for g, a in pairs]
    vs = [randn(3, *s.shape, seed=i) for i, s in enumerate(spectra)]
    dampings = [0.1, 0.2, 0.3, 0.4, 0.5]
    for s, v, d, found in zip(spectra, vs, dampings, solve_all(spectra, vs, dampings), strict=True):
        truth = torch.linalg.inv(dense_block(s) + d * eye(s.shape[1] * s.shape[2]))
        assert found.shape == v.shape and relative(found, on(truth, v)) < TOLERANCE
    same = solve_all(spectra, vs, 0.1)
    assert all(relative(x, s.solve(v, 0.1)) < 1e-13 for x, s, v in zip(same, spectra, vs, strict=True))
    with pytest.raises(ValueError, match="5 blocks, 4 vectors"):
        solve_all(spectra, vs[:4], 0.1)


def test_block_refusals():
    thin, full = block(CASES["random"](), CASES["thin"](), False), block(CASES["random"](), CASES["random"](), False)
    for spectrum in (thin, block(CASES["random"](), CASES["zero"](), False)):
        v = randn(1, *spectrum.shape)
        for call in (lambda: spectrum.solve(v, 0.0), lambda: spectrum.power(-0.25, v), lambda: spectrum.sample(v, 0)):  # noqa: B023
            with pytest.raises(ValueError, match="singular and the damping 0; give a damping > 0"):
                call()
        assert spectrum.logdet().tolist() == [-math.inf]
    with pytest.raises(ValueError, match=r"rank 4 of 19.* f\(0\) is inf"):
        thin.apply(lambda x: 1 / x, randn(1, 1, 13, 19))
    with pytest.raises(ValueError, match="damping is -1"):
        full.solve(randn(1, 1, 13, 13), -1)
    with pytest.raises(ValueError, match=r"v has shape \(13, 13\)"):
        full.solve(randn(13, 13), 1.0)
    with pytest.raises(ValueError, match="values has shape"):
        Spectrum(full.g, full.a, torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="G has 3 groups and A 1"):
        Spectrum(*eigendecompose([CASES["3 groups"](), CASES["random"]()]))
