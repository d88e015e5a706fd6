"""The Triton kernels of double backward passes of activations and norm layers, against float64."""

import math

import pytest
import torch
from hvpfast.kernels import activation_rop, norm_rop
from on_triton import DEVICE, DTYPES, poisoned, tensor

from hvpfast import ops, testing


@pytest.mark.parametrize("activation", activation_rop.KINDS)
def test_activations_over_the_whole_range(activation):
    x = torch.cat([torch.linspace(-30, 30, 3001), torch.tensor([-3e38, -1e10, -104.0, -0.0, 104.0, 1e10, 3e38])]).to(
        DEVICE
    )
    one = torch.ones_like(x)
    found = activation_rop.activation_rop(x, one, one, activation=activation)
    truth = ops.activation_rop.reference(*(y.double() for y in (x, one, one)), activation=activation)
    for got, exact in zip(found, truth, strict=True):
        assert float((got.double() - exact).abs().max()) < 6e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_activations_in_every_layout(dtype, layout):
    for count, of in ((1, "gx"), (300, "x"), (1025, "g")):
        args, kwargs = testing.make_inputs("activation_rop", n=2, i=count, dtype=dtype, device=DEVICE, layout=layout)
        found = activation_rop.activation_rop(*args, **kwargs, of=of)
        assert len(found) == len(of)
        testing.assert_accurate(found, ops.activation_rop, *args, **kwargs, of=of)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad):
    for activation in activation_rop.KINDS:
        x, g, c = (tensor(37, seed=seed) for seed in range(3))
        x[5] = bad
        for y in activation_rop.activation_rop(x, g, c, activation=activation):
            assert (~y.isfinite()).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("rows, features", [(1, 1), (3, 17), (70, 5), (9, 64), (20, 130), (2, 1030)])
@pytest.mark.parametrize("programs", [1, 3, None])
def test_norms_and_splits_of_their_rows(rows, features, programs):
    args, kwargs = testing.make_inputs("norm_rop", n=rows, i=features, device=DEVICE)
    x, g, rstd = args
    of_g, of_x = (poisoned(rows, features) for _ in range(2))
    order = (x, g, kwargs["c"], kwargs["mean"], rstd, kwargs["weight"], kwargs["c_weight"], kwargs["c_bias"])
    of_w = norm_rop.launch(*order, of_g, of_x, True, programs=programs)
    testing.assert_accurate((of_g, of_x, of_w), ops.norm_rop, *args, **kwargs)
    assert torch.equal(of_w, norm_rop.launch(*order, None, None, True, programs=programs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_norms_in_every_layout(dtype, layout):
    args, kwargs = testing.make_inputs("norm_rop", n=7, i=33, dtype=dtype, device=DEVICE, layout=layout)
    for without, of in (
        ((), "gxw"),
        (("mean",), "gx"),
        (("c",), "gx"),
        (("weight", "c_bias"), "x"),
        (("mean", "c_weight"), "w"),
    ):
        given = kwargs | dict.fromkeys(without)
        testing.assert_accurate(norm_rop.norm_rop(*args, **given, of=of), ops.norm_rop, *args, **given, of=of)


def test_of_nothing_and_what_it_cannot_do():
    args, kwargs = testing.make_inputs("norm_rop", n=0, i=5, device=DEVICE)
    assert [y.shape for y in norm_rop.norm_rop(*args, **kwargs)] == [(0, 5), (0, 5), (5,)]
    x = torch.empty(2, norm_rop.WHOLE + 1, device=DEVICE)
    assert "4096" in norm_rop.supports(x, x, x[:, 0])
    assert "float64" in norm_rop.supports(*(y.double() for y in args))
    assert "float64" in activation_rop.supports(*[x.double()] * 3, activation="gelu")
    assert activation_rop.activation_rop(*[x[:0]] * 3, activation="mish")[1].shape == (0, norm_rop.WHOLE + 1)
