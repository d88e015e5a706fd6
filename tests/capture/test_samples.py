"""Per-sample quantities against one backward pass a sample, float64, on every model and loss of the zoo."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from truths import own_gradients, relative
from zoo import LOSSES, MODELS, make

import hvpfast as hf
from hvpfast.ops.shared import add_rows

PAIRS = [(model, "cross entropy") for model in MODELS] + [("mlp", loss) for loss in LOSSES if loss != "cross entropy"]
PAIRS += [("cnn, groups and dilation", "all options"), ("called twice", "mse, sum")]


@pytest.mark.parametrize(("model_name", "loss_name"), PAIRS)
@pytest.mark.filterwarnings("ignore:.*no layer rule covers")
def test_every_quantity(model_name, loss_name):
    case = make(model_name)
    loss, target = LOSSES[loss_name][0](case.classes), LOSSES[loss_name][1](6, case.classes)
    batch = (case.inputs, target)
    truth = torch.nan_to_num(own_gradients(case.model, loss, case.inputs, target))
    norms = truth.norm(dim=1)

    grads = hf.per_sample_grads(case.model, loss, batch)
    room = {name: torch.full_like(g, torch.nan) for name, g in grads.items()}
    again = hf.per_sample_grads(case.model, loss, batch, out=room)
    assert all(again[name] is room[name] and relative(room[name], g) < 1e-12 for name, g in grads.items())
    named = {n: p for n, p in case.model.named_parameters() if p.requires_grad}
    assert {n: g.shape[1:] for n, g in grads.items()} == {n: p.shape for n, p in named.items()}
    assert relative(torch.cat([g.reshape(6, -1) for g in grads.values()], 1), truth) < 1e-12
    assert relative(hf.per_sample_grad_norms(case.model, loss, batch), norms) < 1e-12
    assert relative(hf.per_sample_gram(case.model, loss, batch), truth @ truth.T) < 1e-12
    moment = hf.grad_second_moment(case.model, loss, batch)
    assert relative(torch.cat([m.reshape(-1) for m in moment.values()]), truth.square().sum(0)) < 1e-12
    sums, moments, lengths = hf.grad_statistics(case.model, loss, batch)
    assert relative(torch.cat([x.reshape(-1) for x in sums.values()]), truth.sum(0)) < 1e-12
    assert all(relative(moments[name], moment[name]) < 1e-12 for name in moment) and relative(lengths, norms) < 1e-12
    bound = float(norms.median())
    clipped, before = hf.clipped_grad(case.model, loss, batch, max_norm=bound)
    scale = torch.where(norms > 0, (bound / norms).clamp(max=1), 0)
    assert relative(torch.cat([c.reshape(-1) for c in clipped.values()]), scale @ truth) < 1e-12
    assert relative(before, norms) < 1e-12


def test_a_layer_without_a_rule_is_named_once():
    case = make("keywords")
    batch = (case.inputs, torch.arange(6) % 3)
    hf.capture.samples._warned.clear()
    with pytest.warns(UserWarning, match=r"no layer rule covers right.weight: "):
        hf.per_sample_grads(case.model, nn.CrossEntropyLoss(), batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.per_sample_grads(case.model, nn.CrossEntropyLoss(), batch)


class SequenceFirst(nn.Module):
    """A Linear over (T, N, features) with T = N: only the graph can tell which axis is the batch."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


class Flattened(nn.Module):
    """A Linear over (N T, features), samples and positions in one axis."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.reshape(-1, 3))).reshape(x.shape[0], -1, 4).mean(1))


@pytest.mark.parametrize("kind", [SequenceFirst, Flattened])
@pytest.mark.parametrize("positions", [6, 5, 1])
@pytest.mark.filterwarnings("ignore:.*no layer rule covers")
def test_a_batch_axis_in_another_place(kind, positions):
    torch.manual_seed(0)
    model, x, y = kind().double(), torch.randn(6, positions, 3, dtype=torch.float64), torch.arange(6) % 3
    truth = own_gradients(model, nn.CrossEntropyLoss(), x, y)
    grads = hf.per_sample_grads(model, nn.CrossEntropyLoss(), (x, y))
    assert relative(torch.cat([g.reshape(6, -1) for g in grads.values()], 1), truth) < 1e-12
    fisher = hf.EmpiricalFisher(model, nn.CrossEntropyLoss(), (x, y)).to_dense()
    assert relative(fisher, truth.T @ truth / 6) < 1e-12


class Reused(nn.Module):
    """A module's weight used once by its call and once by a function; and a hook that changes the layer's output."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.inner.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)) @ self.inner.weight + self.inner.bias)


