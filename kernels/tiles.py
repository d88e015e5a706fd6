"""What the Triton kernels share: the tile product and its precisions, the triangular grid, and facts of the device.

Every kernel here is a sum over a long axis k of products of two tiles, `left' right`, with left (K, R) and right
(K, C). Tensor cores add with truncation, so a running sum over many k drifts by about 2^-25 of itself per step of 16:
`cross` adds the tensor cores' sums over CHUNK steps into a second, correctly rounded float32 sum.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Decided when the kernels are decorated: under the interpreter there are no tensor cores, and bf16 needs care.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def nearest_bf16(x):
    """float32 -> bfloat16, to nearest even. The interpreter's own cast truncates, and its bf16 dot multiplies raw bits,
    so there the result is float32 that holds bf16's values."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def thirds(x):
    """float32 -> three bf16 whose sum it is, largest first."""
    hi = nearest_bf16(x)
    rest = x - hi.to(tl.float32)
    mid = nearest_bf16(rest)
    return hi, mid, nearest_bf16(rest - mid.to(tl.float32))


@triton.jit
def dot(x, y, total, PRECISION: tl.constexpr):
    """total + x y for tiles x (R, K) and y (K, C), summed in float32.

    "exact": 16-bit tiles, whose products are exact. "ieee": float32. "bf16": float32 rounded to bf16.
    "bf16x3": x = hi + lo in bf16 each, without lo lo; "bf16x4": with it. An inf has hi = inf and lo = inf - inf = NaN, and
    a float32 beyond bf16's range likewise: what they touch is NaN or inf, never a finite number. "bf16x6": three bf16
    each, as exact as float32 products, on tensor cores. In "ieee" and "bf16x6" tiles may be of any dtype.
    """
    if PRECISION == "ieee":
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
    elif PRECISION == "exact":
        if INTERPRETED:
            return tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
        else:
            return tl.dot(x, y, total)
    elif PRECISION == "bf16":
        return tl.dot(nearest_bf16(x), nearest_bf16(y), total)
    elif PRECISION == "bf16x6":
        x_hi, x_mid, x_lo = thirds(x.to(tl.float32))
        y_hi, y_mid, y_lo = thirds(y.to(tl.float32))
        total = tl.dot(x_lo, y_hi, total)  # small terms first
        total = tl.dot(x_hi, y_lo, total)
        total = tl.dot(x_mid, y_mid, total)
        total = tl.dot(x_mid, y_hi, total)
        total = tl.dot(x_hi, y_mid, total)
        return tl.dot(x_hi, y_hi, total)
    else:
        x_hi, y_hi = nearest_bf16(x), nearest_bf16(y)
        x_lo, y_lo = nearest_bf16(x - x_hi.to(tl.float32)), nearest_bf16(y - y_hi.to(tl.float32))
        if PRECISION == "bf16x4":
            total = tl.dot(x_lo, y_lo, total)
        total = tl.dot(x_lo, y_hi, total)  # small terms first
        total = tl.dot(x_hi, y_lo, total)
        return tl.dot(x_hi, y_hi, total)


