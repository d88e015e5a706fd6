"""What a convolution's Gram matrix is made of, worked out on the host: boxes of pixels, sums of boxes, blocks of the result.

Offset u of the kernel meets the pixels t stride + u dilation - padding, so the block (u, v) of the Gram matrix is a sum of
x[r]' x[r + delta], delta = (v - u) dilation, over pixels r whose bounds depend on u and v only near the border. The blocks of one
delta (and of one r modulo the stride) share all their pixels but the border's: cut at every bound, the pixels fall into disjoint
boxes, each summed once, and a block is a sum of boxes. 3x3, stride 1: 13 deltas, 29 boxes, 81 blocks; nothing cancels.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch

# (size, kernel, stride, dilation, padding in front, positions) of one spatial axis
Axis = tuple[int, int, int, int, int, int]
FIELDS = 17  # of an item: where both sides begin, positions from and to, box, magic numbers, columns, more


class Run(NamedTuple):
    """Pixels start, start + stride, ... of one axis."""

    start: int
    count: int


class Plan(NamedTuple):
    """The work of one call, as tables on the device."""

    items: torch.Tensor  # (programs, FIELDS) int64: what one program of the first launch sums
    slots: torch.Tensor  # the programs whose sums make up a part of a set, part after part
    firsts: torch.Tensor  # (parts + 1,) where a part's slots begin
    sets: torch.Tensor  # (K2, K2): the first part of what the blocks (u, v), u <= v, hold, or -1 for zeros
    lanes: torch.Tensor  # places of features within a patch, where the patches themselves are multiplied
    parts: int  # of all groups
    parts_of_group: int
    tiles: int  # along the channels of a group
    single: bool  # every part is one program's


def _runs(axis: Axis) -> dict[tuple[int, int], tuple[int, int, list[Run]]]:
    """(u, v) -> (delta, r modulo stride, runs in order of r), without the pairs that meet nowhere."""
    size, kernel, stride, dilation, padding, positions = axis
    met: dict[tuple[int, int], tuple[int, int, int]] = {}
    for u, v in itertools.product(range(kernel), repeat=2):
        least, most = min(u, v) * dilation - padding, max(u, v) * dilation - padding
        first, last = max(0, -(least // stride)), min(positions - 1, (size - 1 - most) // stride)
        if first <= last:
            met[u, v] = (v - u) * dilation, first * stride + u * dilation - padding, last - first + 1
    cuts: dict[tuple[int, int], set[int]] = {}
    for delta, start, count in met.values():
        cuts.setdefault((delta, start % stride), set()).update((start, start + count * stride))
    found = {}
    for pair, (delta, start, count) in met.items():
        stop = start + count * stride
        bounds = sorted(cut for cut in cuts[delta, start % stride] if start <= cut <= stop)
        found[pair] = delta, start % stride, [Run(a, (b - a) // stride) for a, b in itertools.pairwise(bounds)]
    return found


class Box(NamedTuple):
    """Pixels of one run an axis, and how far their partners are away."""

    delta: tuple[int, int, int]
    runs: tuple[Run, Run, Run]


@functools.lru_cache(256)
def boxes_of(axes: tuple[Axis, Axis, Axis]) -> tuple[tuple[Box, ...], tuple[tuple[int, ...], ...], dict]:
    """The boxes, the sets of them (by number) that blocks are sums of, and (u, v), u <= v, -> its set's number."""
    met = [_runs(axis) for axis in axes]
    kernel = [axis[1] for axis in axes]
    offsets = list(itertools.product(*(range(k) for k in kernel)))
    numbers: dict[Box, int] = {}
    sets: dict[tuple[int, ...], int] = {}
    blocks: dict[tuple[int, int], int] = {}
    for (i, u), (j, v) in itertools.combinations_with_replacement(enumerate(offsets), 2):
        pairs = [each.get(pair) for each, pair in zip(met, zip(u, v, strict=True), strict=True)]
        if None in pairs:
            continue
        delta = tuple(pair[0] for pair in pairs)
        members = tuple(
            numbers.setdefault(Box(delta, runs), len(numbers)) for runs in itertools.product(*(pair[2] for pair in pairs))
        )  # fmt: skip
        blocks[i, j] = sets.setdefault(members, len(sets))
    return tuple(numbers), tuple(sets), blocks


def magic(divisor: int) -> tuple[int, int]:
    """(m, s): n // divisor is (n m) >> (32 + s) for every n below 2^31 (Granlund and Montgomery 1994); of 1: (0, 0)."""
    if divisor == 1:
        return 0, 0
    log = (divisor - 1).bit_length()
    return (1 << (31 + log)) // divisor + 1, log - 1


def _extents(counts: tuple[int, int, int]) -> list[int]:
    """Fields of a box's extents, the last axis first, and their magic numbers."""
    inner = counts[::-1]
    return [*inner, *itertools.chain.from_iterable(magic(count) for count in inner)]


class Work(NamedTuple):
    """One part of a box's sum: two places in the image, the columns that exist there, and what else the kernel asks."""

    left: int
    right: int
    rows: int
    columns: int
    more: tuple[int, int]


