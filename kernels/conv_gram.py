"""Gram matrix of a convolution's patches, in Triton, without the patches: sums over boxes of pixels (`conv_plan.py`).

Three forms, all on the image as (N, *spatial, C). "boxes": a program multiplies a tile of channels of some of a box's pixels with
one of their partners, delta away, on tensor cores: 13 of 81 blocks for 3x3 at stride 1. "lanes": groups of few channels, where
a tile would be padding: products of channel with channel on CUDA cores. "patches": few channels and one group: features gathered
from a padded image, an implicit product of the patches. Then the programs' sums are added up, box by box of each set, in a
fixed order (no atomics), and a last launch gathers the result from the sets: each element, and its mirror image, from one number.
The ones column, and all of "reduce", are sums of pixels per offset. Workspace: the image, where it is not channels_last or needs
padding, and side^2 floats a program.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import conv_plan, gram, tables, tiles
from .conv_plan import FIELDS, Axis
from .native import _cpu_convolution as convolution
from .tiles import Tile, dot

# Tiles by product: (channels up to, tile). Not yet measured on a GPU.
# "-odd": channels that are no multiple of 16, whose places the compiler knows nothing of.
TILES: dict[str, tuple[tuple[float, Tile], ...]] = {
    "exact": (
        (16, Tile(16, 64, 4, 3, 16)),
        (32, Tile(32, 64, 4, 3, 16)),
        (64, Tile(64, 64, 8, 3, 16)),
        (math.inf, Tile(128, 64, 8, 3, 16)),
    ),
    "exact-odd": ((32, Tile(32, 32, 4, 3, 32)), (math.inf, Tile(64, 64, 8, 3, 16))),
    "bf16": ((32, Tile(32, 16, 4, 3, 64)), (64, Tile(64, 16, 4, 4, 64)), (math.inf, Tile(128, 16, 8, 4, 64))),
    "bf16-odd": ((32, Tile(32, 16, 4, 3, 64)), (math.inf, Tile(64, 16, 4, 4, 64))),
    "bf16x3": ((32, Tile(32, 16, 4, 3, 64)), (64, Tile(64, 16, 4, 4, 64)), (math.inf, Tile(128, 16, 8, 4, 64))),
    "bf16x3-odd": ((32, Tile(32, 16, 4, 3, 64)), (math.inf, Tile(64, 16, 4, 4, 64))),
    "ieee": ((32, Tile(32, 16, 4, 3, 64)), (math.inf, Tile(64, 16, 8, 2, 64))),
}
# Tiles of gathered patches.
GATHERED: dict[str, Tile] = {
    "exact": Tile(64, 32, 4, 2, 32),
    "bf16": Tile(64, 16, 4, 2, 64),
    "bf16x3": Tile(64, 16, 4, 2, 64),
    "ieee": Tile(64, 16, 8, 2, 64),
}
LANES = Tile(64, 32, 4, 2, 0)
FEW_CHANNELS = 16  # of a group, below which a tile of channels is mostly padding
LEAST_STEPS = 8  # of a program, so that writing its sum costs less
SUM = 1024  # elements of a part that one program adds up
OUT = 32, 64  # rows and columns that one program of the assembly writes
PIXELS, CHANNELS = 32, 64  # of a step of the sums for each offset


@triton.jit
def _quotient(n, divisor, magic, shift):
    """n // divisor by the numbers of `conv_plan.magic`."""
    return tl.where(divisor == 1, n, (tl.umulhi(n.to(tl.uint32), magic.to(tl.uint32)) >> shift).to(tl.int32))


