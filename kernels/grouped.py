"""Products of many layers' matrices in one launch: out_b = x_b' y_b, (R, C), each layer with extents and memory of its own.

A program finds its layer, batch entry and tile in a list that is made once for the shapes; where the layer's matrices lie is in
a table of addresses, which is all that a call copies to the GPU. float32 throughout; no result is split, nothing added twice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables, tiles
from .tiles import Tile, cross

# Tiles by product. Not yet measured on a GPU.
TILES: dict[str, Tile] = {
    "bf16x3": Tile(64, 16, 8, 3, 64),
    "bf16x6": Tile(64, 16, 8, 3, 64),
    "ieee": Tile(64, 16, 8, 3, 64),
}
FIELDS = 12


class Job(NamedTuple):
    """One layer's products: out (B, R, C) = x' y, of x (B or 1, K, R) and y (B or 1, K, C).

    `x_by_k`: x is given as (B or 1, R, K) instead, and `y_by_k` likewise. All contiguous float32. values (R, C), damping:
    what the result is divided by, values + damping.
    """

    x: Tensor
    y: Tensor
    out: Tensor
    values: Tensor | None = None
    damping: float = 0.0


@triton.jit
def _grouped_kernel(
    jobs_ptr, programs_ptr, damping_ptr,
    X_BY_K: tl.constexpr, Y_BY_K: tl.constexpr, DIVIDE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    FIELDS: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of one batch entry of one layer. ALIGNED: every address and row is a multiple of 16 elements."""
    program_ptr = programs_ptr + tl.program_id(0) * 4
    job, b = tl.load(program_ptr), tl.load(program_ptr + 1).to(tl.int64)
    r_start, c_start = tl.load(program_ptr + 2), tl.load(program_ptr + 3)
    job_ptr = jobs_ptr + job * FIELDS
    x_ptr = tl.load(job_ptr).to(tl.pointer_type(tl.float32))
    y_ptr = tl.load(job_ptr + 1).to(tl.pointer_type(tl.float32))
    out_ptr = tl.load(job_ptr + 2).to(tl.pointer_type(tl.float32))
    batch_x, batch_y, batch_out = tl.load(job_ptr + 4), tl.load(job_ptr + 5), tl.load(job_ptr + 6)
    row_x, row_y = tl.load(job_ptr + 7).to(tl.int32), tl.load(job_ptr + 8).to(tl.int32)
    length, r_all, c_all = (
        tl.load(job_ptr + 9).to(tl.int32), tl.load(job_ptr + 10).to(tl.int32), tl.load(job_ptr + 11).to(tl.int32),
    )  # fmt: skip
    if ALIGNED:
        x_ptr, y_ptr = tl.multiple_of(x_ptr, 16), tl.multiple_of(y_ptr, 16)
        batch_x, batch_y = tl.multiple_of(batch_x, 16), tl.multiple_of(batch_y, 16)
        row_x, row_y = tl.multiple_of(row_x, 16), tl.multiple_of(row_y, 16)
        length, r_all, c_all = tl.multiple_of(length, 16), tl.multiple_of(r_all, 16), tl.multiple_of(c_all, 16)
        r_start, c_start = tl.multiple_of(r_start, 16), tl.multiple_of(c_start, 16)
    lane, k = tl.arange(0, SIDE)[None, :], tl.arange(0, DEPTH)[:, None]
    x_ptr += b * batch_x
    y_ptr += b * batch_y
    if X_BY_K:
        x_ptr += r_start.to(tl.int64) * row_x
        x_at, step_x = k + lane * row_x, tl.full((), 1, tl.int64)
    else:
        x_ptr += r_start
        x_at, step_x = k * row_x + lane, row_x.to(tl.int64)
    if Y_BY_K:
        y_ptr += c_start.to(tl.int64) * row_y
        y_at, step_y = k + lane * row_y, tl.full((), 1, tl.int64)
    else:
        y_ptr += c_start
        y_at, step_y = k * row_y + lane, row_y.to(tl.int64)
    total = cross(
        x_ptr, y_ptr, x_at, y_at, step_x, step_y, r_start + lane < r_all, c_start + lane < c_all, length,
        SIDE, SIDE, PRECISION, False, DEPTH, CHUNK,
    )  # fmt: skip
    r, c = r_start + tl.arange(0, SIDE)[:, None], c_start + lane
    at, inside = r.to(tl.int64) * c_all + c, (r < r_all) & (c < c_all)
    if DIVIDE:
        values_ptr = tl.load(job_ptr + 3).to(tl.pointer_type(tl.float32))
        total = total / (tl.load(values_ptr + at, mask=inside, other=1.0) + tl.load(damping_ptr + job))
    tl.store(out_ptr + b * batch_out + at, total, mask=inside)


