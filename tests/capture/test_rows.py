"""Layers whose rows are not the samples': looked up or computed once for the batch, or with time first; N = T among them."""

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from truths import own_gradients, relative

import hvpfast as hf
from hvpfast.capture import rows
from hvpfast.capture.axes import scattered_calls
from hvpfast.capture.rows import _probe
from hvpfast.capture.tape import recording

TOKENS, WIDTH = 5, 4


pytestmark = pytest.mark.usefixtures("float64")


class Positions(nn.Module):
    """Tokens and positions, these by a table: looked up with (T,), (1, T), (N, T) indices, or with a factor on the sum."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.tokens, self.positions = nn.Embedding(7, WIDTH), nn.Embedding(8, WIDTH, padding_idx=1)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        index = torch.arange(x.shape[1])
        index = {"(T,)": index, "(1, T)": index[None]}.get(self.how, index.expand(x.shape))
        places = self.positions(index)
        h = torch.add(self.tokens(x), places, alpha=2) if self.how == "scaled" else self.tokens(x) + places
        return self.head(torch.tanh(h).mean(1))


class Queries(nn.Module):
    """A linear layer over learned queries, the same for every sample."""

    def __init__(self):
        super().__init__()
        self.queries, self.project = nn.Parameter(torch.randn(TOKENS, WIDTH)), nn.Linear(WIDTH, WIDTH)
        self.tokens, self.head = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.tokens(x) + self.project(self.queries)).mean(1))


class TimeFirst(nn.Module):
    """Layers between two transpositions: (T, N, D)."""

    def __init__(self):
        super().__init__()
        self.tokens, self.inner, self.head = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.tokens(x).transpose(0, 1))).transpose(0, 1).mean(1))


class FromPast(nn.Module):
    """Tokens above zero say which queries a sample uses."""

    def __init__(self):
        super().__init__()
        self.queries, self.project, self.head = nn.Parameter(torch.randn(TOKENS, 2)), nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(x.to(self.queries) @ torch.tanh(self.project(self.queries)))


MODELS = {how: lambda how=how: Positions(how) for how in ("(T,)", "(1, T)", "(N, T)", "scaled")}
MODELS |= {"queries": Queries, "time first": TimeFirst, "from the past": FromPast}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n", [TOKENS - 1, TOKENS, TOKENS + 5])
def test_per_sample_quantities(name, n):
    model, loss = MODELS[name](), nn.CrossEntropyLoss()
    x, y = torch.randint(0, 7, (n, TOKENS)), torch.randint(0, 3, (n,))
    x = torch.randint(1, 7, (n, TOKENS)).tril() if name == "from the past" else x
    rows = own_gradients(model, loss, x, y)
    got = hf.per_sample_grads(model, loss, (x, y))
    assert relative(torch.cat([part.reshape(n, -1) for part in got.values()], 1), rows) < 1e-12
    assert relative(hf.per_sample_grad_norms(model, loss, (x, y)), rows.norm(dim=1)) < 1e-12
    assert relative(hf.per_sample_gram(model, loss, (x, y)), rows @ rows.T) < 1e-12
    squares = hf.grad_second_moment(model, loss, (x, y))
    assert relative(torch.cat([part.reshape(-1) for part in squares.values()]), rows.square().sum(0)) < 1e-12
    fisher = hf.EmpiricalFisher(model, loss, (x, y), blocks=True).to_dense()
    assert relative(fisher.trace(), rows.square().sum() / n) < 1e-12
    corrected = hf.EKFAC(model, loss, (x, y), fisher_type="empirical")
    assert relative(corrected.trace(), rows.square().sum() / n) < 1e-10


@pytest.mark.parametrize("n", [1, TOKENS - 1, TOKENS, 2 * TOKENS])
def test_a_table_looked_up_once_has_the_factors_of_one_looked_up_by_every_sample(n):
    each = Positions("(N, T)")
    x, y = torch.randint(0, 7, (n, TOKENS)), torch.randint(0, 3, (n,))
    for how in ("(T,)", "(1, T)"):
        once = Positions(how)
        once.load_state_dict(each.state_dict())
        for fisher_type in ("type-2", "mc", "empirical", "forward-only"):
            for approx in ("expand", "reduce"):
                a, b = (
                    hf.KFAC(m, F.cross_entropy, (x, y), fisher_type=fisher_type, kfac_approx=approx)
                    for m in (each, once)
                )
                assert a.factors.keys() == b.factors.keys()
                assert relative(b.to_dense(), a.to_dense()) < 1e-12, (how, fisher_type, approx)


@pytest.mark.parametrize("how", ["(T,)", "(1, T)"])
def test_a_table_looked_up_once_on_a_tape(how):
    model, x, y = Positions(how), torch.randint(0, 7, (TOKENS, TOKENS)), torch.randint(0, 3, (TOKENS,))
    with hf.record(model) as tape:
        F.cross_entropy(model(x), y).backward()
    truth = own_gradients(model, nn.CrossEntropyLoss(), x, y).norm(dim=1)
    assert relative(hf.per_sample_grad_norms(tape, reduction="mean"), truth) < 1e-12


@pytest.mark.parametrize("n", [TOKENS - 1, TOKENS, 2 * TOKENS])
def test_rows_that_serve_several_samples_have_no_factors(n):
    """Of a linear layer over shared rows, gradients arrive summed over samples: its block is made of rows, and exact."""
    model, loss = Queries(), nn.CrossEntropyLoss()
    x, y = torch.randint(0, 7, (n, TOKENS)), torch.randint(0, 3, (n,))
    names = ["project.weight", "project.bias"]
    for data in ((x, y), [(x[:2], y[:2]), (x[2:], y[2:])]):
        kfac = hf.KFAC(model, loss, data, params=names, fisher_type="type-2")
        truth = hf.GGN(model, loss, data, params=names)
        assert not kfac.factors
        assert relative(kfac.to_dense(), truth.to_dense()) < 1e-12


class Backwards(nn.Module):
    """Samples in reverse, and layers called by keyword."""

    def __init__(self, reverse: bool):
        super().__init__()
        self.inner, self.head, self.order = nn.Linear(4, 3), nn.Linear(3, 3), [0] if reverse else []

    def forward(self, x):
        return self.head(input=torch.tanh(self.inner(input=x.flip(self.order)))).flip(self.order)


def test_weights_of_the_loss_go_to_their_rows_or_to_none():
    """A counts rows as the loss does where they are the samples' in order; where they are not, it is their plain mean."""
    weights, x, y = torch.tensor([1.0, 5.0, 0.0]), torch.randn(6, 4), torch.arange(6) % 3
    loss, plain, reverse = nn.CrossEntropyLoss(weight=weights), Backwards(False), Backwards(True)
    reverse.load_state_dict(plain.state_dict())
    ordered, scattered = (hf.KFAC(m, loss, (x, y), fisher_type="type-2").factors["inner"] for m in (plain, reverse))
    rows = torch.cat([x, torch.ones(6, 1)], 1)
    assert relative(ordered.G, scattered.G) < 1e-12
    assert relative(ordered.A, rows.T @ (rows * weights[y][:, None]) / weights[y].sum()) < 1e-12
    assert relative(scattered.A, rows.T @ rows / 6) < 1e-12
    for model in (plain, reverse):
        truth = own_gradients(model, nn.CrossEntropyLoss(), x, y).norm(dim=1)
        assert relative(hf.per_sample_grad_norms(model, nn.CrossEntropyLoss(), (x, y)), truth) < 1e-12


