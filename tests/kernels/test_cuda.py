"""The CUDA extension where there is no GPU: it loads, its errors reach Python, and its launcher hands over what it should."""

import ctypes
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hvpfast.kernels import native_cuda

from hvpfast import dispatch, ops, testing


def built():
    module = native_cuda._load("cuda")
    if isinstance(module, str):
        pytest.skip(f"hvpfast.kernels._cuda is {module}")
    return module


def test_it_loads_without_a_gpu_and_knows_its_workspace():
    module = built()
    side = module.gram_tile()
    assert module.gram_workspace(0, False, 1) == side * side
    assert module.gram_workspace(2 * side + 1, True, 3) == 3 * (6 * side * side + 3 * side)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_errors_become_exceptions():
    module = built()
    with pytest.raises(RuntimeError, match=r"cudaGetDevice: .*\(cudaError"):
        module.gram(0, 0, 4, 4, 4, 1, 0, 4, 1, 1.0, 0.0, False, True, 0, 0, 0, 1, 0, 0)
    with pytest.raises(ValueError, match="splits"):
        module.gram(0, 0, 4, 4, 4, 1, 0, 4, 1, 1.0, 0.0, False, True, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="products must be 0, 1 or 3"):
        module.gram(0, 0, 4, 4, 4, 1, 0, 4, 1, 1.0, 0.0, False, True, 0, 2, 0, 1, 0, 0)


def floats(pointer: int, shape: tuple[int, int], strides: tuple[int, int]) -> np.ndarray:
    """float32 memory at an address, as an array."""
    span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
    memory = np.ctypeslib.as_array((ctypes.c_float * span).from_address(pointer)) if span else np.zeros(0, np.float32)
    return np.lib.stride_tricks.as_strided(memory, shape, [4 * s for s in strides])


class FakeModule:
    """Stands for `_cuda`: does on the CPU, from the raw arguments, what the kernel does on a GPU."""

    def __init__(self):
        self.splits, self.stream, self.workspace = 0, 0, 0

    def gram_tile(self):
        return 4

    def gram_workspace(self, width, ones_column, splits):
        self.workspace = 16 * splits
        return self.workspace

    def gram(self, x, dtype, rows, width, stride_n, stride_d, out, out_stride_i, out_stride_j, alpha, beta, ones_column,
             mirror, workspace, products, halves, splits, device, stream):  # fmt: skip
        assert dtype == 0 and device == 0 and splits >= 1 and products == 0 and halves == 0
        floats(workspace, (1, self.workspace), (self.workspace, 1))[:] = math.nan  # it is all there to be written
        data = floats(x, (rows, width), (stride_n, stride_d)).astype(np.float64)
        if ones_column:
            data = np.concatenate([data, np.ones((rows, 1))], 1)
        result = floats(out, (data.shape[1],) * 2, (out_stride_i, out_stride_j))
        made = alpha * data.T @ data + (beta * result if beta else 0)
        result[:] = made if mirror else np.tril(made) + np.triu(result, 1)
        self.splits, self.stream = splits, stream


@pytest.fixture
def fake(monkeypatch):
    module = FakeModule()
    monkeypatch.setattr(native_cuda, "_load", lambda device: module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(native_cuda, "_processors", lambda device: 8)
    monkeypatch.setattr(native_cuda, "_capability", lambda device: (8, 0))
    return module


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", [(7,), (1, 1), (9, 5), (2, 3, 4), (3000, 3), (0, 4)])
def test_launcher_hands_over_pointers_and_strides(fake, shape, layout):
    x = testing.laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(0)), layout)
    for ones_column in (False, True):
        width = shape[-1] + ones_column
        testing.assert_accurate(native_cuda.cuda_gram(x, ones_column=ones_column), ops.gram, x, ones_column=ones_column)
        before = torch.randn(width, width).T
        out = native_cuda.cuda_gram(x, out=before.clone(), alpha=0.5, beta=2.0, ones_column=ones_column)
        testing.assert_accurate(out, ops.gram, x, out=before, alpha=0.5, beta=2.0, ones_column=ones_column)
    assert fake.stream == 77
    assert fake.splits == (2 if shape == (3000, 3) else 1)


def test_it_says_what_it_cannot_do_and_leaves_the_choice_to_triton():
    assert "float64" in native_cuda.cuda_gram_supports(torch.ones(2, 2, dtype=torch.float64))
    assert "on cpu" in native_cuda.cuda_gram_supports(torch.ones(2, 2))
    assert "not yet measured" in native_cuda.cuda_gram_worthwhile(torch.ones(2, 2))
    assert "cuda" in ops.gram.backends and ops.gram.choose(torch.ones(2, 2)).backend != "cuda"
    with pytest.raises(dispatch.BackendError, match="'cuda' was asked for"):
        ops.gram.on("cuda")(torch.ones(2, 2))