@functools.lru_cache(256)
def _programs(extents: tuple[tuple[int, int, int], ...], side: int, device: torch.device) -> Tensor:
    """(programs, 4) int32: layer, batch entry, and the tile's first row and column; extents: (B, R, C) of each layer."""
    rows = [
        (job, b, r, c)
        for job, (batch, r_all, c_all) in enumerate(extents)
        for b in range(batch) for r in range(0, r_all, side) for c in range(0, c_all, side)
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 4).to(device)


def _row(job: Job, x_by_k: bool, y_by_k: bool) -> list[int]:
    (batch, r, c), length = job.out.shape, job.x.shape[2 if x_by_k else 1]
    one_x, one_y = (0 if len(z) < batch else z.shape[1] * z.shape[2] for z in (job.x, job.y))
    values = 0 if job.values is None else job.values.data_ptr()
    return [
        job.x.data_ptr(), job.y.data_ptr(), job.out.data_ptr(), values, one_x, one_y, r * c, job.x.shape[2], job.y.shape[2],
        length, r, c,
    ]  # fmt: skip


def run(stages: Sequence[tuple[Sequence[Job], bool, bool]], name: str, tile: Tile | None = None) -> None:
    """Stages one after another, each one launch: (jobs, x_by_k, y_by_k), no extent of any 0. `name`: how `tiles.dot`
    multiplies. Rows must be shorter than 2^31 / side."""
    device = stages[0][0][0].x.device
    tile = tables.tile(device, f"grouped {name}", TILES[name]) if tile is None else tile
    rows = [[_row(job, x_by_k, y_by_k) for job in jobs] for jobs, x_by_k, y_by_k in stages]
    places = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)  # staged at once: nothing waits
    dampings = torch.tensor([[job.damping for job in jobs] for jobs, _, _ in stages], dtype=torch.float32)
    dampings = dampings.to(device, non_blocking=True)
    for (jobs, x_by_k, y_by_k), table, damping, row in zip(stages, places, dampings, rows, strict=True):
        programs = _programs(tuple(tuple(job.out.shape) for job in jobs), tile.side, device)
        aligned = all(value % 16 == 0 for one in row for value in one)
        _grouped_kernel[(len(programs),)](
            table, programs, damping, X_BY_K=x_by_k, Y_BY_K=y_by_k, DIVIDE=jobs[0].values is not None, ALIGNED=aligned,
            PRECISION=name, FIELDS=FIELDS, SIDE=tile.side, DEPTH=tile.depth, CHUNK=tile.chunk,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip


def batched(v: Tensor) -> Tensor:
    """v (O, I) or (K, O, I) -> (K, O, I), contiguous float32."""
    return (v if v.dim() == 3 else v[None]).float().contiguous()


def each(*given: Tensor | Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The arguments of an op layer by layer, be they tensors or lists."""
    return [given] if isinstance(given[0], Tensor) else list(zip(*given, strict=True))


def product(precision: str) -> str:
    """How products and solves are multiplied: "auto" is "bf16x6", as exact as float32. The others are one step finer than what is
    asked for, whose bound the errors of two products in a row would exceed."""
    return {"auto": "bf16x6", "bf16x3": "bf16x6", "bf16": "bf16x3"}.get(precision, precision)


def supports(v: Tensor | Sequence[Tensor]) -> str | None:
    """Why these layers cannot be taken together, or None."""
    layers = [v] if isinstance(v, Tensor) else v
    if len({x.device for x in layers}) > 1:
        return "the layers are on several devices; one launch runs on one"
    if layers and layers[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and a table of addresses would have to come from the host"
    return next((reason for reason in map(tiles.unfit, layers) if reason is not None), None)


def worthwhile(v: Tensor | Sequence[Tensor], precision: str) -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    if product(precision) != "ieee":
        return None
    layers = [v] if isinstance(v, Tensor) else v
    if len(layers) == 1 or sum(x.numel() * sum(x.shape[-2:]) for x in layers) > len(layers) << 24:
        return tables.CUBLAS
    return None  # small layers: what counts is the launches
