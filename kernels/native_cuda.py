"""Launchers of the compiled kernels for CUDA (`_cuda`): they check, allocate, and hand over pointers, strides and the stream."""

from __future__ import annotations

import torch
from hvpfast.kernels.extensions import _load

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_UNMEASURED = "not yet measured on a GPU, so it runs where backend 'cuda' is asked for, and"


def _device_reason(name: str, x: torch.Tensor) -> str | None:
    if not x.is_cuda:
        return f"{name} is on {x.device.type}; the kernel reads the memory of a CUDA device"
    if _capability(x.device) < (8, 0):
        return "the device's compute capability is below 8.0"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _where(x: torch.Tensor) -> tuple[int, int]:
    """Ordinal of the device, and its current stream."""
    return x.device.index or 0, torch.cuda.current_stream(x.device).cuda_stream


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# gram -----------------------------------------------------------------------------------------------------------------


_FEW_ROWS = 32  # below these float32 is multiplied in full


def cuda_gram_supports(
    x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, mirror=True, precision="auto"
) -> str | None:
    if x.dtype not in _DTYPES or x.dtype is torch.float64:
        return f"x is {x.dtype}; the kernel reads float32, bfloat16 and float16 and sums in float32"
    reason = _device_reason("x", x)
    if reason is not None:
        return reason
    if out is not None and x.numel() and x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
        return "out shares memory with x"
    return None


def cuda_gram_worthwhile(
    x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, mirror=True, precision="auto"
) -> str | None:
    return f"{_UNMEASURED} Triton's kernel is taken before it"


