"""Gram matrix of features, out = beta out + alpha (x 1)'(x 1), x (N, D), in Triton: the lower triangle, split over N.

One program owns one tile (i, j), i >= j, of the output and one of S ranges of N; for a ones column one more program for
each block of columns sums x. They leave float32 partial tiles in a workspace, and a second launch adds the S of them in
a fixed order (no atomics: the same bits every time), scales, and writes both halves from one value, exactly symmetric
where out is, or the lower one. Flops: N D (D + 1), half of a full product's. Bytes: at least 2 N D (16-bit) + 4 D^2; each
x tile is read about D / side times, mostly from L2, and the partials are 8 S bytes for each element of the triangle.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tables, tiles
from .tiles import Tile, choose_splits, cross, dot, triangle

# Tiles by product: the first row whose largest D and N hold the problem. "exact-odd" is for 16-bit rows that cannot be
# loaded 16 bytes at a time. None needs more than 99 KB of shared memory or spills on sm_80, sm_90, sm_100 (bench/ahead.py):
# float32 data pass through registers on their way to the tensor cores, and 32 rows a step would spill. The tables of sm_90 and
# later have TMA copy most of these tiles, which saves registers (compiled for sm_90: 144 for 204 in bf16, 172 for 224 in bf16x3).
# Not yet measured on a GPU.
#   D up to, N up to, tile
TILES: dict[str, tuple[tuple[float, float, Tile], ...]] = {
    "exact": ((512, math.inf, Tile(64, 64, 8, 3, 16)), (math.inf, math.inf, Tile(128, 64, 8, 3, 16))),
    "exact-odd": ((math.inf, math.inf, Tile(64, 64, 8, 3, 16)),),
    "bf16": ((512, math.inf, Tile(64, 16, 4, 4, 64)), (math.inf, math.inf, Tile(128, 16, 8, 4, 64))),
    "bf16x3": ((512, math.inf, Tile(64, 16, 4, 4, 64)), (math.inf, math.inf, Tile(128, 16, 8, 4, 64))),
    "bf16x6": ((math.inf, math.inf, Tile(64, 16, 8, 3, 64)),),
    "ieee": ((math.inf, math.inf, Tile(64, 16, 4, 3, 64)),),
}
SQUARE = 32  # side of what one program of the second launch adds up
FEW_ROWS = 32  # below these the tensor cores have nothing to gain, and float32 costs nothing


@triton.jit
def _copied(x_tiles, left, right, start, stop, SIDE: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr):
    """The sum over rows [start, stop) of columns from `left` on with columns from `right` on, copied by TMA: what lies outside x
    is 0. Its coordinates are 32-bit, as the launcher's rows are."""
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for row in range(start, stop, DEPTH):
        total = dot(tl.trans(x_tiles.load([row, left])), x_tiles.load([row, right]), total, PRECISION)
    return total


