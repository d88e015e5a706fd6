"""The cases of a convolution's Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator

from . import conv_gram
from .ahead_case import DTYPE, POINTERS, Case, label
from .tiles import Tile

_STEPS = ("stride_n", "step_z", "step_y", "step_x")


def _variants(key: str, form: str, tile: Tile) -> tuple[str, ...]:
    """Those that differ: in float32 whether columns end within a tile changes nothing, and "bf16" is a part of "bf16x3"."""
    if form == "patches" or key.endswith("-odd"):
        return ("odd",)
    if key == "exact":
        return ("even", "ragged") if tile.side > 64 else ("even",)
    return ("even", "odd") if key == "ieee" else ("even",)


def _conv_cases() -> Iterator[Case]:
    types = {"items_ptr": "*i64", "reached_ptr": "*i64", "lanes_ptr": "*i64", "part_ptr": "*fp32"}
    for key, table in conv_gram.TILES.items():
        product = key.removesuffix("-odd")
        dtype = DTYPE[product]
        if product == "bf16":  # the tiles of bf16x3, with a third of its products
            continue
        gathered = [] if key != product else [("patches", conv_gram.GATHERED[product])]
        for form, tile in (*(("boxes", tile) for _, tile in table), *gathered):
            constants = {"PRECISION": product, "SIDE": tile.side, "DEPTH": tile.depth, "CHUNK": tile.chunk}
            constants |= {"GATHER": form == "patches", "FIELDS": conv_gram.FIELDS}
            for variant in _variants(key, form, tile):
                flags = {"EVEN": variant == "even", "ALIGNED": variant != "odd", "AXES": 3 if variant == "odd" else 2}
                where = () if variant == "odd" else _STEPS
                cores = product != "ieee" and tile.side >= 64  # narrower ones: mma, wgmma needs 64 rows
                yield Case(
                    f"conv-{form}", dtype, label(product, tile, variant), conv_gram._tiles_kernel,
                    {"x_ptr": POINTERS[dtype], **types}, constants | flags, where, tile, cores,
                )  # fmt: skip
    tile, pointers = conv_gram.LANES, {"x_ptr": "*fp32", **types, "out_ptr": "*fp32", "factor": "fp32"}
    constants = {"AXES": 2, "FIELDS": conv_gram.FIELDS, "SIDE": tile.side, "DEPTH": tile.depth}
    yield Case("conv-lanes", "fp32", "even", conv_gram._lanes_kernel, pointers, constants, _STEPS, tile, False)
    plain = Tile(0, 0, 4, 3, 0)
    constants = {"AXES": 2, "FIELDS": conv_gram.FIELDS, "K2": 9, "PIXELS": conv_gram.PIXELS}
    constants |= {"CHANNELS": conv_gram.CHANNELS}
    yield Case("conv-offsets", "fp32", "odd", conv_gram._offsets_kernel, pointers, constants, (), plain, False)
    pointers = dict.fromkeys(("part_ptr", "sums_ptr", "ones_ptr", "out_ptr"), "*fp32")
    pointers |= dict.fromkeys(("slots_ptr", "firsts_ptr", "sets_ptr"), "*i32")
    pointers |= dict.fromkeys(("count", "alpha", "beta"), "fp32")
    constants = {"SIZE": 128**2, "SUM": conv_gram.SUM}
    yield Case("conv-add", "fp32", str(128**2), conv_gram._add_kernel, pointers, constants, (), plain, False)
    rows, columns = conv_gram.OUT
    constants = {"ADD": True, "K2": 9, "SIDE": 64, "ROWS": rows, "COLUMNS": columns, "stride_oj": 1}
    for name, lanes in (("tiles-9", False), ("lanes-9", True)):
        flags = constants | {"LANES": lanes}
        yield Case("conv-assemble", "fp32", name, conv_gram._assemble_kernel, pointers, flags, (), plain, False)


MADE = (_conv_cases,)
