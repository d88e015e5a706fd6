"""The cases of kernels that stream through memory and multiply nothing on tensor cores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from . import embedding_sample_norms, norm_sample_stats, softmax_hvp, softmax_sample
from .ahead_case import POINTERS, Case
from .tiles import Tile

_PLAIN = Tile(0, 0, 4, 3, 0)


def _softmax_cases() -> Iterator[Case]:
    floats = {"part_ptr": "*fp32", "out_ptr": "*fp32"}
    known = ("classes", "stride_xr", "stride_vk", "stride_vr", "stride_ok")
    unit = {"stride_xc": 1, "stride_vc": 1, "WEIGHTED": True}
    kinds = (("root-", softmax_hvp.ROOT), ("", softmax_hvp.HESSIAN))
    for dtype, (name, kind) in itertools.product(("bf16", "fp32"), kinds):
        if name and dtype == "bf16":
            continue
        types = dict.fromkeys(("x_ptr", "v_ptr", "weight_ptr"), POINTERS[dtype]) | floats
        for block, warps in ((16, 4), (softmax_hvp.NARROW, 8))[bool(name) :] if dtype == "fp32" else ((1024, 4),):
            rows = {"ROWS": max(1, softmax_hvp.ELEMENTS // block), "BLOCK": block, "KIND": kind}
            where = known if block > 16 else ()
            yield Case(
                "softmax-rows", dtype, f"{name}{block}-{warps}w", softmax_hvp._rows_kernel, types, unit | rows, where,
                Tile(0, 0, warps, 3, 0), False,
            )  # fmt: skip
        phases = (("both", True, True), ("find", True, False), ("write", False, True))
        for phase, find, write in phases[:1] if name else phases if dtype == "bf16" else phases[::2]:
            flags = {"FIND": find, "WRITE": write, "SPLITS": 1 if find and write else 64, "BLOCK": softmax_hvp.BLOCK}
            yield Case(
                "softmax-wide", dtype, f"{name}{phase}", softmax_hvp._wide_kernel, types, unit | flags | {"KIND": kind},
                known, Tile(0, 0, softmax_hvp.WARPS, 3, 0), False,
            )  # fmt: skip


def _sample_cases() -> Iterator[Case]:
    of = softmax_sample
    types = dict.fromkeys(("x_ptr", "weight_ptr"), "*bf16") | dict.fromkeys(("u_ptr", "part_ptr", "whole_ptr"), "*fp64")
    types |= {"label_ptr": "*i32", "out_ptr": "*fp32"}
    unit = {"stride_xc": 1, "stride_ur": 1, "WEIGHTED": True, "BLOCK": of.BLOCK, "ROWS": 1, "STEPS": 128}
    for name, function in (
        ("rows", of._rows_kernel), ("tiles", of._tiles_kernel), ("labels", of._labels_kernel), ("write", of._write_kernel),
    ):  # fmt: skip
        known = ("classes", "stride_xr", "stride_uk", "stride_ok")
        mine = {key: value for key, value in unit.items() if key in function.arg_names}
        known = tuple(key for key in known if key in function.arg_names)
        yield Case("softmax-sample", "bf16", name, function, types, mine, known, _PLAIN, False)


def _stats_cases() -> Iterator[Case]:
    of = norm_sample_stats
    results = dict.fromkeys(("norms_ptr", "squares_ptr", "sums_ptr", "mean_ptr", "rstd_ptr"), "*fp32") | {"eps": "fp32"}
    last = ("stride_xn", "stride_xt", "stride_gm", "stride_gt", "i_all")
    plain = {"SCALE": True, "KIND": 0, "MEAN": 0, "RSTD": 0, "SUMS": False}
    tile = {"POSITIONS": of.ELEMENTS // of.FEATURES, "FEATURES": of.FEATURES}
    for dtype, name, known, flags in (
        ("fp32", "layer-4096", last, {"KIND": 1, "POSITIONS": 1, "FEATURES": of.WHOLE}),
        ("bf16", "layer-2048", last, {"KIND": 1, "POSITIONS": 1, "FEATURES": 2048}),
        ("bf16", "rms-512-sums", last, {"KIND": 2, "SUMS": True, "POSITIONS": 4, "FEATURES": 512}),
        ("bf16", "given-channels", ("stride_xn", "stride_xi", "stride_gm", "stride_gi"),
         {"MEAN": 1, "RSTD": 1, "POSITIONS": of.FEATURES, "FEATURES": of.ELEMENTS // of.FEATURES}),
        ("fp32", "given-features", last, {"MEAN": 2, "RSTD": 2, **tile}),
        ("fp32", "shift", last, {"SCALE": False, **tile}),
    ):  # fmt: skip
        types = dict.fromkeys(("x_ptr", "g_ptr"), POINTERS[dtype]) | results
        unit = ("stride_xt", "stride_gt") if name == "given-channels" else ("stride_xi", "stride_gi")
        constants = dict.fromkeys(unit, 1) | plain | flags
        warps = Tile(0, 0, of.warps(flags["FEATURES"], name == "given-channels"), 3, 0)
        yield Case("norm-stats", dtype, name, of._stats_kernel, types, constants, known, warps, False)
    of = embedding_sample_norms
    types = {"g_ptr": "*bf16", "order_ptr": "*i64", "index_ptr": "*i64", "bounds_ptr": "*i64", "out_ptr": "*fp32"}
    for name, norms in (("norms", True), ("moment", False)):
        constants = {"NORMS": norms, "TOGETHER": of.TOGETHER, "FEATURES": of.FEATURES, "stride_gd": 1}
        known = ("stride_gm", "stride_gt", "d_all")
        yield Case("embedding", "bf16", name, of._runs_kernel, types, constants, known, _PLAIN, False)


MADE = (_softmax_cases, _sample_cases, _stats_cases)
