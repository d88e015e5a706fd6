"""kron_apply and kron_solve in Triton, all layers in one launch a stage, against float64."""

import types

import pytest
import torch
from hvpfast.kernels import grouped, kron_apply, kron_solve
from on_triton import DEVICE, PRECISIONS, tensor

from hvpfast import ops, testing

SHAPES = ((1, 1), (17, 33), (3, 65, 16), (70, 5), (2, 64, 64), (4, 0), (0, 3, 2))  # v of each layer


def layers(dtype=torch.float32, shapes=SHAPES, layout="contiguous"):
    """v, left, right, eigenvalues of each layer."""
    made = []
    for seed, shape in enumerate(shapes):
        o, i = shape[-2:]
        sizes = (shape, (o, o), (i, i), (o, i))
        made.append([tensor(*size, dtype=dtype, layout=layout, seed=10 * seed + n) for n, size in enumerate(sizes)])
        made[-1][3] = made[-1][3].square()
    return [list(column) for column in zip(*made, strict=True)]


def hold(results, reference, columns, precision):
    for n, (result, *of_layer) in enumerate(zip(results, *columns, strict=True)):
        assert result.shape == columns[0][n].shape or result.shape == columns[1][n].shape
        testing.assert_accurate(result, reference, *of_layer, precision=precision)


@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS)
def test_all_layers_at_once(dtype, precision):
    v, left, right, values = layers(dtype)
    bound = "bf16" if precision == "bf16" else "ieee"
    result = kron_apply.kron_apply(left, v, right, precision=precision)
    hold(result, ops.kron_apply, (left, v, right), bound)
    dampings = [0.5 + n for n in range(len(v))]
    result = kron_solve.kron_solve(v, left, right, values, dampings, precision=precision)
    hold(result, ops.kron_solve, (v, left, right, values, dampings), bound)
    again = kron_solve.kron_solve(v, left, right, values, dampings, precision=precision)
    assert all(torch.equal(one, other) for one, other in zip(result, again, strict=True))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout):
    v, left, right, values = layers(shapes=((3, 17, 33), (16, 32)), layout=layout)
    hold(kron_apply.kron_apply(left, v, right), ops.kron_apply, (left, v, right), "ieee")
    result = kron_solve.kron_solve(v, left, right, values, 0.1)
    hold(result, ops.kron_solve, (v, left, right, values, [0.1, 0.1]), "ieee")


@pytest.mark.parametrize("name", grouped.TILES)
def test_whole_tiles_that_can_be_loaded_16_bytes_at_a_time(name):
    v, left, right, values = layers(shapes=((2, 64, 128), (48, 32)))
    for eye in (left, right):
        for n, x in enumerate(eye):
            eye[n] = torch.linalg.qr(x)[0]
    precision = {"bf16x3": "bf16", "bf16x6": "bf16x3"}.get(name, name)
    assert grouped.product(precision) == name
    result = kron_solve.kron_solve(v, left, right, values, 1.0, precision=precision)
    hold(result, ops.kron_solve, (v, left, right, values, [1.0, 1.0]), "bf16" if precision == "bf16" else "ieee")


def test_one_layer_and_refusals():
    v, left, right, _ = (column[1] for column in layers())
    result = ops.kron_apply.on("triton")(left, v, right)
    assert isinstance(result, torch.Tensor)
    testing.assert_accurate(result, ops.kron_apply, left, v, right)
    assert "float64" in kron_apply.supports([left.double()], [v.double()], [right.double()])
    assert "several devices" in grouped.supports([v, v.to("meta")])
    assert "cuBLAS" in grouped.worthwhile(v, "ieee") and grouped.worthwhile(v, "auto") is None
    assert grouped.worthwhile([v, v], "ieee") is None
    assert kron_apply.kron_apply([], [], []) == [] and DEVICE


def test_no_copy_to_the_device_waits_for_it(monkeypatch):
    """But the list of programs, which is made once for the shapes."""
    args = [tensor(*shape) for shape in ((3, 3), (3, 5), (5, 5))]
    kron_apply.kron_apply(*args)
    copies, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: copies.append(k) or to(x, *a, **k))
    kron_apply.kron_apply(*args)
    assert copies.count({"non_blocking": True}) == len(copies) == 2


def test_a_capture_takes_no_table_from_the_host(monkeypatch):
    layer = types.SimpleNamespace(device="cuda:0", is_cuda=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in grouped.supports([layer])