@triton.jit
def _steps(
    total, left_ptr, right_ptr, left_at, right_at, left_step, right_step, left_in, right_in, start, stop, length,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`total` plus the products over k in [start, stop): see `cross`."""
    k_in_block = tl.arange(0, BLOCK_K)[:, None]
    for k in range(start, stop, BLOCK_K):
        left_place = left_ptr + k * left_step + left_at
        right_place = right_ptr + k * right_step + right_at
        if EVEN:
            left_tile = tl.load(left_place)
            right_tile = tl.load(right_place)
        else:
            left_tile = tl.load(left_place, mask=(k + k_in_block < length) & left_in, other=0.0)
            right_tile = tl.load(right_place, mask=(k + k_in_block < length) & right_in, other=0.0)
        total = dot(tl.trans(left_tile), right_tile, total, PRECISION)
    return total


@triton.jit
def add_cross(
    total, left_ptr, right_ptr, left_at, right_at, left_step, right_step, left_in, right_in, start, stop, length,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`total` plus the sum over k in [start, stop) of left[k, r] right[k, c]: see `cross`."""
    if CHUNK == 0:
        total = _steps(
            total, left_ptr, right_ptr, left_at, right_at, left_step, right_step, left_in, right_in, start, stop, length,
            PRECISION, EVEN, BLOCK_K,
        )  # fmt: skip
    else:
        for chunk in range(start, stop, BLOCK_K * CHUNK):
            total += _steps(
                tl.zeros_like(total), left_ptr, right_ptr, left_at, right_at, left_step, right_step,
                left_in, right_in, chunk, min(chunk + BLOCK_K * CHUNK, stop), length, PRECISION, EVEN, BLOCK_K,
            )  # fmt: skip
    return total


@triton.jit
def cross(
    left_ptr, right_ptr, left_at, right_at, left_step, right_step, left_in, right_in, length,
    ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum over k in [0, length) of left[k, r] right[k, c], (ROWS, COLS) in float32.

    left_ptr, right_ptr: where k = 0 is; both move by *_step (64-bit) elements per k. left_at (BLOCK_K, ROWS), right_at
    (BLOCK_K, COLS): 32-bit places within one step's tile, so that no tensor of pointers lives across the loop.
    left_in, right_in: (1, ROWS), (1, COLS), which columns exist. EVEN: all do, and length is a multiple of BLOCK_K.
    CHUNK 0: the tensor cores add all of a length that the launcher knows to be short.
    """
    return add_cross(
        tl.zeros((ROWS, COLS), tl.float32), left_ptr, right_ptr, left_at, right_at, left_step, right_step, left_in, right_in,
        0, length, length, PRECISION, EVEN, BLOCK_K, CHUNK,
    )  # fmt: skip


@triton.jit
def triangle(index):
    """Position (row, column), row >= column, of an index into the lower triangle of tiles, row after row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)  # the float32 root may be one off either way
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


MOST_SPLITS = 64
FEW = 32
MOST_PROGRAMS = 65535  # of the second and third axes of a grid
_MOST_ROWS = (1 << 31) - (1 << 16)  # so that a tile past the end is still counted in 32 bits


class Tile(NamedTuple):
    """Extents of a program's tile and how it is compiled: the output is (side, side), each step takes `depth` of k."""

    side: int
    depth: int
    warps: int
    stages: int
    chunk: int  # steps that the tensor cores add by themselves
    tma: bool = False  # whether the tensor memory accelerator (sm_90 on) copies the tiles, where it can

    @property
    def listed(self) -> tuple[int, ...]:
        """As a table has it."""
        return tuple(self) if self.tma else tuple(self[:-1])


class Facts(NamedTuple):
    """What the launchers need to know of a device."""

    capability: int  # 80, 90, 100, ...
    processors: int


_INTERPRETED_FACTS = Facts(90, 132)  # an H100's, so that the interpreter runs what a GPU runs


@functools.cache
def facts(device: torch.device) -> Facts:
    """Facts of a CUDA device; of an H100 where the interpreter runs on the CPU."""
    if device.type != "cuda":
        return _INTERPRETED_FACTS
    properties = torch.cuda.get_device_properties(device)
    return Facts(10 * properties.major + properties.minor, properties.multi_processor_count)


def choose_splits(programs: int, steps: int, processors: int) -> int:
    """Into how many ranges of rows to split, so that the last wave of programs is full.

    Costs in steps: a split more costs its programs' partial tiles, written and read, about 8 steps a program: an estimate
    for 128 x 128 tiles from arithmetic, not measured on a GPU yet.
    """

    def cost(splits: int) -> int:
        return -(-programs * splits // processors) * (-(-steps // splits) + (8 if splits > 1 else 0))

    return min(range(1, max(1, min(MOST_SPLITS, steps // 4)) + 1), key=cost)


def product(dtype: torch.dtype, precision: str) -> str:
    """How `dot` multiplies data of a dtype under a precision: "exact", "ieee", "bf16x3" or "bf16"."""
    if dtype is not torch.float32:
        return "exact"
    return "bf16x3" if precision == "auto" else precision


_FINER = {"bf16": "bf16x3", "bf16x3": "bf16x6"}


def product_of_few(dtype: torch.dtype, precision: str, terms: int) -> str:
    """`product` for sums of so many terms: one step finer for a few, which do not average the rounding away."""
    name = product(dtype, precision)
    return _FINER.get(name, name) if terms < FEW else name


def unfit(*given: Tensor) -> str | None:
    """Why no Triton kernel here can take tensors of this dtype, device and count of rows (all axes but the last), or None."""
    x = given[0]
    if any(y.numel() and y.shape[:-1].numel() >= _MOST_ROWS for y in given):
        return "it has 2^31 rows or nearly so, which its Triton kernel counts in 32 bits; give it fewer at once"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its Triton kernel sums in float32, which {x.dtype} does not fit"
    if x.is_cuda:
        if facts(x.device).capability < 80:
            return f"compute capability {facts(x.device).capability / 10} is below 8.0"
    elif not INTERPRETED.value:
        return f"the tensors are on {x.device.type}; only TRITON_INTERPRET=1 runs Triton kernels there"
    return None


def columns(count: int) -> list[slice]:
    """Ranges of as many columns as the second and third axes of a grid take."""
    return [slice(first, first + MOST_PROGRAMS) for first in range(0, count, MOST_PROGRAMS)]


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, which Triton launches on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def side(extent: int, most: int) -> int:
    """How far a tile reaches over an axis of this extent: a power of two, at least 16."""
    return max(16, min(most, triton.next_power_of_2(extent)))


def within_32_bits(x: Tensor, *reach: tuple[int, int]) -> Tensor:
    """x, copied if the places within one tile of it, which spans `extent` of each `axis`, would not fit 32 bits.

    reach: (axis, extent) pairs.
    """
    return x if sum(extent * x.stride(axis) for axis, extent in reach) < 1 << 31 else x.contiguous()


def vectors(*pair: Tensor) -> bool:
    """Whether rows of each x (N, T, F) can be loaded 16 bytes at a time, and the compiler will know it. Tiles that are whole are
    loaded without masks where they can: of other data such loads would spill."""
    return all(
        x.data_ptr() % 16 == 0 and x.shape[2] % 16 == 0 and x.stride(2) == 1 and (x.stride(0) | x.stride(1)) % 16 == 0
        for x in pair
    )


def shares_memory(out: Tensor | None, *inputs: Tensor) -> bool:
    """Whether `out` lies in the memory of a tensor that is still read when it is written."""
    if out is None:
        return False
    place = out.untyped_storage().data_ptr()
    return any(x.numel() and x.untyped_storage().data_ptr() == place for x in inputs)
