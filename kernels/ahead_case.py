"""What one compilation ahead of time is made of: see ahead_cases.py."""

from __future__ import annotations

from typing import NamedTuple

import triton

from .tiles import Tile

POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
DTYPE = {"exact": "bf16", "bf16": "fp32", "bf16x3": "fp32", "bf16x4": "fp32", "bf16x6": "fp32", "ieee": "fp32"}


class Case(NamedTuple):
    """One kernel and what it is specialised for."""

    kernel: str
    dtype: str
    config: str
    function: triton.runtime.JITFunction
    types: dict[str, str]  # of the arguments that are neither i32 nor constant
    constants: dict[str, object]
    known: tuple[str, ...]  # integer arguments that are divisible by 16, as pointers always are here
    tile: Tile  # its warps and stages
    tensor_cores: bool

    def key(self, target: int) -> str:
        return f"{self.kernel} {self.dtype} {self.config} sm_{target}"


def label(product: str, tile: Tile, *more: str) -> str:
    return "-".join((product, f"{tile.side}x{tile.depth}", f"{tile.warps}w", f"{tile.stages}s", *more))


# Variants of a launch, by what the compiler knows of it. "even": whole tiles; "ragged": rows that can be loaded 16 bytes at
# a time but end within a tile; "odd": nothing but the unit stride; "columns": a transposed input, whole tiles.
VARIANTS = ("even", "ragged", "odd", "columns")
