"""The cases of kernels that stream through memory and multiply nothing on tensor cores."""

from __future__ import annotations

from collections.abc import Iterator

from . import softmax_hvp
from .ahead_case import POINTERS, Case
from .tiles import Tile


def _softmax_cases() -> Iterator[Case]:
    floats = {"part_ptr": "*fp32", "out_ptr": "*fp32"}
    known = ("classes", "stride_xr", "stride_vk", "stride_vr", "stride_ok")
    unit = {"stride_xc": 1, "stride_vc": 1, "WEIGHTED": True}
    for dtype in ("bf16", "fp32"):
        types = dict.fromkeys(("x_ptr", "v_ptr", "weight_ptr"), POINTERS[dtype]) | floats
        for block, warps in ((16, 4), (softmax_hvp.NARROW, 8)) if dtype == "fp32" else ((1024, 4),):
            rows = {"ROWS": max(1, softmax_hvp.ELEMENTS // block), "BLOCK": block}
            where = known if block > 16 else ()
            yield Case(
                "softmax-rows", dtype, f"{block}-{warps}w", softmax_hvp._rows_kernel, types, unit | rows, where,
                Tile(0, 0, warps, 3, 0), False,
            )  # fmt: skip
        phases = (("both", True, True), ("find", True, False), ("write", False, True))
        for phase, find, write in phases if dtype == "bf16" else phases[::2]:
            flags = {"FIND": find, "WRITE": write, "SPLITS": 1 if find and write else 64, "BLOCK": softmax_hvp.BLOCK}
            yield Case(
                "softmax-wide", dtype, phase, softmax_hvp._wide_kernel, types, unit | flags, known,
                Tile(0, 0, softmax_hvp.WARPS, 3, 0), False,
            )  # fmt: skip


MADE = (_softmax_cases,)
