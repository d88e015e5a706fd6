"""What is made of K-FAC and EKFAC: inverses, functions, draws, states and errors, against dense linear algebra."""

import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from truths import relative
from zoo import make, unequal

import hvpfast as hf
from hvpfast.capture import kronecker

TOLERANCE = 1e-9
MODELS = ("mlp", "cnn, groups and dilation", "attention", "batchnorm in eval", "recurrent", "tied")


pytestmark = pytest.mark.usefixtures("float64")


def operator(kind, name, **options):
    case = make(name)
    y = torch.arange(6) % case.classes
    return kind(case.model, F.cross_entropy, unequal(case.inputs, y), **{"fisher_type": "type-2", **options})


@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
@pytest.mark.parametrize("name", MODELS)
def test_functions_of_the_operator(kind, name):
    k = operator(kind, name)
    dense = k.to_dense()
    p, eye = dense.shape[0], torch.eye(dense.shape[0])
    assert relative(dense, dense.T) < TOLERANCE
    v = torch.randn(p, 2)
    assert relative(k.trace(), dense.trace()) < TOLERANCE
    assert relative(k.frobenius_norm(), dense.norm()) < TOLERANCE
    assert relative(k.diagonal(), dense.diagonal()) < TOLERANCE
    assert relative(k.eigenvalues(), torch.linalg.eigvalsh(dense).clamp(min=0)) < 1e-7
    damping = 0.03
    inverse = k.inverse(damping)
    truth = torch.linalg.inv(dense + damping * eye)
    assert relative(inverse @ v, truth @ v) < TOLERANCE
    assert relative(inverse.to_dense(), truth) < TOLERANCE
    assert relative(inverse.diagonal(), truth.diagonal()) < TOLERANCE
    assert relative(inverse.trace(), truth.trace()) < TOLERANCE
    assert relative(k.logdet(damping), torch.logdet(dense + damping * eye)) < TOLERANCE
    assert relative(inverse.logdet(), -torch.logdet(dense + damping * eye)) < TOLERANCE
    assert relative(k.power(0.5, damping) @ (k.power(0.5, damping) @ v), (dense + damping * eye) @ v) < TOLERANCE
    named = dict(zip(k.params, k.space.split(v.T), strict=True))
    back = inverse @ {name: part.movedim(0, -1) for name, part in named.items()}
    joined = torch.cat([part.reshape(-1, 2) for part in back.values()])
    assert relative(joined, truth @ v) < TOLERANCE


@pytest.mark.parametrize("name", ["mlp", "cnn, groups and dilation", "attention"])
@pytest.mark.parametrize("method", ["pi", "uniform"])
def test_factored_damping(name, method):
    k = operator(hf.KFAC, name)
    damping, inverse = 0.05, operator(hf.KFAC, name).inverse(0.05, method)
    v = torch.randn(k.shape[0])
    got = dict(zip(k.params, (inverse @ v).split(k.space.sizes), strict=True))
    start = dict(zip(k.params, v.split(k.space.sizes), strict=True))
    logdet = 0.0
    for block in k.blocks():
        if not hasattr(block, "a"):
            shifted = block.values + damping * torch.eye(len(block.values))
            flat = torch.cat([start[name] for name in block.names])
            assert (
                relative(torch.cat([got[name] for name in block.names]), torch.linalg.solve(shifted, flat)) < TOLERANCE
            )
            logdet -= torch.logdet(shifted)
            continue
        parts = [start[name].reshape(1, *k.params[name].shape) for name in block.names]
        from hvpfast.operators.blocks import joined

        matrix = joined(block.layout, parts)[0]
        for b, (a, g) in enumerate(zip(block.a.dense(), block.g.dense(), strict=True)):
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
            da, dg = (math.sqrt(damping) * pi, math.sqrt(damping) / pi) if method == "pi" else (damping, damping)
            a, g = a + da * torch.eye(len(a)), g + dg * torch.eye(len(g))
            matrix[b] = torch.linalg.solve(g, torch.linalg.solve(a, matrix[b].T).T)
            logdet -= len(g) * torch.logdet(a) + len(a) * torch.logdet(g)
        for name, truth in zip(block.names, block.layout.split(matrix.unsqueeze(0)), strict=True):
            assert relative(got[name], truth.reshape(-1)) < TOLERANCE
    assert relative(inverse.logdet(), logdet) < TOLERANCE
    assert relative(inverse.trace(), inverse.to_dense().trace()) < TOLERANCE
    assert relative(inverse.diagonal(), inverse.to_dense().diagonal()) < TOLERANCE