@pytest.mark.filterwarnings("ignore:.*no layer rule covers")
def test_uses_outside_the_module_and_hooks():
    torch.manual_seed(0)
    model, x, y = Reused().double(), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    truth = own_gradients(model, nn.CrossEntropyLoss(), x, y)
    grads = hf.per_sample_grads(model, nn.CrossEntropyLoss(), (x, y))
    assert relative(torch.cat([g.reshape(6, -1) for g in grads.values()], 1), truth) < 1e-12


@pytest.mark.filterwarnings("ignore:.*no layer rule covers")
def test_parametrised_weights_and_checkpoints():
    torch.manual_seed(0)
    inner = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5).double())
    deep = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.deep, self.head = inner, deep, nn.Linear(5, 3).double()

        def forward(self, x):
            hidden = torch.utils.checkpoint.checkpoint(self.deep, torch.tanh(self.inner(x)), use_reentrant=False)
            return self.head(hidden)

    model, x, y = Model(), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    truth = own_gradients(model, nn.CrossEntropyLoss(), x, y)
    grads = hf.per_sample_grads(model, nn.CrossEntropyLoss(), (x, y))
    assert relative(torch.cat([g.reshape(6, -1) for g in grads.values()], 1), truth) < 1e-12


class ChangedInput(nn.Module):
    """Adds to a layer's input, in place, after the layer has used it; the frozen weight hides it from autograd."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        with torch.no_grad():
            hidden = self.first(x)
        out = self.layer(hidden)
        hidden.add_(1)
        return self.head(torch.tanh(out))


def test_an_input_changed_in_place_is_refused():
    torch.manual_seed(0)
    model, x, y = ChangedInput().double(), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    params = ["layer.weight", "layer.bias"]
    with pytest.raises(hf.StateError, match=r"the input of layer 'layer' was changed in place"):
        hf.per_sample_grads(model, nn.CrossEntropyLoss(), (x, y), params=params)


def test_refusals():
    case = make("mlp")
    batch = (case.inputs, torch.arange(6) % 3)
    with pytest.raises(ValueError, match="max_norm is 0"):
        hf.clipped_grad(case.model, nn.CrossEntropyLoss(), batch, max_norm=0)
    with pytest.raises(hf.StateError, match="dropout is active"):
        hf.per_sample_grads(nn.Sequential(case.model, nn.Dropout()), nn.CrossEntropyLoss(), batch)
    case.inputs[3, 1] = float("nan")
    with pytest.raises(hf.NonFiniteError, match="the batch's input holds NaN"):
        hf.per_sample_grads(case.model, nn.CrossEntropyLoss(), batch)


def test_float32_and_16_bit_models():
    """Sums in float32 whatever the model computes in; a bfloat16 model's quantities are float32."""
    case = make("linear over positions")
    y = torch.arange(6) % 6
    truth = hf.per_sample_grad_norms(case.model, nn.CrossEntropyLoss(), (case.inputs, y))
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        model = make("linear over positions").model.to(dtype)
        norms = hf.per_sample_grad_norms(model, nn.CrossEntropyLoss(), (case.inputs.to(dtype), y))
        assert norms.dtype == torch.float32
        assert relative(norms.double(), truth) < bound


@pytest.mark.parametrize("chunk_size", [1, 4, 6, 100])
def test_chunks_give_the_same(chunk_size):
    case = make("cnn, groups and dilation")
    loss, batch = nn.CrossEntropyLoss(label_smoothing=0.1), (case.inputs, torch.arange(6) % 3)
    whole, parts = (hf.per_sample_grads(case.model, loss, batch, chunk_size=c) for c in (None, chunk_size))
    assert all(relative(parts[name], whole[name]) < 1e-12 for name in whole)
    norms = hf.per_sample_grad_norms(case.model, loss, batch)
    assert relative(hf.per_sample_grad_norms(case.model, loss, batch, chunk_size=chunk_size), norms) < 1e-12
    moments = [hf.grad_second_moment(case.model, loss, batch, chunk_size=c) for c in (None, chunk_size)]
    assert all(relative(moments[1][name], moments[0][name]) < 1e-12 for name in whole)
    clipped = [hf.clipped_grad(case.model, loss, batch, max_norm=0.1, chunk_size=c) for c in (None, chunk_size)]
    assert all(relative(clipped[1][0][name], clipped[0][0][name]) < 1e-12 for name in whole)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        hf.per_sample_grads(case.model, loss, batch, chunk_size=0)


RECORDED = [
    "mlp",
    "relu",
    "cnn, groups and dilation",
    "conv1d",
    "conv3d",
    "called twice",
    "batchnorm in eval",
    "linear over positions",
]