def cuda_gram(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, mirror=True, precision="auto"):
    """See `hvpfast.ops.gram`. On Hopper (compute capability 9.0) tiles are made by warpgroups' products (wgmma): 16-bit data
    exactly, rows on 16 bytes; float32 split in bf16 halves first ("auto", "bf16x3") or rounded ("bf16"), at the cost of a
    copy. "ieee", other layouts and other GPUs go by 16 x 16 tensor-core products, float32 in full.

    Neither was run on a GPU so far, nor was anything timed: the source passes on a host (tests/kernels/on_host), its machine
    code is checked (tests/kernels/test_cuda_ahead.py), and Triton's kernel is taken unless backend "cuda" is asked for.
    """
    width = x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), width)
    if out is None:
        out = x.new_empty((width + bool(ones_column),) * 2, dtype=torch.float32)
    if not out.numel():
        return out
    module = _load("cuda")
    products = _wgmma_products(rows, precision)
    blocks = max(1, -(-width // module.gram_tile()))
    waves = 1 if products else 2  # blocks that a processor has at a time
    splits = _cuda_splits(blocks * (blocks + 1) // 2, len(rows), waves * _processors(x.device))
    workspace = x.new_empty(module.gram_workspace(width, bool(ones_column), splits), dtype=torch.float32)
    in_halves = products and x.dtype is torch.float32
    halves = x.new_empty(module.gram_halves(len(rows), width, products), dtype=torch.bfloat16) if in_halves else None
    module.gram(
        rows.data_ptr(), _DTYPES[x.dtype], len(rows), width, *rows.stride(), out.data_ptr(), *out.stride(),
        alpha, beta, bool(ones_column), bool(mirror), workspace.data_ptr(), products, 0 if halves is None else halves.data_ptr(),
        splits, *_where(x),
    )  # fmt: skip
    return out


def _wgmma_products(x: torch.Tensor, precision: str) -> int:
    """How many products of 16-bit data make one of x (N, D) by Hopper's instructions, or 0 where they do not fit."""
    if _capability(x.device) != (9, 0) or not x.numel() or max(x.shape) >= 1 << 31:
        return 0
    if x.dtype is torch.float32:  # few rows have nothing to gain, and their rounding does not average out
        return 0 if len(x) < _FEW_ROWS else {"auto": 3, "bf16x3": 3, "bf16": 1}.get(precision, 0)
    whole = x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return int(whole)


def _cuda_splits(tiles: int, rows: int, most: int) -> int:
    """Ranges of rows: at most that many blocks in all, each of at least 1024 rows."""
    return max(1, min(most // tiles, rows // 1024, 64))


# reorthogonalize ------------------------------------------------------------------------------------------------------

_BLOCKS = 2  # a processor: their chunks of up to 190 rows stay in the L2 cache of an H100 from one read to the next


def _each(*given):
    """The arguments tensor by tensor, be they tensors or lists."""
    return [given] if isinstance(given[0], torch.Tensor) else list(zip(*given, strict=True))


def cuda_reorthogonalize_supports(w, basis, *, normalize=False, precision="auto") -> str | None:
    parts = _each(w, basis)
    for one, _ in parts:
        if one.dtype not in _DTYPES:
            return f"w is {one.dtype}; the kernel reads float64, float32, bfloat16 and float16"
        reason = _device_reason("w", one)
        if reason is not None:
            return reason
    if len({(one.device, one.dtype) for one, _ in parts}) != 1:
        return "w is of several dtypes, on several devices, or of no tensors; one launch takes one of each"
    return None


def cuda_reorthogonalize_worthwhile(w, basis, *, normalize=False, precision="auto") -> str | None:
    return f"{_UNMEASURED} the reference otherwise"


def cuda_reorthogonalize(w, basis, *, normalize=False, precision="auto"):
    """See `hvpfast.ops.reorthogonalize`. Every sum is float64, under every precision and for every dtype.

    Six launches for up to 40 tensors (seven to normalise, two or three for an empty basis; for every 40 more three or four),
    the basis read three times; no wait, and nothing that a CUDA graph cannot hold: the results and the workspace come from
    torch's allocator.
    """
    module, parts, double = _load("cuda"), _each(w, basis), torch.float64
    first, count = parts[0][0], len(parts[0][1])
    rests = [one.new_empty(one.shape, dtype=double if one.dtype is double else torch.float32) for one, _ in parts]
    coefficients, norm = first.new_empty(count, dtype=double), first.new_empty((), dtype=double)
    flat = [
        (one.reshape(-1), rows.reshape(count, one.numel())) for one, rows in parts
    ]  # copies only where no view can be
    places = [
        number
        for (one, rows), rest in zip(flat, rests, strict=True) if one.numel()
        for number in (one.data_ptr(), one.stride(0), rows.data_ptr(), *rows.stride(), rest.data_ptr(), one.numel())
    ]  # fmt: skip
    chunks = sum(-(-one.numel() // module.krylov_chunk()) for one, _ in flat)
    blocks = max(1, min(chunks, _BLOCKS * _processors(first.device)))
    workspace = first.new_empty(module.reorthogonalize_workspace(len(places) // 7, count, blocks), dtype=double)
    module.reorthogonalize(
        places, _DTYPES[first.dtype], count, coefficients.data_ptr(), norm.data_ptr(), bool(normalize),
        workspace.data_ptr(), blocks, *_where(first),
    )  # fmt: skip
    return rests[0] if isinstance(w, torch.Tensor) else rests, coefficients, norm


# cg_update ------------------------------------------------------------------------------------------------------------

_ELEMENTS, _OCCUPANCY = 256 * 4, 4  # that a block of the kernel has under way at once, and blocks a processor


def cuda_cg_update_supports(x, r, p, q, rz, *, damping=0.0, inplace=False, precision="auto") -> str | None:
    parts = _each(x, r, p, q)
    for one in parts:
        reason = _device_reason("x", one[0])
        if reason is None and one[0].dtype not in _DTYPES:
            reason = f"x is {one[0].dtype}; the kernel reads float64, float32, bfloat16 and float16"
        if reason is None and inplace and not all(y.is_contiguous() for y in one[:3]):
            reason = "x, r or p is not contiguous, and the kernel writes into contiguous memory"
        if reason is not None:
            return reason
    if len({(one[0].device, one[0].dtype) for one in parts}) > 1:
        return "the tensors are of several dtypes or on several devices; one launch takes one of each"
    if rz.numel() > 256:
        return f"rz has {rz.numel()} columns; the kernel takes 256 together"
    return None


def cuda_cg_update_worthwhile(x, r, p, q, rz, *, damping=0.0, inplace=False, precision="auto") -> str | None:
    return f"{_UNMEASURED} the reference otherwise"


def cuda_cg_update(x, r, p, q, rz, *, damping=0.0, inplace=False, precision="auto"):
    """See `hvpfast.ops.cg_update`. Three launches for up to 48 tensors (and three for every 48 more): the vectors are read eight
    times and written three times in all, every sum is float64, nothing waits, and a CUDA graph can hold it."""
    module, parts = _load("cuda"), _each(x, r, p, q)
    wide = torch.float64 if parts and parts[0][0].dtype is torch.float64 else torch.float32
    curvature, rr = rz.new_empty(rz.shape), rz.new_empty(rz.shape)
    new = [one[:3] if inplace else tuple(y.new_empty(y.shape, dtype=wide) for y in one[:3]) for one in parts]
    held = [tuple(y.contiguous() for y in one) for one in parts]  # until the launches have been made
    places = [
        number
        for one, made in zip(held, new, strict=True) if one[0].numel()
        for number in (*(y.data_ptr() for y in (*one, *made)), one[0].numel())
    ]  # fmt: skip
    if places and rz.numel():
        device, rz = held[0][0].device, rz.contiguous()
        longest, tensors, columns = max(one[0].numel() for one in held), len(places) // 8, rz.numel()
        blocks = max(1, min(-(-longest // _ELEMENTS), _OCCUPANCY * _processors(device)))
        workspace = rz.new_empty(module.cg_workspace(tensors, columns, blocks))
        module.cg_update(
            places, _DTYPES[held[0][0].dtype], columns, rz.data_ptr(), damping, curvature.data_ptr(), rr.data_ptr(),
            workspace.data_ptr(), blocks, *_where(held[0][0]),
        )  # fmt: skip
    else:
        curvature.zero_(), rr.zero_()
    if inplace:
        torch.autograd.graph.increment_version([y for one in new for y in one])
        return x, r, p, curvature, rr
    made = [list(one) for one in zip(*new, strict=True)] if new else [[], [], []]
    return (*((one[0] for one in made) if isinstance(x, torch.Tensor) else made), curvature, rr)
