"""Under autocast the model and the loss run as in training, and nothing of ours in 16 bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hvpfast as hf


class Net(nn.Module):
    """A network with float32 logits; `inside` enters autocast for itself."""

    def __init__(self, inside: bool):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3))
        self.inside = inside

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.inside or torch.is_autocast_enabled("cpu")):
            return self.layers(x).float()


QUANTITIES = {
    "hessian": lambda m, d, v: hf.Hessian(m, F.cross_entropy, d) @ v,
    "ggn": lambda m, d, v: hf.GGN(m, F.cross_entropy, d) @ v,
    "ggn, blocks": lambda m, d, v: hf.GGN(m, F.cross_entropy, d, blocks=True) @ v,
    "fisher": lambda m, d, v: hf.EmpiricalFisher(m, F.cross_entropy, d) @ v,
    "kfac": lambda m, d, v: hf.KFAC(m, F.cross_entropy, d).inverse(damping=0.1) @ v,
    "ekfac": lambda m, d, v: hf.EKFAC(m, F.cross_entropy, d) @ v,
    "factors": lambda m, d, v: hf.KFAC(m, F.cross_entropy, d, fisher_type="type-2").factors["layers.4"].A,
    "norms": lambda m, d, v: hf.per_sample_grad_norms(m, F.cross_entropy, d),
    "gradients": lambda m, d, v: hf.per_sample_grads(m, F.cross_entropy, d)["layers.4.weight"],
    "gram": lambda m, d, v: hf.per_sample_gram(m, F.cross_entropy, d),
    "eigenvalues": lambda m, d, v: hf.eigsh(hf.GGN(m, F.cross_entropy, d), k=2).values,
    "op": lambda m, d, v: hf.ops.gram.reference(d[0].flatten(1)),
}


@pytest.mark.parametrize("name", QUANTITIES)
def test_autocast_around_a_call_is_autocast_in_the_model(name):
    torch.manual_seed(0)
    inner, outer = Net(True), Net(False)
    outer.load_state_dict(inner.state_dict())
    data, v = (torch.randn(6, 2, 6, 6), torch.arange(6) % 3), torch.randn(sum(p.numel() for p in inner.parameters()))
    truth = QUANTITIES[name](inner, data, v)
    full = QUANTITIES[name](outer, data, v)
    with torch.autocast("cpu", torch.bfloat16):
        got = QUANTITIES[name](outer, data, v)
        assert torch.is_autocast_enabled("cpu")
    assert got.dtype == truth.dtype and got.dtype in (torch.float32, torch.float64)
    assert torch.equal(got, truth)
    if name not in ("op", "factors"):
        assert not torch.equal(got, full)  # the model did run in 16 bits