@pytest.mark.parametrize("model_name", RECORDED)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_tape_of_the_users_own_pass(model_name, reduction):
    """One ordinary backward pass under `record`: the same per-sample quantities, and the same `.grad` as without."""
    case = make(model_name)
    loss, y = nn.CrossEntropyLoss(reduction=reduction), torch.arange(6) % case.classes
    truth = own_gradients(case.model, loss, case.inputs, y)
    with hf.record(case.model) as tape:
        loss(case.model(case.inputs), y).backward()
    whole = torch.cat([p.grad.reshape(-1) for p in case.model.parameters()])
    assert relative(whole, truth.mean(0) if reduction == "mean" else truth.sum(0)) < 1e-12
    grads = hf.per_sample_grads(tape, reduction=reduction)
    assert relative(torch.cat([g.reshape(6, -1) for g in grads.values()], 1), truth) < 1e-12
    assert relative(hf.per_sample_grad_norms(tape, reduction=reduction), truth.norm(dim=1)) < 1e-12
    sums, squares, norms = hf.grad_statistics(tape, reduction=reduction)
    assert relative(torch.cat([x.reshape(-1) for x in sums.values()]), truth.sum(0)) < 1e-12
    assert relative(torch.cat([x.reshape(-1) for x in squares.values()]), truth.square().sum(0)) < 1e-12
    assert relative(norms, truth.norm(dim=1)) < 1e-12
    assert relative(hf.per_sample_gram(tape, reduction=reduction), truth @ truth.T) < 1e-12
    moment = hf.grad_second_moment(tape, reduction=reduction)
    assert relative(torch.cat([m.reshape(-1) for m in moment.values()]), truth.square().sum(0)) < 1e-12
    bound = float(truth.norm(dim=1).median())
    clipped, _ = hf.clipped_grad(tape, max_norm=bound, reduction=reduction)
    scale = (bound / truth.norm(dim=1)).clamp(max=1)
    assert relative(torch.cat([c.reshape(-1) for c in clipped.values()]), scale @ truth) < 1e-12


def test_a_tape_refuses_what_it_cannot_know():
    case = make("mlp")
    loss, y = nn.CrossEntropyLoss(), torch.arange(6) % 3
    with hf.record(case.model) as tape:
        value = loss(case.model(case.inputs), y)
    with pytest.raises(hf.StateError, match="no backward pass"):
        hf.per_sample_grads(tape, reduction="mean")
    with hf.record(case.model) as tape:
        loss(case.model(case.inputs), y).backward()
    with pytest.raises(ValueError, match="say reduction='mean'"):
        hf.per_sample_grads(tape)
    with pytest.raises(TypeError, match="a tape takes neither loss"):
        hf.per_sample_grads(tape, loss, reduction="mean")
    with pytest.raises(TypeError, match="a model without batch"):
        hf.per_sample_grads(case.model, loss)
    with hf.record(case.model) as twice:
        (loss(case.model(case.inputs), y) + loss(case.model(case.inputs), y)).backward()
    with pytest.raises(hf.StateError, match="the tape saw 2 forward passes"):
        hf.per_sample_grads(twice, reduction="mean")
    value.backward()
    tied = make("tied")
    with hf.record(tied.model) as tape:
        loss(tied.model(tied.inputs), y).backward()
    with pytest.raises(hf.StateError, match=r"does not have every use of 'first.weight'"):
        hf.per_sample_grads(tape, reduction="mean")
    with hf.record(tied.model, params=["head.weight"]) as tape:
        loss(tied.model(tied.inputs), y).backward()
    assert list(hf.per_sample_grads(tape, reduction="mean")) == ["head.weight"]
    norm = make("batchnorm in eval").model.train()
    with pytest.raises(hf.StateError, match="BatchNorm uses batch statistics"):
        hf.record(norm)