def test_forward_only_of_a_norm_layer_is_the_mean_square_of_what_it_scales():
    for layer, shape in ((nn.LayerNorm(4), (6, 4)), (nn.LayerNorm((3, 4)), (6, 3, 4)), (nn.RMSNorm(4), (6, 5, 4))):
        x = torch.randn(shape)
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(x[0].numel(), 3))
        foof = hf.KFAC(
            model, F.cross_entropy, (x, torch.arange(6) % 3), fisher_type="forward-only", params=["0.weight"]
        )
        axes = x.dim() - layer.weight.dim()
        truth = layer(x).detach().square().flatten(0, axes - 1).mean(0)  # weights are 1, biases 0
        assert relative(foof.to_dense().diagonal(), truth.reshape(-1)) < 1e-12


def test_samples_without_a_gradient_tell_nothing():
    """Ignored targets at both ends of a batch, seen first: the rest is asked, and a batch that told nothing is not kept."""
    loss, x = nn.CrossEntropyLoss(ignore_index=-1), torch.randint(0, 7, (TOKENS, TOKENS))
    model, targets = Queries(), [torch.tensor(y) for y in ([-1, 0, -1, -1, -1], [-1, 1, 2, 0, -1], [0, 1, 2, 0, 1])]
    for y in targets:
        rows = own_gradients(model, loss, x, y).nan_to_num()  # a batch of one ignored target has the loss 0 / 0
        assert relative(hf.per_sample_grad_norms(model, loss, (x, y)), rows.norm(dim=1)) < 1e-12


