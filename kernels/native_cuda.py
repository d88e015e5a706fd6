"""Launchers of the compiled kernels for CUDA (`_cuda`): they check, allocate, and hand over pointers, strides and the stream."""

from __future__ import annotations

import torch
from hvpfast.kernels.extensions import _load

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_UNMEASURED = "not yet measured on a GPU, so it runs where backend 'cuda' is asked for, and"


def _device_reason(name: str, x: torch.Tensor) -> str | None:
    if not x.is_cuda:
        return f"{name} is on {x.device.type}; the kernel reads the memory of a CUDA device"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the device's compute capability is below 8.0"
    return None


def _where(x: torch.Tensor) -> tuple[int, int]:
    """Ordinal of the device, and its current stream."""
    return x.device.index or 0, torch.cuda.current_stream(x.device).cuda_stream


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# gram -----------------------------------------------------------------------------------------------------------------


def cuda_gram_supports(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, precision="auto") -> str | None:
    if x.dtype not in _DTYPES or x.dtype is torch.float64:
        return f"x is {x.dtype}; the kernel reads float32, bfloat16 and float16 and sums in float32"
    reason = _device_reason("x", x)
    if reason is not None:
        return reason
    if out is not None and x.numel() and x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
        return "out shares memory with x"
    return None


def cuda_gram_worthwhile(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, precision="auto") -> str | None:
    return f"{_UNMEASURED} Triton's kernel is taken before it"


def cuda_gram(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, precision="auto"):
    """See `hvpfast.ops.gram`. float32 data are multiplied in full under every precision."""
    width = x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), width)
    if out is None:
        out = x.new_empty((width + bool(ones_column),) * 2, dtype=torch.float32)
    if not out.numel():
        return out
    module = _load("cuda")
    blocks = max(1, -(-width // module.gram_tile()))
    splits = _cuda_splits(blocks * (blocks + 1) // 2, len(rows), x.device)
    workspace = x.new_empty(module.gram_workspace(width, bool(ones_column), splits), dtype=torch.float32)
    module.gram(
        rows.data_ptr(), _DTYPES[x.dtype], len(rows), width, *rows.stride(), out.data_ptr(), *out.stride(),
        alpha, beta, bool(ones_column), workspace.data_ptr(), splits, *_where(x),
    )  # fmt: skip
    return out


def _cuda_splits(tiles: int, rows: int, device: torch.device) -> int:
    """Ranges of rows: enough blocks for two waves of the device, each of at least 1024 rows."""
    return max(1, min(2 * _processors(device) // tiles, rows // 1024, 64))


# reorthogonalize ------------------------------------------------------------------------------------------------------

_BLOCKS = 2  # a processor: their chunks of up to 190 rows stay in the L2 cache of an H100 from one read to the next


def cuda_reorthogonalize_supports(w, basis, *, normalize=False, precision="auto") -> str | None:
    if w.dtype not in _DTYPES:
        return f"w is {w.dtype}; the kernel reads float64, float32, bfloat16 and float16"
    return _device_reason("w", w)


def cuda_reorthogonalize_worthwhile(w, basis, *, normalize=False, precision="auto") -> str | None:
    return f"{_UNMEASURED} the reference otherwise"


def cuda_reorthogonalize(w, basis, *, normalize=False, precision="auto"):
    """See `hvpfast.ops.reorthogonalize`. Every sum is float64, under every precision and for every dtype.

    Six launches (seven to normalise, two or three for an empty basis), the basis read three times; no wait, and nothing
    that a CUDA graph cannot hold: the three results and the workspace come from torch's allocator.
    """
    module = _load("cuda")
    (count, length), double = basis.shape, torch.float64
    rest = w.new_empty(length, dtype=double if w.dtype is double else torch.float32)
    coefficients, norm = w.new_empty(count, dtype=double), w.new_empty((), dtype=double)
    blocks = max(1, min(-(-length // module.krylov_chunk()), _BLOCKS * _processors(w.device)))
    workspace = w.new_empty(module.reorthogonalize_workspace(count, blocks), dtype=double)
    module.reorthogonalize(
        w.data_ptr(), _DTYPES[w.dtype], length, *w.stride(), basis.data_ptr(), count, *basis.stride(), rest.data_ptr(),
        coefficients.data_ptr(), norm.data_ptr(), bool(normalize), workspace.data_ptr(), blocks, *_where(w),
    )  # fmt: skip
    return rest, coefficients, norm
