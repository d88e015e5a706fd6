"""Plain products x'y of two matrices by the tile engine, for ops whose other steps are kernels here.

No op of its own: torch.mm has no float32 product on tensor cores whose error is stated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables, tiles
from .tiles import Tile, choose_splits, cross

# Tiles by product: "-odd" is for matrices that
# cannot be loaded 16 bytes at a time. Not yet measured on a GPU.
TILES: dict[str, Tile] = {
    "exact": Tile(128, 32, 8, 4, 32),
    "exact-odd": Tile(64, 32, 8, 3, 32),
    "bf16": Tile(128, 16, 8, 3, 64),
    "bf16-odd": Tile(64, 16, 8, 3, 64),
    "bf16x3": Tile(128, 16, 8, 3, 64),
    "bf16x3-odd": Tile(64, 16, 8, 3, 64),
    "bf16x6": Tile(64, 16, 8, 3, 64),
    "ieee": Tile(64, 16, 8, 3, 64),
}


@triton.jit
def _product_kernel(
    x_ptr, y_ptr, out_ptr, length, r_all, c_all, tiles_c, steps_per_split,
    stride_xk, stride_xr, stride_yk, stride_yc, stride_s, stride_r, stride_c,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of x'y, (R, C), over one split of K: out (splits, R, C)."""
    tile, split = tl.program_id(0), tl.program_id(1)
    r_start, c_start = (tile // tiles_c) * SIDE, (tile % tiles_c) * SIDE
    lane, k = tl.arange(0, SIDE)[None, :], tl.arange(0, DEPTH)[:, None]
    start = split * steps_per_split * DEPTH
    step_x, step_y = tl.cast(stride_xk, tl.int64), tl.cast(stride_yk, tl.int64)
    total = cross(
        x_ptr + start * step_x + tl.cast(r_start, tl.int64) * stride_xr,
        y_ptr + start * step_y + tl.cast(c_start, tl.int64) * stride_yc,
        k * stride_xk + lane * stride_xr, k * stride_yk + lane * stride_yc, step_x, step_y,
        r_start + lane < r_all, c_start + lane < c_all, min(steps_per_split * DEPTH, length - start),
        SIDE, SIDE, PRECISION, EVEN, DEPTH, CHUNK,
    )  # fmt: skip
    r, c = r_start + tl.arange(0, SIDE)[:, None], c_start + lane
    out_ptr += tl.cast(split, tl.int64) * stride_s
    at = r * tl.cast(stride_r, tl.int64) + c * tl.cast(stride_c, tl.int64)
    tl.store(out_ptr + at, total, mask=(r < r_all) & (c < c_all))


def choose_tile(x: Tensor, y: Tensor, product: str) -> Tile:
    """The tile from `TILES` for this product, and for how x and y lie in memory."""
    fits = all(
        z.data_ptr() % 16 == 0
        and min(z.stride()) == 1
        and max(z.stride()) % 16 == 0
        and (z.shape[0] | z.shape[1]) % 16 == 0
        for z in (x, y)
    )
    return tables.of(x.device, "product", TILES, product, fits)


def product(x: Tensor, y: Tensor, name: str, *, tile: Tile | None = None, splits: int | None = None) -> Tensor:
    """x'y (R, C) in float32, contiguous, of x (K, R) and y (K, C); `name` is how `tiles.dot` multiplies.

    Only "ieee" and "bf16x6" take x and y of two dtypes. Workspace: the partial sums, where K is split.
    """
    (k, r), c = x.shape, y.shape[1]
    if 0 in (k, r, c):
        return x.new_zeros(r, c, dtype=torch.float32)
    tile = choose_tile(x, y, name) if tile is None else tile
    side = tile.side
    x, y = (tiles.within_32_bits(z, (0, tile.depth), (1, side)) for z in (x, y))
    tiles_c = triton.cdiv(c, side)
    programs, steps = triton.cdiv(r, side) * tiles_c, triton.cdiv(k, tile.depth)
    if splits is None:
        splits = choose_splits(programs, steps, tiles.facts(x.device).processors)
    out = x.new_empty(splits, r, c, dtype=torch.float32)
    _product_kernel[programs, splits](
        x, y, out, k, r, c, tiles_c, triton.cdiv(steps, splits), *x.stride(), *y.stride(), *out.stride(),
        PRECISION=name, EVEN=k % tile.depth == r % side == c % side == 0, SIDE=side, DEPTH=tile.depth,
        CHUNK=tile.chunk, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)