@triton.jit
def _box(item_ptr):
    """A box's extents along its axes, the last one first, and the magic numbers to divide by them."""
    w, h, d = tl.load(item_ptr + 4).to(tl.int32), tl.load(item_ptr + 5).to(tl.int32), tl.load(item_ptr + 6).to(tl.int32)
    by_w, by_h, by_d = tl.load(item_ptr + 7), tl.load(item_ptr + 9), tl.load(item_ptr + 11)
    shift_w, shift_h, shift_d = tl.load(item_ptr + 8), tl.load(item_ptr + 10), tl.load(item_ptr + 12)
    return w, h, d, by_w, by_h, by_d, shift_w.to(tl.uint32), shift_h.to(tl.uint32), shift_d.to(tl.uint32)


@triton.jit
def _place(
    p, w, h, d, by_w, by_h, by_d, shift_w, shift_h, shift_d, stride_n, step_z, step_y, step_x, AXES: tl.constexpr
):
    """Where positions p, counted over samples and a box's pixels, begin: 64-bit."""
    n = _quotient(p, w, by_w, shift_w)
    at = (p - n * w).to(tl.int64) * step_x
    if AXES > 1:
        rest = _quotient(n, h, by_h, shift_h)
        at += (n - rest * h).to(tl.int64) * step_y
        n = rest
    if AXES > 2:
        rest = _quotient(n, d, by_d, shift_d)
        at += (n - rest * d).to(tl.int64) * step_z
        n = rest
    return at + n.to(tl.int64) * stride_n