@triton.jit
def _gram_kernel(
    x_ptr, x_tiles, part_ptr, rows, width, blocks, steps_per_split, stride_xn, stride_xd,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Tile `program_id(0)` of the triangle (beyond it: a block of column sums) over split `program_id(1)` of the rows.

    x_tiles: with TMA, a descriptor of x in tiles (DEPTH, SIDE). part_ptr: (splits, triangle, SIDE, SIDE), then (splits, blocks,
    SIDE). Offsets are 64-bit between tiles (N D may exceed 2^31) and 32-bit within one (the launcher sees to it).
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    in_triangle = blocks * (blocks + 1) // 2
    start = split * steps_per_split * DEPTH
    length = min(steps_per_split * DEPTH, rows - start)  # below 0 for a split with nothing left to do
    x_ptr += tl.cast(start, tl.int64) * stride_xn
    n, lane = tl.arange(0, DEPTH), tl.arange(0, SIDE)
    at = n[:, None] * stride_xn + lane[None, :] * stride_xd  # (DEPTH, SIDE)
    step = tl.cast(stride_xn, tl.int64)
    if tile < in_triangle:
        row, column = triangle(tile)
        if TMA:
            product, stop = tl.zeros((SIDE, SIDE), tl.float32), start + length
            for chunk in range(start, stop, DEPTH * CHUNK):
                end = min(chunk + DEPTH * CHUNK, stop)
                product += _copied(x_tiles, row * SIDE, column * SIDE, chunk, end, SIDE, PRECISION, DEPTH)
        else:
            left = x_ptr + tl.cast(row * SIDE, tl.int64) * stride_xd
            right = x_ptr + tl.cast(column * SIDE, tl.int64) * stride_xd
            left_in, right_in = (row * SIDE + lane < width)[None, :], (column * SIDE + lane < width)[None, :]
            product = cross(
                left, right, at, at, step, step, left_in, right_in, length, SIDE, SIDE, PRECISION, EVEN, DEPTH, CHUNK
            )
        part_ptr += (tl.cast(split, tl.int64) * in_triangle + tile) * (SIDE * SIDE)
        tl.store(part_ptr + lane[:, None] * SIDE + lane[None, :], product)
    else:
        block = tile - in_triangle
        x_ptr += tl.cast(block * SIDE, tl.int64) * stride_xd
        sums = tl.zeros((DEPTH, SIDE), tl.float32)
        for k in range(0, length, DEPTH):
            inside = (k + n < length)[:, None] & (block * SIDE + lane < width)[None, :]
            sums += tl.load(x_ptr + k * step + at, mask=inside, other=0.0).to(tl.float32)
        part_ptr += tl.cast(tl.num_programs(1), tl.int64) * in_triangle * (SIDE * SIDE)
        tl.store(part_ptr + (split * blocks + block) * SIDE + lane, tl.sum(sums, 0))


@triton.jit
def _blend(place, value, keep, alpha, beta, ADD: tl.constexpr):
    """Store beta * (what is there) + alpha * value where `keep`; memory is not read unless ADD."""
    value = alpha * value
    if ADD:
        value += beta * tl.load(place, mask=keep, other=0.0)
    tl.store(place, value, mask=keep)


@triton.jit
def _add_kernel(
    part_ptr, out_ptr, rows, width, blocks, splits, stride_oi, stride_oj, alpha, beta,
    ADD: tl.constexpr, MIRROR: tl.constexpr, SIDE: tl.constexpr, SQUARE: tl.constexpr,
):  # fmt: skip
    """Add the splits of one SQUARE x SQUARE part of a tile, or (past the triangle) of one block of column sums, and
    blend the sum into out below the diagonal and, with MIRROR, above."""
    in_triangle = blocks * (blocks + 1) // 2
    PER_SIDE: tl.constexpr = SIDE // SQUARE
    program = tl.program_id(0)
    split_step = tl.cast(in_triangle, tl.int64) * (SIDE * SIDE)
    step_i, step_j = tl.cast(stride_oi, tl.int64), tl.cast(stride_oj, tl.int64)
    if program < in_triangle * PER_SIDE * PER_SIDE:
        tile, square = program // (PER_SIDE * PER_SIDE), program % (PER_SIDE * PER_SIDE)
        row, column = triangle(tile)
        lane = tl.arange(0, SQUARE)
        r, c = (square // PER_SIDE) * SQUARE + lane, (square % PER_SIDE) * SQUARE + lane  # within the tile
        place = part_ptr + tl.cast(tile, tl.int64) * (SIDE * SIDE) + r[:, None] * SIDE + c[None, :]
        total = tl.zeros((SQUARE, SQUARE), tl.float32)
        for _ in range(splits):
            total += tl.load(place)
            place += split_step
        i, j = (row * SIDE + r)[:, None], (column * SIDE + c)[None, :]
        inside = (i < width) & (j < width)
        _blend(out_ptr + i * step_i + j * step_j, total, inside & (i >= j), alpha, beta, ADD)
        if MIRROR:
            _blend(out_ptr + j * step_i + i * step_j, total, inside & (i > j), alpha, beta, ADD)
    else:
        block = program - in_triangle * PER_SIDE * PER_SIDE
        lanes = tl.arange(0, SIDE)
        sums_ptr = part_ptr + splits * split_step + block * SIDE + lanes
        sums = tl.zeros((SIDE,), tl.float32)
        for _ in range(splits):
            sums += tl.load(sums_ptr)
            sums_ptr += blocks * SIDE
        d = block * SIDE + lanes
        _blend(out_ptr + width * step_i + d * step_j, sums, d < width, alpha, beta, ADD)
        if MIRROR:
            _blend(out_ptr + d * step_i + width * step_j, sums, d < width, alpha, beta, ADD)
        _blend(out_ptr + width * (step_i + step_j), tl.cast(rows, tl.float32), block == 0, alpha, beta, ADD)


def choose_tile(x: Tensor, product: str) -> Tile:
    """The tile for x (N, D) from `TILES`."""
    rows, width = x.shape
    by_rows = x.stride(1) == 1 and x.stride(0) % 16 == 0
    by_columns = x.stride(0) == 1 and x.stride(1) % 16 == 0 and rows % 16 == 0
    vectors = x.data_ptr() % 16 == 0 and width % 16 == 0 and (by_rows or by_columns)
    tile = _tile_of(x, product)
    if product == "exact" and not vectors and not (tile.tma and copyable(x)):
        return _tile_of(x, "exact-odd")
    return tile


def _tile_of(x: Tensor, key: str) -> Tile:
    rows, width = x.shape
    fitting = (
        n for n, (most_width, most_rows, _) in enumerate(TILES[key]) if width <= most_width and rows <= most_rows
    )
    row = next(fitting)
    return tables.tile(x.device, f"gram {key} {row}", TILES[key][row][-1])


def supports(
    x: Tensor,
    *,
    out: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    ones_column: bool = False,
    mirror: bool = True,
    precision: str = "ieee",
) -> str | None:
    """Why this kernel cannot take the arguments, or None."""
    if out is not None and x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() and x.numel():
        return "out shares memory with x, which the kernel still reads when it writes out"
    return tiles.unfit(x)


def worthwhile(
    x: Tensor,
    *,
    out: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    ones_column: bool = False,
    mirror: bool = True,
    precision: str = "ieee",
) -> str | None:
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    return tables.slower(x, "gram", x.numel() * x.shape[-1] / 2, precision)


def gram(
    x: Tensor,
    *,
    out: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    ones_column: bool = False,
    mirror: bool = True,
    precision: str = "ieee",
) -> Tensor:
    """See `hvpfast.ops.gram`; `precision` is that of float32 data ("auto" is "bf16x3")."""
    width = x.shape[-1]
    flat = x.reshape(math.prod(x.shape[:-1]), width)  # a view wherever the leading axes allow one
    if out is None:
        out = x.new_empty((width + bool(ones_column),) * 2, dtype=torch.float32)
    product = "ieee" if x.dtype is torch.float32 and len(flat) < FEW_ROWS else tiles.product(x.dtype, precision)
    tile = choose_tile(flat, product)
    blocks = max(1, -(-width // tile.side))
    programs = blocks * (blocks + 1) // 2 + blocks * bool(ones_column)
    splits = choose_splits(programs, -(-len(flat) // tile.depth), tiles.facts(x.device).processors)
    if out.numel():
        with tiles.on_device(x):
            launch(flat, out, alpha, beta, bool(ones_column), product, tile, splits, bool(mirror))
    return out


def copyable(x: Tensor) -> bool:
    """Whether TMA can copy tiles of x (N, D): rows side by side, and addresses that are multiples of 16 bytes."""
    bytes_each = x.element_size()
    fits = x.data_ptr() % 16 == 0 and x.stride(1) == 1 and x.stride(0) * bytes_each % 16 == 0
    return fits and x.numel() > 0 and x.stride(0) >= x.shape[1] and tiles.facts(x.device).capability >= 90


def launch(
    x: Tensor,
    out: Tensor,
    alpha: float,
    beta: float,
    ones_column: bool,
    product: str,
    tile: Tile,
    splits: int,
    mirror: bool = True,
) -> None:
    """Run with a given tile and count of splits: x (N, D), out (D, D) or (D + 1, D + 1)."""
    rows, width = x.shape
    blocks = max(1, -(-width // tile.side))
    in_triangle, sums = blocks * (blocks + 1) // 2, blocks * ones_column
    steps_per_split = max(1, -(-rows // (tile.depth * splits)))
    if tile.depth * x.stride(0) + tile.side * x.stride(1) >= 1 << 31:
        x = x.contiguous()  # the kernel's offsets within a tile are 32-bit
    part = x.new_empty(splits * (in_triangle * tile.side**2 + sums * tile.side), dtype=torch.float32)
    tma = tile.tma and tile.chunk > 0 and copyable(x)
    x_tiles = TensorDescriptor.from_tensor(x, [tile.depth, tile.side]) if tma else x
    _gram_kernel[in_triangle + sums, splits](
        x, x_tiles, part, rows, width, blocks, steps_per_split, *x.stride(),
        PRECISION=product, EVEN=not tma and width % tile.side == 0 and rows % tile.depth == 0 and width > 0, TMA=tma,
        SIDE=tile.side, DEPTH=tile.depth, CHUNK=tile.chunk, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    _add_kernel[(in_triangle * (tile.side // SQUARE) ** 2 + sums,)](
        part, out, rows, width, blocks, splits, *out.stride(), float(alpha), float(beta),
        ADD=beta != 0, MIRROR=mirror, SIDE=tile.side, SQUARE=SQUARE, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
