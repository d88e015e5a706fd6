"""Inverses of factors, and functions of a Kronecker block, against dense float64 linear algebra."""

import math

import pytest
import torch
from factor_cases import CASES, NAMES, TOLERANCE, everything, eye, prescribed, randn
from truths import relative

from hvpfast.operators.factor import Dense, Thin
from hvpfast.operators.spectral import (
    Spectrum,
    cholesky_inverses,
    eigendecompose,
    newton_schulz_inverses,
    pi,
    solve_all,
    thin_solve,
)

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
