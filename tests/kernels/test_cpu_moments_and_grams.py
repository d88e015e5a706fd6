"""rotated_second_moment's and sample_gram's CPU launchers, tier by tier; the ops over lists of layers."""

import pytest
import tiers
import torch

from hvpfast import ops
from hvpfast.dispatch import precision
from hvpfast.testing import LAYOUTS, assert_accurate, error, make_inputs

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = ((1, 1, 1, 1, 1), (17, 1, 65, 3, 3), (65, 1, 70, 40, 1), (3, 17, 63, 65, 2), (0, 1, 5, 3, 1), (3, 2, 0, 4, 1))


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("rotated_second_moment", "sample_gram"))
def test_sizes_and_layouts(tier, dtype, name):
    op = getattr(ops, name)
    with tiers.forced(tier):
        for n, t, i, o, k in SIZES:
            for layout in LAYOUTS:
                args, kwargs = make_inputs(name, n=n, t=t, i=i, o=o, k=k, dtype=dtype, layout=layout)
                if op.why_not("cpu", *args, **kwargs) is not None:
                    assert name == "sample_gram" and t > 1
                    continue
                for mode in ("ieee", "auto"):
                    with precision(mode):
                        got = op.on("cpu")(*args, **kwargs)
                    assert_accurate(got, op, *args, precision="ieee" if mode == "ieee" else "bf16x3")


def test_two_sets_of_samples_in_every_regime():
    for t, t2, i, o in ((1, 1, 4, 3), (2, 3, 30, 40), (5, 4, 3, 2), (1, 2, 20, 20), (0, 2, 3, 3)):
        (a, g), _ = make_inputs("sample_gram", n=3, t=t, i=i, o=o, k=2, dtype=torch.float64)
        (a2, g2), _ = make_inputs("sample_gram", n=4, t=t2, i=i, o=o, dtype=torch.float64, seed=1)
        truth = ops.sample_grads.reference(a, g).flatten(1) @ ops.sample_grads.reference(a2, g2).flatten(1).T
        assert max(error(ops.sample_gram(a, g, a2, g2), truth)) < 1e-13
        assert max(error(ops.sample_gram(a2, g2, a, g), truth.T)) < 1e-13


def test_chunks_do_not_change_the_result(monkeypatch):
    for t, i, o in ((2, 30, 40), (9, 6, 7)):
        args, _ = make_inputs("sample_gram", n=5, t=t, i=i, o=o, k=2, dtype=torch.float64)
        whole = ops.sample_gram(*args)
        with monkeypatch.context() as patched:
            patched.setattr("hvpfast.ops.samples._CHUNK", 64)
            assert max(error(ops.sample_gram(*args), whole)) < 1e-14


def test_lists_of_layers():
    layers = [make_inputs("kron_solve", i=i, o=o, k=k, dtype=torch.float64)[0] for i, o, k in ((5, 3, 1), (2, 7, 4))]
    v, qg, qa, values, _ = zip(*layers, strict=True)
    single = [ops.kron_solve(*layer[:4], 0.1 * (1 + at)) for at, layer in enumerate(layers)]
    together = ops.kron_solve(list(v), list(qg), list(qa), list(values), [0.1, 0.2])
    assert all(torch.equal(x, y) for x, y in zip(single, together, strict=True))
    together = ops.kron_solve(v, qg, qa, values, 0.1)
    assert torch.equal(together[0], single[0]) and not torch.equal(together[1], single[1])
    single = [ops.kron_apply(b, x, a) for b, x, a in zip(qg, v, qa, strict=True)]
    together = ops.kron_apply(qg, v, qa)
    assert isinstance(together, list) and all(torch.equal(x, y) for x, y in zip(single, together, strict=True))
    assert max(error(ops.kron_apply(qg[1], v[1][2], qa[1]), single[1][2])) < 1e-14


def test_solving_undoes_the_damped_block():
    """With orthogonal eigenvectors, (G (x) A + damping) applied to the solution gives v back."""
    generator = torch.Generator().manual_seed(0)
    a, g, v = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 5), (9, 3), (2, 3, 5)))
    a, g = a.T @ a, g.T @ g
    (la, qa), (lg, qg) = torch.linalg.eigh(a), torch.linalg.eigh(g)
    x = ops.kron_solve(v, qg, qa, torch.outer(lg, la), 0.3)
    assert max(error(ops.kron_apply(g, x, a) + 0.3 * x, v)) < 1e-12