@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
def test_draws_have_the_inverse_as_covariance(kind):
    k = operator(kind, "mlp")
    n = 40_000
    x = k.sample(n, damping=0.5, generator=torch.Generator().manual_seed(1))
    truth = torch.linalg.inv(k.to_dense() + 0.5 * torch.eye(k.shape[0]))
    assert x.shape == (k.shape[0], n)
    assert relative(x @ x.T / n, truth) < 4 * math.sqrt(k.shape[0] / n)
    again = k.sample(n, damping=0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(x, again)


@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
@pytest.mark.parametrize("name", ["mlp", "cnn, groups and dilation", "attention"])
def test_states(kind, name):
    k = operator(kind, name, seed=3)
    file = io.BytesIO()
    torch.save(k.state_dict(), file)
    file.seek(0)
    other = operator(kind, name)
    other.load_state_dict(torch.load(file, weights_only=True))
    v = torch.randn(k.shape[0])
    assert torch.equal(k @ v, other @ v)
    assert torch.equal(k.inverse(0.1) @ v, other.inverse(0.1) @ v)
    with pytest.raises(ValueError, match="another model: .* parameters differ, first"):
        operator(kind, "conv3d").load_state_dict(k.state_dict())
    with pytest.raises(ValueError, match="no state of"):
        other.load_state_dict({"a": 1})
    wrong = hf.EKFAC if kind is hf.KFAC else hf.KFAC
    with pytest.raises(ValueError, match="the state is of"):
        operator(wrong, name).load_state_dict(k.state_dict())


def test_a_snapshot_until_refreshed():
    case = make("mlp")
    y = torch.arange(6) % 3
    k = hf.KFAC(case.model, F.cross_entropy, (case.inputs, y), fisher_type="type-2")
    before = k.to_dense()
    with torch.no_grad():
        case.model[0].weight.mul_(1.5)
    assert torch.equal(k.to_dense(), before)
    k.refresh()
    after = hf.KFAC(case.model, F.cross_entropy, (case.inputs, y), fisher_type="type-2").to_dense()
    assert torch.equal(k.to_dense(), after) and not torch.equal(before, after)


def test_seeds():
    """One seed, one number; the draws do not touch torch's own random state."""
    one, two, three = (operator(hf.KFAC, "mlp", fisher_type="mc", seed=s) for s in (0, 0, 1))
    before = torch.get_rng_state()
    assert torch.equal(one.to_dense(), two.to_dense())
    assert relative(three.to_dense(), one.to_dense()) > 1e-3
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
@pytest.mark.parametrize("name", MODELS)
def test_ekfac_of_one_batch_runs_the_model_once(name, fisher_type):
    """Its two passes are over one graph: the operator is that of two runs, which asking for the factors first makes."""
    case = make(name)
    data, runs = (case.inputs, torch.arange(len(case.inputs)) % case.classes), []
    handle = case.model.register_forward_hook(lambda *_: runs.append(case.model.training))
    twice = hf.EKFAC(case.model, F.cross_entropy, data, fisher_type=fisher_type)
    assert twice.factors and (own := twice.to_dense()) is not None
    before = len(runs)
    once = hf.EKFAC(case.model, F.cross_entropy, data, fisher_type=fisher_type)
    assert torch.equal(once.to_dense(), own)
    assert once._held is None and once.factors.keys() == twice.factors.keys()
    assert len(runs) - before == before - 1  # rows by autograd run the model for themselves
    handle.remove()


@pytest.mark.parametrize("name", ["mlp", "attention", "recurrent", "tied"])
def test_rotated_moments_a_few_samples_at_a_time(name, monkeypatch):
    whole = operator(hf.EKFAC, name).to_dense()
    monkeypatch.setattr(kronecker, "_MANY", 0)
    for chunk in (1, 400):
        monkeypatch.setattr(kronecker, "_CHUNK", chunk)
        assert relative(operator(hf.EKFAC, name).to_dense(), whole) < TOLERANCE


def test_ekfac_that_fails_between_its_passes_lets_the_graph_go(monkeypatch):
    case = make("mlp")
    data = case.inputs, torch.arange(len(case.inputs)) % 3
    k = hf.EKFAC(case.model, F.cross_entropy, data)
    monkeypatch.setattr(k, "_bases", lambda blocks: (_ for _ in ()).throw(ValueError("no basis")))
    with pytest.raises(ValueError, match="no basis"):
        k.trace()
    assert k._held is None and not case.model[0]._forward_hooks
    monkeypatch.undo()
    assert torch.equal(k.to_dense(), hf.EKFAC(case.model, F.cross_entropy, data).to_dense())


def test_factors_by_name():
    k = operator(hf.KFAC, "attention")
    assert k.factors["embedding"].A.shape == (7,)
    assert k.factors["layer.self_attn"].G.shape == (12, 12)
    assert k.factors["layer.self_attn.out_proj"].A.shape == (5, 5)
    grouped = operator(hf.KFAC, "cnn, groups and dilation").factors["0"]
    assert grouped.A.shape == (2, 10, 10) and grouped.G.shape == (2, 2, 2)


def test_memory_says_what_the_factors_take():
    k = operator(hf.KFAC, "cnn, groups and dilation")
    memory = k.memory()
    kept = sum(
        block.values.numel() if hasattr(block, "values") else sum(f.data.numel() for f in (block.a, block.g))
        for block in k.blocks()
    )
    assert memory.factors == 8 * kept
    assert memory.model == 8 * sum(p.numel() for p in k.problem.model.parameters())
    assert memory.total == memory.model + memory.activations + memory.factors


# What must raise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
def test_singular_without_damping(kind):
    case = make("mlp")
    k = kind(case.model, F.cross_entropy, (case.inputs[:1], torch.tensor([1])), fisher_type="type-2")
    with pytest.raises(ValueError, match="'0'.*singular.*larger damping"):
        k.inverse()
    assert k.logdet() == -math.inf
    assert bool(torch.isfinite(k.inverse(1e-6) @ torch.randn(k.shape[0])).all())
    if kind is hf.KFAC:
        with pytest.raises(ValueError, match="singular|damping"):
            k.inverse(0.0, "pi")


def test_arguments_that_do_not_fit():
    case = make("mlp")
    data = (case.inputs, torch.arange(6) % 3)
    for options, message in (
        ({"fisher_type": "type2"}, "one of type-2, mc"),
        ({"kfac_approx": "mean"}, "'expand' or 'reduce'"),
        ({"mc_samples": 0}, "positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.KFAC(case.model, F.cross_entropy, data, **options)
    with pytest.raises(ValueError, match="forward-only"):
        hf.EKFAC(case.model, F.cross_entropy, data, fisher_type="forward-only")
    k = hf.KFAC(case.model, F.cross_entropy, data)
    with pytest.raises(ValueError, match="'exact', 'pi' or 'uniform'"):
        k.inverse(0.1, "heuristic")
    with pytest.raises(ValueError, match="only 'exact'"):
        hf.EKFAC(case.model, F.cross_entropy, data).inverse(0.1, "pi")
    for damping in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="zero or more"):
            k.inverse(damping)


def test_bad_models_and_data():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(hf.StateError, match="[Dd]ropout"):
        hf.KFAC(model, F.cross_entropy, (x, y)).trace()
    norm = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.raises(hf.StateError, match="BatchNorm"):
        hf.KFAC(norm, F.cross_entropy, (x, y)).trace()
    model.eval()
    with pytest.raises(hf.NonFiniteError, match="NaN"):
        hf.KFAC(model, F.cross_entropy, (x.clone().fill_(math.nan), y)).trace()
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    with pytest.raises(hf.NonFiniteError, match="0.weight|inf"):
        hf.KFAC(model, F.cross_entropy, (x, y)).trace()
    with pytest.raises(hf.NonFiniteError, match="ignored"):
        hf.KFAC(norm.eval(), F.cross_entropy, (x, torch.full((6,), -100))).trace()


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_never_ran():
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    for kind in (hf.KFAC, hf.EKFAC):
        with pytest.raises(ValueError, match="no data reach parameter 'unused"):
            kind(Unused(), F.cross_entropy, (x, y)).trace()


class Moody(nn.Module):
    """Runs its layer once or twice, by the batch's size."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        for _ in range(1 + len(x) % 2):
            x = torch.tanh(self.inner(x))
        return self.head(x)


def test_a_model_that_changes_from_batch_to_batch():
    """Calls may differ in number, which changes no block; parameters in other layers are refused."""
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    k = hf.KFAC(Moody(), F.cross_entropy, [(x[:2], y[:2]), (x[2:], y[2:])], fisher_type="type-2")
    assert float(k.trace()) > 0

    class Switching(Unused):
        def forward(self, x):
            return F.linear(x, self.used.weight) + self.used.bias if len(x) == 3 else self.used(x)

    model = Switching()
    with pytest.raises(hf.StateError, match="other layers than the first batch"):
        hf.KFAC(model, F.cross_entropy, [(x[:2], y[:2]), (x[2:], y[2:])], params=list(model.used.parameters())).trace()


class TimeFirst(nn.Module):
    """(N, T, 4), with a layer over (T, N, 4)."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).transpose(0, 1).mean(1))


@pytest.mark.parametrize("kind, approx", [(hf.EKFAC, "expand"), (hf.KFAC, "reduce")])
def test_a_last_batch_of_one_sample_with_time_first(kind, approx):
    """(1, 1) rows look like a batch of one, which in the first batch they were not."""
    model, x, y = TimeFirst(), torch.randn(7, 1, 4), torch.arange(7) % 3
    found = []
    for cut in ([4, 3], [6, 1], [3, 3, 1]):
        data = list(zip(x.split(cut), y.split(cut), strict=True))
        found.append(kind(model, F.cross_entropy, data, fisher_type="type-2", kfac_approx=approx).to_dense())
    assert relative(found[1], found[0]) < TOLERANCE and relative(found[2], found[0]) < TOLERANCE
    inner = hf.GGN(model, F.cross_entropy, (x, y), params=["inner.weight", "inner.bias"]).to_dense()
    assert relative(found[0][:25, :25], inner) < TOLERANCE  # by autograd, so exact


def test_loaders_that_shuffle_between_the_passes():
    case = make("mlp")
    data = torch.utils.data.TensorDataset(case.inputs, torch.arange(6) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    hf.KFAC(case.model, F.cross_entropy, loader, fisher_type="type-2").trace()  # one pass: any order will do
    with pytest.raises(hf.StateError, match="shuffle"):
        hf.EKFAC(case.model, F.cross_entropy, loader, fisher_type="type-2").trace()


def test_one_warning_names_the_parameters_without_a_rule():
    case = make("recurrent")
    y = torch.arange(6) % 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from hvpfast.capture import samples

        samples._warned.clear()
        hf.KFAC(case.model, F.cross_entropy, (case.inputs, y)).trace()
        hf.KFAC(case.model, F.cross_entropy, (case.inputs, y)).trace()
    mine = [str(w.message) for w in caught if "no layer rule" in str(w.message)]
    assert len(mine) == 1 and "lstm.weight_ih_l0" in mine[0] and "blocks come from autograd" in mine[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [hf.KFAC, hf.EKFAC])
def test_lower_precisions(kind, dtype):
    """Factors are float32; the operator is within the dtype's rounding of the float64 one."""
    case = make("mlp")
    y = torch.arange(6) % 3
    truth = kind(case.model, F.cross_entropy, (case.inputs, y), fisher_type="type-2")
    truth.eigenvalues()  # before the model changes
    model = case.model.to(dtype)
    mine = kind(model, F.cross_entropy, (case.inputs.to(dtype), y), fisher_type="type-2")
    bound = 1e-5 if dtype is torch.float32 else 0.1
    assert relative(mine.trace(), truth.trace()) < bound
    v = torch.ones(mine.shape[0], dtype=dtype)
    got = mine @ v
    assert got.dtype is dtype
    assert relative(got.double(), truth @ v.double()) < bound
    assert relative((mine.inverse(0.1) @ v).double(), truth.inverse(0.1) @ v.double()) < bound