class Convolved(nn.Module):
    """A table of positions looked up once, before a convolution over them; the tokens' own table is frozen."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 4).requires_grad_(False), nn.Embedding(5, 4)
        self.conv, self.head = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        return self.head(torch.tanh(self.conv(h.transpose(1, 2))).mean(2))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_table_of_positions_before_a_convolution(n):
    model, x, y = Convolved(), torch.randint(0, 7, (n, 3)), torch.arange(n) % 3
    loss = nn.CrossEntropyLoss()
    truth = own_gradients(model, loss, x, y)
    grads = hf.per_sample_grads(model, loss, (x, y))
    assert relative(torch.cat([g.reshape(n, -1) for g in grads.values()], 1), truth) < 1e-12
    assert relative(hf.EmpiricalFisher(model, loss, (x, y)).to_dense(), truth.T @ truth / n) < 1e-12


# Told from the graph's nodes, without a backward pass -----------------------------------------------------------------


class Mixing(nn.Module):
    """One layer, then a function of (N, 6), and another layer."""

    def __init__(self, function):
        super().__init__()
        self.function, self.inner, self.head = function, nn.Linear(4, 6), nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.function(torch.tanh(self.inner(x))))


N = 6
TELLING = {  # which rows a sample's output depends on: its own, in order; or all of them with time first
    "gelu and a sum": lambda h: F.gelu(h) + h * 2,
    "softmax over features": lambda h: h.softmax(-1) * h.log_softmax(1),
    "norms": lambda h: F.layer_norm(F.group_norm(h, 3), (6,)),
    "shift and scale by the sample's own": lambda h: (h - h.mean(1, keepdim=True)) / h.var(1, keepdim=True).sqrt(),
    "images": lambda h: F.max_pool2d(F.pad(h.view(N, 2, 1, 3), (1, 1, 0, 1)), 2).flatten(1),
    "cut and put together": lambda h: torch.cat([h[:, 1:3], *h.split(2, 1), h.unbind(1)[0][:, None]], -1),
    "stacked": lambda h: torch.stack([h.select(1, 2), h.amax(-1)], -1),
    "batched products": lambda h: (h.view(N, 2, 3) @ h.view(N, 3, 2)).flatten(1),
    "attention": lambda h: F.scaled_dot_product_attention(*[h.view(N, 1, 3, 2)] * 3).flatten(1),
    "turned twice": lambda h: h.t().contiguous().t(),
    "permuted": lambda h: h.view(N, 2, 3).permute(2, 0, 1).clone().permute(1, 2, 0).reshape(N, 6),
}
MIXED = {
    "mean over the batch": lambda h: h - h.mean(0),
    "maximum of the batch": lambda h: h / h.amax(0, keepdim=True),
    "softmax over the batch": lambda h: h.softmax(0),
    "batch statistics": lambda h: F.batch_norm(h[:, :, None, None], None, None, training=True).flatten(1),
    "the next sample": lambda h: h.roll(1, 0),
    "reversed": lambda h: h.flip(0),
    "halves changed": lambda h: torch.cat([h[3:], h[:3]]),
    "all pairs": lambda h: h @ h.t(),
    "squares": lambda h: h @ h,
    "attention among samples": lambda h: F.scaled_dot_product_attention(*[h[None, None]] * 3)[0, 0],
    "turned once": lambda h: h.t() + h,
    "running sums": lambda h: h.cumsum(0),
    "another order of the same numbers": lambda h: h.t().reshape(N, 6) * 1.0,
    "in place of a part": lambda h: h.clone().index_copy(0, torch.tensor([0]), h[5:]),
    "layer norm of everything": lambda h: F.layer_norm(h, (N, 6)),
    "the first sample's": lambda h: h + h[:1],
    "expanded": lambda h: h[0].expand(N, 6) * h,
}


def both_verdicts(model, x, n):
    with recording(model, list(model.parameters())) as tape:
        output = model(x)
    return scattered_calls(tape, output, n), _probe(tape, output, n)[0]


@pytest.mark.parametrize("name", TELLING)
def test_nodes_that_keep_samples_apart_are_followed(name):
    told, probed = both_verdicts(Mixing(TELLING[name]), torch.randn(N, 4), N)
    assert told == set() and probed == rows.UNKNOWN


@pytest.mark.parametrize("name", MIXED)
def test_nodes_that_mix_samples_are_not(name):
    told, probed = both_verdicts(Mixing(MIXED[name]), torch.randn(N, 4), N)
    assert told is None and (probed.scattered or probed.shared)


@pytest.mark.parametrize("name", [*MODELS, *zoo.MODELS])
def test_nodes_tell_what_gradients_tell_or_nothing(name):
    if name in MODELS:
        model, x, n = MODELS[name](), torch.randint(0, 7, (TOKENS + 5, TOKENS)), TOKENS + 5
    else:
        case = zoo.make(name)
        model, x, n = case.model, case.inputs, zoo.N
        if isinstance(x, (tuple, dict)):
            return
    told, probed = both_verdicts(model.eval(), x, n)
    assert told is None or (told == probed.scattered and not probed.shared)
    if name == "time first":
        assert told == {1}


def test_no_gradient_is_pulled_back_where_the_nodes_tell(monkeypatch):
    monkeypatch.setattr(rows, "_probe", lambda *_: pytest.fail("asked by gradients"))
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.Sequential(nn.Conv1d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(2), Swapped(layer), nn.Linear(8, 3))
    assert hf.KFAC(model, F.cross_entropy, (torch.randn(4, 3, 9), torch.arange(4) % 3)).factors
    norms = hf.per_sample_grad_norms(
        TimeFirst(), F.cross_entropy, (torch.randint(0, 7, (6, TOKENS)), torch.arange(6) % 3)
    )
    assert norms.shape == (6,)


class Swapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2)).mean(1)
