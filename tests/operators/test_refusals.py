"""Input that would give a wrong number gives an error that says what was got, what is needed and what to do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import classes_of, make, unequal

import hvpfast as hf

KINDS = (hf.Hessian, hf.GGN, hf.EmpiricalFisher)
LOSS = nn.CrossEntropyLoss()


def ones(operator):
    return torch.ones(operator.shape[0], dtype=operator.dtype)


def data(n=6, features=4):
    torch.manual_seed(0)
    return torch.randn(n, features, dtype=torch.float64), classes_of(n, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["input", "target", "parameter"])
def test_nan(kind, where):
    case = make("mlp")
    x, y = data()
    y = F.one_hot(y, 3).double()
    batches = unequal(x, y)
    {"input": batches[1][0], "target": batches[1][1], "parameter": case.model[2].bias.data}[where][0] = float("nan")
    operator = kind(case.model, nn.MSELoss(), batches)
    said = {
        "input": r"batch 1: the loss is nan: the batch's input holds NaN",
        "target": r"batch 1: the loss is nan: the batch's target holds NaN",
        "parameter": r"batch 0: the loss is nan: parameter '2.bias' holds NaN or inf",
    }[where]
    with pytest.raises(hf.NonFiniteError, match=said):
        operator @ ones(operator)


class _CubeRoot(nn.Module):
    """Finite with an infinite derivative at 0."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return x * self.scale.abs().sqrt()


def test_overflow_in_the_product_names_the_parameter():
    operator = hf.Hessian(_CubeRoot(), nn.MSELoss(), (torch.ones(3, 2).double(), torch.ones(3, 2).double()))
    with pytest.raises(hf.NonFiniteError, match=r"batch 0: the product has NaN or inf at parameter 'scale'"):
        operator @ ones(operator)
    good = hf.Hessian(make("mlp").model, LOSS, data())
    with pytest.raises(ValueError, match="the vector holds NaN or inf"):
        good @ (ones(good) * float("inf"))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_data(kind):
    case = make("mlp")
    with pytest.raises(ValueError, match="the list of batches is empty"):
        kind(case.model, LOSS, [])
    empty = kind(case.model, LOSS, DataLoader(TensorDataset(*(x[:0] for x in data()))))
    with pytest.raises(ValueError, match="the loader is empty"):
        empty @ ones(empty)
    none = kind(case.model, LOSS, tuple(x[:0] for x in data()))
    with pytest.raises(ValueError, match="batch 0 holds no samples"):
        none @ ones(none)


def test_data_of_the_wrong_kind():
    model = make("mlp").model
    with pytest.raises(TypeError, match="a tensor of shape"):
        hf.Hessian(model, LOSS, data()[0])
    with pytest.raises(TypeError, match="one-shot iterator"):
        hf.Hessian(model, LOSS, iter([data()]))
    with pytest.raises(TypeError, match=r"data\[1\] is a tensor"):
        hf.Hessian(model, LOSS, [data(), data()[0], data()])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind):
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    with pytest.raises(hf.StateError, match=r"dropout is active in '1'.*model.eval\(\)"):
        kind(model, LOSS, data())
    operator = kind(model.eval(), LOSS, data())
    operator @ ones(operator)
    model.train()
    with pytest.raises(hf.StateError, match="dropout is active"):
        operator @ ones(operator)
    model[1].p = 0.0
    operator @ ones(operator)


class _Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x):
        return F.dropout(self.layer(x), 0.5)  # training=True by default, whatever the mode


@pytest.mark.parametrize("kind", KINDS)
def test_functional_dropout_is_found_out(kind):
    operator = kind(_Functional().eval(), LOSS, data())
    with pytest.raises(hf.StateError, match="the model's output is random: two runs on batch 0 differ"):
        operator @ ones(operator)