@triton.jit
def _tiles_kernel(
    x_ptr, items_ptr, lanes_ptr, part_ptr, stride_n, step_z, step_y, step_x,
    AXES: tl.constexpr, GATHER: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    FIELDS: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One item: the products of SIDE columns of x[r] with SIDE of x[r + delta], summed, into part (programs, SIDE, SIDE).

    EVEN: all the columns exist. ALIGNED: channels are a multiple of 16. GATHER: a column's place is in `lanes`; else columns
    are channels.
    """
    item_ptr = items_ptr + tl.program_id(0) * FIELDS
    left_at, right_at = tl.load(item_ptr), tl.load(item_ptr + 1)
    rows, columns = tl.load(item_ptr + 13).to(tl.int32), tl.load(item_ptr + 14).to(tl.int32)
    if ALIGNED:
        left_at, right_at = tl.multiple_of(left_at, 16), tl.multiple_of(right_at, 16)
        rows, columns = tl.multiple_of(rows, 16), tl.multiple_of(columns, 16)
    left_ptr, right_ptr = x_ptr + left_at, x_ptr + right_at
    start, stop = tl.load(item_ptr + 2).to(tl.int32), tl.load(item_ptr + 3).to(tl.int32)
    k, lane = tl.arange(0, DEPTH), tl.arange(0, SIDE)
    left_in, right_in = lane < rows, lane < columns
    if GATHER:
        left_lane = tl.load(lanes_ptr + tl.load(item_ptr + 15) + lane, mask=left_in, other=0)[None, :]
        right_lane = tl.load(lanes_ptr + tl.load(item_ptr + 16) + lane, mask=right_in, other=0)[None, :]
    else:
        left_lane, right_lane = lane[None, :], lane[None, :]
    w, h, d, by_w, by_h, by_d, shift_w, shift_h, shift_d = _box(item_ptr)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for chunk in range(start, stop, DEPTH * CHUNK):
        part = tl.zeros((SIDE, SIDE), tl.float32)
        for first in range(chunk, min(chunk + DEPTH * CHUNK, stop), DEPTH):
            p = first + k
            at = _place(
                p, w, h, d, by_w, by_h, by_d, shift_w, shift_h, shift_d, stride_n, step_z, step_y, step_x, AXES
            )[:, None]
            here = (p < stop)[:, None]
            if EVEN:
                left = tl.load(left_ptr + at + left_lane, mask=here, other=0.0)
                right = tl.load(right_ptr + at + right_lane, mask=here, other=0.0)
            else:
                left = tl.load(left_ptr + at + left_lane, mask=here & left_in[None, :], other=0.0)
                right = tl.load(right_ptr + at + right_lane, mask=here & right_in[None, :], other=0.0)
            part = dot(tl.trans(left), right, part, PRECISION)
        total += part
    part_ptr += tl.cast(tl.program_id(0), tl.int64) * (SIDE * SIDE)
    tl.store(part_ptr + lane[:, None] * SIDE + lane[None, :], total)


@triton.jit
def _lanes_kernel(
    x_ptr, items_ptr, part_ptr, stride_n, step_z, step_y, step_x, channels,
    AXES: tl.constexpr, FIELDS: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One item: x[r, c] x[r + delta, c + shift] summed for SIDE channels c, both of one group, into part (programs, SIDE)."""
    item_ptr = items_ptr + tl.program_id(0) * FIELDS
    left_ptr, right_ptr = x_ptr + tl.load(item_ptr), x_ptr + tl.load(item_ptr + 1)
    start, stop = tl.load(item_ptr + 2).to(tl.int32), tl.load(item_ptr + 3).to(tl.int32)
    k, lane = tl.arange(0, DEPTH), tl.arange(0, SIDE)
    partner = (tl.load(item_ptr + 15).to(tl.int32) + lane) % channels + tl.load(item_ptr + 14).to(tl.int32)
    inside = (lane < tl.load(item_ptr + 13)) & (partner >= 0) & (partner < channels)
    w, h, d, by_w, by_h, by_d, shift_w, shift_h, shift_d = _box(item_ptr)
    total = tl.zeros((DEPTH, SIDE), tl.float32)
    for first in range(start, stop, DEPTH):
        p = first + k
        at = (
            _place(p, w, h, d, by_w, by_h, by_d, shift_w, shift_h, shift_d, stride_n, step_z, step_y, step_x, AXES)[
                :, None
            ]
            + lane[None, :]
        )
        here = (p < stop)[:, None] & inside[None, :]
        left = tl.load(left_ptr + at, mask=here, other=0.0).to(tl.float32)
        total += left * tl.load(right_ptr + at, mask=here, other=0.0).to(tl.float32)
    tl.store(part_ptr + tl.cast(tl.program_id(0), tl.int64) * SIDE + lane, tl.sum(total, 0))


@triton.jit
def _add_kernel(part_ptr, slots_ptr, firsts_ptr, sums_ptr, SIZE: tl.constexpr, SUM: tl.constexpr):
    """SUM of the SIZE elements of one part: its programs' sums, added in the order of `slots`."""
    part, lane = tl.program_id(0), tl.program_id(1) * SUM + tl.arange(0, SUM)
    total = tl.zeros((SUM,), tl.float32)
    for at in range(tl.load(firsts_ptr + part), tl.load(firsts_ptr + part + 1)):
        total += tl.load(part_ptr + tl.load(slots_ptr + at).to(tl.int64) * SIZE + lane, mask=lane < SIZE, other=0.0)
    tl.store(sums_ptr + tl.cast(part, tl.int64) * SIZE + lane, total, mask=lane < SIZE)


@triton.jit
def _assemble_kernel(
    sums_ptr, sets_ptr, ones_ptr, out_ptr, count, width, features, channels, tiles_c, parts_of_group,
    stride_og, stride_oi, stride_oj, alpha, beta,
    ADD: tl.constexpr, LANES: tl.constexpr, K2: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS elements of one group's (width, width): element (c K2 + u, e K2 + v) is (c, e) of the set of (u, v).

    width: features, plus 1 for a ones column, whose sums are in ones (groups, features).
    """
    group = tl.program_id(1)
    across = tl.cdiv(width, COLUMNS)
    i = ((tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS))[:, None]
    j = ((tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (i < width) & (j < width)
    c, u, e, v = i // K2, i % K2, j // K2, j % K2
    swap = (u > v) | ((u == v) & ((c > e) if LANES else (c < e)))  # both halves from one number
    row, column = tl.where(swap, e, c), tl.where(swap, c, e)
    first = tl.load(sets_ptr + tl.where(swap, v * K2 + u, u * K2 + v), mask=(i < features) & (j < features), other=-1)
    if LANES:
        channel = group * channels + row
        shift = column - row + tl.where(u == v, 0, channels - 1)
        place = (first + shift * tiles_c + channel // SIDE).to(tl.int64) * SIDE + channel % SIDE
    else:
        r, s = row // SIDE, column // SIDE
        tile = tl.where(u == v, r * (r + 1) // 2 + s, r * tiles_c + s)
        place = (
            (first + group * parts_of_group + tile).to(tl.int64) * (SIDE * SIDE) + (row % SIDE) * SIDE + column % SIDE
        )
    value = tl.load(sums_ptr + place, mask=first >= 0, other=0.0)
    if width > features:
        ones_ptr += group * features
        value += tl.load(ones_ptr + i, mask=(i < features) & (j == features), other=0.0)
        value += tl.load(ones_ptr + j, mask=(j < features) & (i == features), other=0.0)
        value += tl.where((i == features) & (j == features), count, 0.0)
    at = tl.cast(group, tl.int64) * stride_og + i * tl.cast(stride_oi, tl.int64) + j * tl.cast(stride_oj, tl.int64)
    value = alpha * value
    if ADD:
        value += beta * tl.load(out_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, value, mask=inside)


@triton.jit
def _offsets_kernel(
    x_ptr, reached_ptr, out_ptr, channels, factor, stride_n, stride_c, step_z, step_y, step_x,
    AXES: tl.constexpr, K2: tl.constexpr, FIELDS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of the pixels that offset u meets, for CHANNELS channels of one image: out (N, C, K2), times a factor."""
    block, u = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(channels, CHANNELS)
    n = tl.cast(block // blocks, tl.int64)
    c = (block % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    item_ptr = reached_ptr + u * FIELDS
    x_ptr += n * stride_n + tl.load(item_ptr)
    stop, pixel = tl.load(item_ptr + 3).to(tl.int32), tl.arange(0, PIXELS)
    w, h, d, by_w, by_h, by_d, shift_w, shift_h, shift_d = _box(item_ptr)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for first in range(0, stop, PIXELS):
        p = first + pixel
        at = (
            _place(p, w, h, d, by_w, by_h, by_d, shift_w, shift_h, shift_d, 0, step_z, step_y, step_x, AXES)[:, None]
            + (c.to(tl.int64) * stride_c)[None, :]
        )
        here = (p < stop)[:, None] & (c < channels)[None, :]
        total += tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + (n * channels + c) * K2 + u, tl.sum(total, 0) * factor, mask=c < channels)


def supports(
    x, kernel_size, *, stride=1, padding=0, dilation=1, groups=1, ones_column=False, kfac_approx="expand",
    out=None, alpha=1.0, beta=0.0, precision="ieee",
) -> str | None:  # fmt: skip
    """Why this kernel cannot take the arguments, or None."""
    if tiles.shares_memory(out, x):
        return "out shares memory with x, which the kernel still reads when it writes out"
    reason = tiles.unfit(x)
    if reason is None and groups > tiles.MOST_PROGRAMS:
        reason = f"it has {groups} groups; a launch takes {tiles.MOST_PROGRAMS}"
    if (
        reason is None
        and x.shape[0] * convolution(x.shape, kernel_size, stride, padding, dilation, groups)[2] >= 1 << 31
    ):
        reason = "it has 2^31 positions or more, which the kernel counts in 32 bits; give it fewer samples at once"
    return reason


def worthwhile(
    x, kernel_size, *, stride=1, padding=0, dilation=1, groups=1, ones_column=False, kfac_approx="expand",
    out=None, alpha=1.0, beta=0.0, precision="ieee",
) -> str | None:  # fmt: skip
    """Why the reference is expected to be faster, or None. Expectations from arithmetic: not yet measured on a GPU."""
    _, _, positions, features, _ = convolution(x.shape, kernel_size, stride, padding, dilation, groups)
    if kfac_approx == "reduce":
        return None
    return tables.below(x.device, "conv_gram", x.shape[0] * positions * groups * features**2)


def conv_gram(
    x, kernel_size, *, stride=1, padding=0, dilation=1, groups=1, ones_column=False, kfac_approx="expand",
    out=None, alpha=1.0, beta=0.0, precision="ieee",
) -> Tensor:  # fmt: skip
    """See `hvpfast.ops.conv_gram`; `precision` is that of float32 data ("auto" is "bf16x3")."""
    axes, channels, positions, features, _ = convolution(x.shape, kernel_size, stride, padding, dilation, groups)
    width = features + bool(ones_column)
    if out is None:
        out = x.new_empty((width, width) if groups == 1 else (groups, width, width), dtype=torch.float32)
    if out.numel() == 0:
        return out
    blend = {"out": out, "alpha": alpha, "beta": beta, "ones_column": bool(ones_column), "precision": precision}
    if x.numel() == 0:  # no samples, or no channels: a Gram matrix of nothing, or of ones
        nothing = x.new_empty(len(x) * (positions if kfac_approx == "expand" else 1), features)
        for each in (out,) if groups == 1 else out:
            gram.gram(nothing, **blend | {"out": each})
        return out
    with tiles.on_device(x):
        if kfac_approx == "reduce":
            means = offset_sums(x, axes, 1 / positions)
            if groups == 1:
                return gram.gram(means.flatten(1), **blend)
            return conv_gram(means.reshape(len(x), groups * features, 1), 1, groups=groups, **blend)
        if features == channels and groups == 1 and not any(axis[2] > 1 or axis[4] for axis in axes):
            return gram.gram(x.movedim(1, -1), **blend)  # 1x1: pixels are patches; it copies what is not channels_last
        launch(x, axes, groups, out, alpha, beta, bool(ones_column), precision)
    return out


def offset_sums(x: Tensor, axes: tuple[Axis, ...], factor: float) -> Tensor:
    """x (N, C, *spatial) -> (N, C, K2) float32: factor times the sum of the pixels that each offset of the kernel meets."""
    n, c = x.shape[:2]
    strides = (0,) * (5 - x.dim()) + x.stride()[2:]
    kernel = math.prod(axis[1] for axis in axes)
    sums = x.new_empty(n, c, kernel, dtype=torch.float32)
    _offsets_kernel[n * triton.cdiv(c, CHANNELS), kernel](
        x, conv_plan.reached(axes, strides, x.device), sums, c, factor, x.stride(0), x.stride(1),
        *(stride * axis[2] for stride, axis in zip(strides, axes, strict=True)),
        AXES=x.dim() - 2, K2=kernel, FIELDS=FIELDS, PIXELS=PIXELS, CHANNELS=CHANNELS, enable_fp_fusion=True,
    )  # fmt: skip
    return sums


def choose_form(channels: int, groups: int) -> str:
    """The form for this many channels of a group."""
    if channels >= FEW_CHANNELS:
        return "boxes"
    return "patches" if groups == 1 else "lanes"


def choose_tile(form: str, product: str, channels: int, aligned: bool, device: torch.device) -> Tile:
    """The tile for a form, from the tables above."""
    if form != "boxes":
        return LANES if form == "lanes" else tables.tile(device, f"conv_patches {product}", GATHERED[product])
    key = product if aligned or f"{product}-odd" not in TILES else f"{product}-odd"
    row = next(n for n, (most, _) in enumerate(TILES[key]) if channels <= most)
    return tables.tile(device, f"conv_boxes {key} {row}", TILES[key][row][1])


def launch(
    x: Tensor, axes: tuple[Axis, ...], groups: int, out: Tensor, alpha: float, beta: float, ones_column: bool, precision: str,
    *, form: str | None = None, tile: Tile | None = None, least: int = LEAST_STEPS, processors: int | None = None,
) -> None:  # fmt: skip
    """Run in a given form and tile: x (N, C, *spatial), not empty, out (I, I) or (groups, I, I)."""
    n, channels, dims = len(x), x.shape[1] // groups, x.dim() - 2
    kernel, positions = math.prod(axis[1] for axis in axes), math.prod(axis[5] for axis in axes)
    features = channels * kernel
    processors = tiles.facts(x.device).processors if processors is None else processors
    form = choose_form(channels, groups) if form is None else form
    few = x.dtype is torch.float32 and n * positions < gram.FEW_ROWS
    product = "ieee" if few else tiles.product(x.dtype, precision)
    ones = out  # not read
    if ones_column:
        ones = offset_sums(x.sum(0, keepdim=True, dtype=torch.float32), axes, 1.0)
    if form == "patches":
        behind = [max(0, (axis[5] - 1) * axis[2] + axis[3] * (axis[1] - 1) + 1 - axis[0] - axis[4]) for axis in axes]
        sides = [side for axis, after in zip(axes[::-1], behind[::-1], strict=True) for side in (axis[4], after)]
        if any(sides):
            x = torch.nn.functional.pad(x, sides[: 2 * dims])
        sizes = (1,) * (3 - dims) + x.shape[2:]
        axes = tuple((size, *axis[1:4], 0, axis[5]) for size, axis in zip(sizes, axes, strict=True))
    image = x.movedim(1, -1).contiguous()  # (N, *spatial, C): what channels_last memory already is
    strides = (0,) * (5 - image.dim()) + image.stride()[1:-1]
    steps = (image.stride(0), *(stride * axis[2] for stride, axis in zip(strides, axes, strict=True)))
    aligned = form == "boxes" and channels % 16 == 0 and image.data_ptr() % 16 == 0
    if tile is None:
        tile = choose_tile(form, product, channels, aligned, x.device)
    plan = conv_plan.plan(form, axes, n, groups, channels, tile.side, tile.depth, least, processors, x.device)
    size = tile.side if form == "lanes" else tile.side**2
    part = x.new_empty(len(plan.items) * size, dtype=torch.float32)
    if form == "lanes":
        _lanes_kernel[(len(plan.items),)](
            image, plan.items, part, *steps, channels, AXES=dims, FIELDS=FIELDS, SIDE=tile.side, DEPTH=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        wide = len(plan.lanes) if form == "patches" else channels
        _tiles_kernel[(len(plan.items),)](
            image, plan.items, plan.lanes, part, *steps, AXES=dims, GATHER=form == "patches", EVEN=wide % tile.side == 0,
            ALIGNED=aligned, PRECISION=product, FIELDS=FIELDS, SIDE=tile.side, DEPTH=tile.depth, CHUNK=tile.chunk,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    sums = part
    if not plan.single:
        sums = x.new_empty(plan.parts * size, dtype=torch.float32)
        _add_kernel[plan.parts, triton.cdiv(size, SUM)](
            part, plan.slots, plan.firsts, sums, SIZE=size, SUM=min(SUM, size), enable_fp_fusion=True
        )
    blocks = out if out.dim() == 3 else out[None]
    width = features + ones_column
    gathered = form == "patches"
    _assemble_kernel[triton.cdiv(width, OUT[0]) * triton.cdiv(width, OUT[1]), groups](
        sums, plan.sets, ones, blocks, float(n * positions), width, features, channels, plan.tiles, plan.parts_of_group,
        *blocks.stride(), float(alpha), float(beta), ADD=beta != 0, LANES=form == "lanes", K2=1 if gathered else kernel,
        SIDE=tile.side, ROWS=OUT[0], COLUMNS=OUT[1], enable_fp_fusion=True,
    )  # fmt: skip