class Tokens(nn.Module):
    """Embedding, norms and Linears over tokens, time first, with as many tokens as samples."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(9, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.norm(self.embedding(tokens.T)))).mean(0)


@pytest.mark.filterwarnings("ignore:.*no layer rule covers")
@pytest.mark.parametrize("positions", [6, 4])
def test_tokens_with_time_first(positions):
    torch.manual_seed(0)
    model, x, y = Tokens().double(), torch.randint(0, 9, (6, positions)), torch.arange(6) % 3
    truth = own_gradients(model, nn.CrossEntropyLoss(), x, y)
    grads = hf.per_sample_grads(model, nn.CrossEntropyLoss(), (x, y))
    assert relative(torch.cat([g.reshape(6, -1) for g in grads.values()], 1), truth) < 1e-12


class Translator(nn.Module):
    """Self-attention in an encoder, self- and cross-attention in a decoder, batch first and second."""

    def __init__(self, batch_first, bias):
        super().__init__()
        options = {"dropout": 0.0, "batch_first": batch_first, "bias": bias}
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, **options)
        self.decoder = nn.TransformerDecoderLayer(4, 2, 5, norm_first=True, **options)
        self.head, self.batch_first = nn.Linear(4, 3), batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.decoder(x.flip(0 if not self.batch_first else 1)[..., :], self.encoder(x))
        return self.head(y.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("positions", [6, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:.*no layer rule covers")
def test_attention(batch_first, bias, positions):
    """Input and output projections of self-attention are captured; those of cross-attention are autograd's."""
    torch.manual_seed(0)
    model, y = Translator(batch_first, bias).double(), torch.arange(6) % 3
    x = torch.randn(6, positions, 4, dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = own_gradients(model, nn.CrossEntropyLoss(), x, y)
    grads = hf.per_sample_grads(model, nn.CrossEntropyLoss(), (x, y))
    assert relative(torch.cat([g.reshape(6, -1) for g in grads.values()], 1), truth) < 1e-12
    fisher = hf.EmpiricalFisher(model, nn.CrossEntropyLoss(), (x, y))
    v = torch.randn(fisher.shape[0], 2, dtype=torch.float64)
    assert relative(fisher @ v, truth.T @ (truth @ v) / 6) < 1e-12


def test_attention_on_a_tape():
    """A transformer's own backward pass: every parameter of encoder layers is covered."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    model = nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    x, y = torch.randn(6, 4, 4, dtype=torch.float64), torch.arange(6) % 3
    truth = own_gradients(model, nn.CrossEntropyLoss(), x, y)
    with hf.record(model) as tape:
        nn.CrossEntropyLoss()(model(x), y).backward()
    grads = hf.per_sample_grads(tape, reduction="mean")
    assert relative(torch.cat([g.reshape(6, -1) for g in grads.values()], 1), truth) < 1e-12
    assert relative(hf.per_sample_grad_norms(tape, reduction="mean"), truth.norm(dim=1)) < 1e-12


def test_a_tape_where_positions_are_as_many_as_samples():
    """Finding the batch's axis takes a probing backward pass, which must leave nothing on the tape."""
    torch.manual_seed(0)
    first, head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = first, head

        def forward(self, x):
            return self.head(torch.tanh(self.first(x)).mean(1))

    model, x, y = Positions(), torch.randn(5, 5, 3, dtype=torch.float64), torch.arange(5) % 2
    with hf.record(model) as tape:
        nn.functional.cross_entropy(model(x), y).backward()
    taped = hf.per_sample_grads(tape, reduction="mean")
    for name, truth in hf.per_sample_grads(model, nn.CrossEntropyLoss(), (x, y)).items():
        assert relative(taped[name], truth) < 1e-12


class Gated(nn.Module):
    """Two layers in both directions; nothing of its weights goes through a call that has a rule."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


@pytest.mark.filterwarnings("ignore:.*no layer rule covers")
@pytest.mark.parametrize("positions", [1, 4, 6])
def test_gated_recurrent_units(positions):
    torch.manual_seed(0)
    model, x, y = Gated().double(), torch.randn(6, positions, 3, dtype=torch.float64), torch.arange(6) % 3
    truth = own_gradients(model, nn.CrossEntropyLoss(), x, y)
    grads = hf.per_sample_grads(model, nn.CrossEntropyLoss(), (x, y))
    assert relative(torch.cat([g.reshape(6, -1) for g in grads.values()], 1), truth) < 1e-12
    assert relative(hf.per_sample_grad_norms(model, nn.CrossEntropyLoss(), (x, y)), truth.norm(dim=1)) < 1e-12
    moment = hf.grad_second_moment(model, nn.CrossEntropyLoss(), (x, y))
    assert relative(torch.cat([m.reshape(-1) for m in moment.values()]), truth.square().sum(0)) < 1e-12


def test_sums_at_repeated_rows_are_sorted_first_where_a_device_adds_in_any_order():
    index, rows = torch.tensor([2, 0, 2, 2]), torch.randn(4, 3, dtype=torch.float64)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for place, row in zip(index.tolist(), rows, strict=True):
        expected[place] += row
    torch.testing.assert_close(add_rows(torch.zeros(5, 3, dtype=torch.float64), index, rows), expected)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        add_rows(torch.zeros(5, 3, device="meta"), index.to("meta"), rows.float().to("meta"))
    assert any("index_put" in name for name in seen) and not any("index_add" in name for name in seen)
    torch.testing.assert_close(torch.zeros_like(expected).index_put_((index,), rows, accumulate=True), expected)
