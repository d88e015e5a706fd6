"""The Hessian against differences of gradients: where torch's own second derivative is wrong or missing."""

import pytest
import torch
from torch import nn
from truths import relative

import hvpfast as hf


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def difference(model, loss, x, y, v, step=1e-4):
    """(grad L(w + h v) - grad L(w - h v)) / 2h, extrapolated once: H v up to h^4."""
    params = list(model.parameters())

    def gradient(h):
        with torch.no_grad():
            for p, d in zip(params, v, strict=True):
                p.add_(h * d)
        parts = torch.autograd.grad(loss(model(x), y), params)
        with torch.no_grad():
            for p, d in zip(params, v, strict=True):
                p.sub_(h * d)
        return torch.cat([part.to_dense().reshape(-1) for part in parts])

    near, far = (gradient(h) - gradient(-h) for h in (step / 2, step))
    return (8 * near - far) / (6 * step)


def hessian_agrees(model, x, classes=3):
    loss, y = nn.CrossEntropyLoss(), torch.randint(0, classes, (x.shape[0],))
    v = [torch.randn_like(p) for p in model.parameters()]
    flat = torch.cat([d.reshape(-1) for d in v])
    operator = hf.Hessian(model, loss, (x, y))
    dense = operator.to_dense()
    assert relative(dense @ flat, difference(model, loss, x, y, v)) < 1e-9
    assert relative(dense, dense.T) < 1e-12
    return loss, y


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_weight_norm_by_parametrisation(dim):
    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4), dim=dim)
    hessian_agrees(nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_by_hook_and_of_a_convolution():
    layers = nn.Conv1d(2, 4, 2), nn.Linear(16, 3)
    conv, linear = (nn.utils.weight_norm(layer) for layer in layers)
    hessian_agrees(nn.Sequential(conv, nn.Tanh(), nn.Flatten(), linear), torch.randn(6, 2, 5))


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(1, 4),
        nn.RMSNorm(4),
        nn.BatchNorm1d(4),
        nn.Softmax(-1),
        nn.Mish(),
        nn.GELU("tanh"),
        nn.Hardswish(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers(layer):
    model = nn.Sequential(nn.Linear(5, 4), layer.double(), nn.Tanh(), nn.Linear(4, 3))
    hessian_agrees(model, torch.randn(6, 5))


class Pooled(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4, **options), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.table(x)).mean(1))


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}], ids=lambda o: next(iter(o)))
def test_options_of_an_embedding_for_optimisers_change_no_curvature(options):
    model, plain = Pooled(**options), Pooled()
    plain.load_state_dict(model.state_dict())
    x = torch.tensor([[1, 1, 2], [3, 1, 8], [0, 0, 0], [5, 2, 1]])
    loss, y = hessian_agrees(plain, x)
    for operator in (hf.Hessian, hf.GGN, hf.EmpiricalFisher, hf.KFAC, hf.EKFAC):
        mine, truth = (operator(m, loss, (x, y)).to_dense() for m in (model, plain))
        assert relative(mine, truth) < 1e-12
    for mine, truth in zip(*(hf.per_sample_grads(m, loss, (x, y)).values() for m in (model, plain)), strict=True):
        assert relative(mine, truth) < 1e-12
    assert all(getattr(model.table, name) is value for name, value in options.items())


class Bags(nn.Module):
    """Bags of embeddings given as rows or, with offsets, as one list (an empty bag among them), weighted or not."""

    def __init__(self, mode, padding, weighted, listed):
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(7, 4, mode=mode, padding_idx=padding), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.rand(6, 5) + 0.5) if weighted else None
        self.listed = listed

    def forward(self, x):
        if self.listed:
            offsets = torch.tensor([0, 3, 3, 10, 17, 25])
            scale = None if self.scale is None else self.scale.reshape(-1)
            return self.head(torch.tanh(self.bags(x.reshape(-1), offsets, scale)))
        return self.head(torch.tanh(self.bags(x, per_sample_weights=self.scale)))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("padding", [None, 2])
def test_bags_of_embeddings(mode, weighted, padding, listed):
    model, x = Bags(mode, padding, weighted, listed), torch.randint(0, 7, (6, 5))
    before = model(x)
    loss, y = hessian_agrees(model, x)
    assert torch.equal(model(x), before)
    params = list(model.parameters())
    output = model(x)
    rows = [torch.autograd.grad(one, params, retain_graph=True, allow_unused=True) for one in output.reshape(-1)]
    jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    p = torch.softmax(output.detach(), 1)
    middle = torch.block_diag(*(torch.diag(one) - torch.outer(one, one) for one in p)) / len(p)
    assert relative(hf.GGN(model, loss, (x, y)).to_dense(), jacobian.T @ middle @ jacobian) < 1e-12


@pytest.mark.parametrize("kind", [hf.Hessian, hf.GGN])
def test_attention_in_a_checkpoint_at_every_product(kind):
    """The kept graph runs the layer again, which must take the math kernel again."""

    class Saves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True), nn.Linear(8, 3)
            self.saves = True

        def forward(self, x):
            h = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False) if self.saves else self.layer(x)
            return self.last(h.mean(1))

    model, x, y = Saves(), torch.randn(4, 5, 8), torch.randint(0, 3, (4,))
    made = kind(model, nn.CrossEntropyLoss(), (x, y))
    v = torch.randn(made.shape[0], 2)
    got = [made @ v, made @ v, made @ v[:, 0]]
    model.saves = False
    want = kind(model, nn.CrossEntropyLoss(), (x, y)) @ v
    for one in (got[0], got[1], torch.stack([got[2], want[:, 1]], 1)):
        assert relative(one, want) < 1e-12