@pytest.mark.parametrize("kind", [hf.GGN, hf.EmpiricalFisher])
def test_batchnorm_in_train_mode(kind):
    case = make("batchnorm in eval")
    case.model.train()
    with pytest.raises(hf.StateError, match="BatchNorm uses batch statistics in '1'"):
        kind(case.model, LOSS, (case.inputs, classes_of(6, 3)))
    case.model.eval()
    operator = kind(case.model, LOSS, (case.inputs, classes_of(6, 3)))
    case.model[1].track_running_stats, case.model[1].running_mean = False, None
    with pytest.raises(hf.StateError, match="BatchNorm uses batch statistics"):
        operator @ ones(operator)


class _Detached(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(4, 3).double(), how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.layer(x)
        return self.layer(x).detach()


@pytest.mark.parametrize("how", ["no_grad", "detach"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_without_grad(kind, how):
    operator = kind(_Detached(how), LOSS, data())
    with pytest.raises(ValueError, match="needs no grad"):
        operator @ ones(operator)


def test_parameters_on_two_devices():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model[1].to("meta")
    with pytest.raises(ValueError, match=r"the parameters are on 2 devices \('0.weight' on cpu, '1.weight' on meta\)"):
        hf.Hessian(model, LOSS, data())


def test_data_on_another_device():
    case = make("mlp")
    x, y = data()
    operator = hf.Hessian(case.model, LOSS, (x.to("meta"), y))
    with pytest.raises(ValueError, match="batch 0: its input is on meta but the model is on cpu"):
        operator @ ones(operator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_a_loader_that_shuffles(kind, budget, monkeypatch):
    monkeypatch.setattr("hvpfast.operators.curvature.CACHE_BYTES", budget)
    loader = DataLoader(TensorDataset(*data()), batch_size=2, shuffle=True)
    operator = kind(make("mlp").model, LOSS, loader)
    operator @ ones(operator)
    with pytest.raises(hf.StateError, match=r"shuffles \(shuffle=True\).*use shuffle=False"):
        for _ in range(3):
            operator @ ones(operator)
    steady = kind(make("mlp").model, LOSS, DataLoader(TensorDataset(*data()), batch_size=2))
    first = steady @ ones(steady)
    assert all(torch.equal(first, steady @ ones(steady)) for _ in range(3))


class _Augmented(torch.utils.data.Dataset):
    """Values drawn anew in every pass."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return data()[0][index] + torch.randn(4, generator=self.generator), index % 3

    generator = torch.Generator().manual_seed(0)


def test_a_data_set_that_draws():
    operator = hf.Hessian(make("mlp").model, LOSS, DataLoader(_Augmented(), batch_size=3))
    operator @ ones(operator)
    with pytest.raises(hf.StateError, match="other data in every pass"):
        operator @ ones(operator)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_that_do_not_fit(kind):
    operator = kind(make("mlp").model, LOSS, data())
    with pytest.raises(ValueError, match=r"the vector has shape \(7,\); it must be \(P,\) or \(P, K\) with P = 43"):
        operator @ torch.ones(7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the vector has shape \(43, 1, 1\)"):
        operator @ torch.ones(43, 1, 1, dtype=torch.float64)
    with pytest.raises(TypeError, match="the vector is torch.int64"):
        operator @ torch.ones(43, dtype=torch.int64)
    with pytest.raises(ValueError, match="the vector is on meta but the parameters are on cpu"):
        operator @ torch.ones(43, device="meta")
    with pytest.raises(ValueError, match=r"missing \['2.bias'\], unknown \['bias'\]"):
        operator @ {("bias" if n == "2.bias" else n): p for n, p in operator.params.items()}
    with pytest.raises(ValueError, match=r"the tensor for '0.bias' has shape \(4,\); it must be \(5,\)"):
        operator @ [p if n != "0.bias" else torch.ones(4).double() for n, p in operator.params.items()]
    with pytest.raises(ValueError, match="got 3 tensors; there are 4 parameters"):
        operator @ list(operator.params.values())[:3]
    with pytest.raises(TypeError, match="got a str"):
        operator @ "v"


def test_parameters_that_do_not_fit():
    case = make("mlp")
    with pytest.raises(ValueError, match="params names '7.weight', which the model does not have"):
        hf.GGN(case.model, LOSS, data(), params=["7.weight"])
    with pytest.raises(ValueError, match="none of the model's parameters"):
        hf.GGN(case.model, LOSS, data(), params=[torch.ones(3, requires_grad=True)])
    with pytest.raises(ValueError, match="'2.bias' twice"):
        hf.GGN(case.model, LOSS, data(), params=["2.bias", case.model[2].bias])
    case.model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="'0.weight', which is frozen"):
        hf.GGN(case.model, LOSS, data(), params=["0.weight"])
    case.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        hf.GGN(case.model, LOSS, data())


class _Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3).double(), nn.Linear(2, 2).double()

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_no_data_reach(kind):
    operator = kind(_Unused(), LOSS, data())
    with pytest.raises(ValueError, match=r"no data reach parameter 'idle.bias' \(and 1 more\).*params="):
        operator @ ones(operator)
    chosen = kind(_Unused(), LOSS, data(), params=["used.weight", "used.bias"])
    chosen @ ones(chosen)


class _InPlace(nn.Module):
    """Overwrites an activation that the next derivative needs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x):
        hidden = self.layer(x)
        out = hidden.exp()
        out2 = out * out
        out.mul_(2)
        return out2


@pytest.mark.parametrize("kind", KINDS)
def test_activations_changed_in_place(kind):
    operator = kind(_InPlace(), LOSS, data())
    with pytest.raises((hf.StateError, RuntimeError), match="in.?place"):
        operator @ ones(operator)


def test_losses_that_do_not_fit():
    case = make("mlp")
    with pytest.raises(ValueError, match="reduction='none'"):
        hf.Hessian(case.model, nn.CrossEntropyLoss(reduction="none"), data())
    with pytest.raises(TypeError, match="callable"):
        hf.Hessian(case.model, "cross_entropy", data())
    vector = hf.Hessian(case.model, lambda f, y: F.cross_entropy(f, y, reduction="none"), data())
    with pytest.raises(ValueError, match=r"shape \(6,\); it must be a scalar"):
        vector @ ones(vector)
    x, y = data()
    with pytest.raises(ValueError, match="torch would broadcast them"):
        wrong = hf.GGN(case.model, nn.MSELoss(), (x, torch.ones(6, 1).double()))
        wrong @ ones(wrong)
    log_softmax = nn.Sequential(case.model, nn.LogSoftmax(1))
    zero = hf.GGN(log_softmax, nn.NLLLoss(), (x, y))
    with pytest.raises(ValueError, match="NLLLoss is linear in the model's output"):
        zero @ ones(zero)
    coupled = hf.EmpiricalFisher(case.model, lambda f, y: f.square().mean().sqrt(), (x, y))
    with pytest.raises(ValueError, match="neither a mean nor a sum|does not split into samples"):
        coupled @ ones(coupled)
    with pytest.raises(ValueError, match="mc_samples is -1"):
        hf.GGN(case.model, LOSS, (x, y), mc_samples=-1)
    with pytest.raises(TypeError, match=r"model is a function; it must be a torch.nn.Module"):
        hf.GGN(lambda x: x, LOSS, (x, y))


def test_a_loss_that_is_no_sum_is_fine_in_one_batch():
    """The Hessian of a norm over one batch is what it is; two batches of it have no meaning."""
    from truths import dense_hessian, parameters, relative

    case = make("mlp")
    x, y = data()

    def loss(f, y):
        return f.square().sum().sqrt()

    truth = dense_hessian(loss(case.model(x), y), parameters(case.model))
    assert relative(hf.Hessian(case.model, loss, (x, y)).to_dense(), truth) < 1e-10
    two = hf.Hessian(case.model, loss, unequal(x, y))
    with pytest.raises(ValueError, match="neither a mean nor a sum"):
        two @ ones(two)