@functools.lru_cache(256)
def plan(
    form: str, axes: tuple[Axis, Axis, Axis], batch: int, groups: int, channels: int, side: int, depth: int, least: int,
    processors: int, device: torch.device,
) -> Plan:  # fmt: skip
    """The tables of one call; a model asks for the same ones in every step.

    form: "boxes": tiles of side x side channels of each box, on an image (N, *spatial, C). "patches": one box of all positions,
    whose features are tiled, on an image with its padding. "lanes": products of a channel with those of its group.
    channels: of one group. least: steps of `depth` positions that a program takes at least.
    """
    every = groups * channels
    strides = (axes[1][0] * axes[2][0] * every, axes[2][0] * every, every)
    lanes: list[int] = []
    if form == "patches":
        offsets = itertools.product(*(range(axis[1]) for axis in axes))
        spread = [axis[3] for axis in axes]
        places = [sum(u * d * s for u, d, s in zip(offset, spread, strides, strict=True)) for offset in offsets]
        lanes = [channel + place for channel in range(channels) for place in places]
        boxes = (Box((0, 0, 0), tuple(Run(0, axis[5]) for axis in axes)),)
        sets, blocks, width, kernel = ((0,),), {(0, 0): 0}, len(lanes), 1
    else:
        boxes, sets, blocks = boxes_of(axes)
        width, kernel = channels, math.prod(axis[1] for axis in axes)
    tiles = -(-(groups * channels if form == "lanes" else width) // side)
    lengths = [batch * math.prod(run.count for run in box.runs) for box in boxes]

    def work(box: Box, group: int) -> list[Work]:
        """The parts of a box's sum, in the order in which the assembly looks for them."""
        left = sum(run.start * s for run, s in zip(box.runs, strides, strict=True)) + group * channels
        right = left + sum(d * s for d, s in zip(box.delta, strides, strict=True))
        if form == "lanes":
            shifts = range(0 if box.delta == (0, 0, 0) else 1 - channels, channels)
            return [
                Work(left + i * side, right + i * side + shift, every - i * side, shift, (i * side, 0))
                for shift in shifts for i in range(tiles)
            ]  # fmt: skip
        pairs = itertools.product(range(tiles), repeat=2)
        if box.delta == (0, 0, 0):
            pairs = ((i, j) for i, j in pairs if i >= j)
        step = 0 if form == "patches" else side
        return [
            Work(left + i * step, right + j * step, width - i * side, width - j * side, (i * side, j * side)) for i, j in pairs
        ]  # fmt: skip

    rounds = 1 if form == "lanes" else groups
    steps = rounds * sum(len(work(box, 0)) * -(-length // depth) for box, length in zip(boxes, lengths, strict=True))
    most = depth * max(least, -(-steps // (2 * processors)))  # positions of one program
    items, of_box = [], []  # of_box: (box, group) -> ranges of slots, one for each of its parts
    for group in range(rounds):
        for box, length in zip(boxes, lengths, strict=True):
            extents, ranges = _extents(tuple(run.count for run in box.runs)), []
            for each in work(box, group):
                first = len(items)
                pieces = -(-length // most)
                share = -(-length // (pieces * depth)) * depth if pieces else 0
                for start in range(0, length, share) if length else ():
                    stop = min(start + share, length)
                    items.append([each.left, each.right, start, stop, *extents, each.rows, each.columns, *each.more])
                ranges.append(range(first, len(items)))
            of_box.append(ranges)
    slots, firsts, table, begun = [], [0], [[-1] * kernel for _ in range(kernel)], []
    for group in range(rounds):
        for members in sets:
            parts = [of_box[group * len(boxes) + member] for member in members]
            if group == 0:
                begun.append(len(firsts) - 1)
            for part in zip(*parts, strict=True):
                slots.extend(itertools.chain.from_iterable(part))
                firsts.append(len(slots))
    for (u, v), number in blocks.items():
        table[u][v] = begun[number]
    parts = len(firsts) - 1
    single = slots == list(range(parts)) and len(items) == parts
    if not single:  # the longest first, so that the last ones to run are short
        order = sorted(range(len(items)), key=lambda item: items[item][2] - items[item][3])
        place = {item: at for at, item in enumerate(order)}
        items, slots = [items[item] for item in order], [place[slot] for slot in slots]
    return Plan(
        _on_device(items, torch.int64, device).reshape(-1, FIELDS), _on_device(slots, torch.int32, device),
        _on_device(firsts, torch.int32, device), _on_device(table, torch.int32, device), _on_device(lanes, torch.int64, device),
        parts, parts // rounds, tiles, single,
    )  # fmt: skip


def _on_device(values: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "conv_gram: a CUDA graph is being captured, and the tables of this shape are not on the GPU yet; call it once "
            "with the same shapes before the capture"
        )
    return torch.tensor(values, dtype=dtype).to(device)


@functools.lru_cache(256)
def reached(axes: tuple[Axis, Axis, Axis], strides: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(K2, FIELDS): for each offset of the kernel the pixels that it meets in one image of these strides."""
    met = [{u: runs for (u, v), (_, _, runs) in _runs(axis).items() if u == v} for axis in axes]
    rows = []
    for offset in itertools.product(*(range(axis[1]) for axis in axes)):
        runs = [each.get(u) for each, u in zip(met, offset, strict=True)]
        if None in runs:
            rows.append([0, 0, 0, 0, *_extents((1, 1, 1)), 0, 0, 0, 0])
            continue
        counts = tuple(sum(run.count for run in each) for each in runs)
        start = sum(each[0].start * stride for each, stride in zip(runs, strides, strict=True))
        rows.append([start, 0, 0, math.prod(counts), *_extents(counts), 0, 0, 0, 0])
    return _on_device(rows, torch.int64, device)
