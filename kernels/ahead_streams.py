"""The cases of kernels that stream through memory and multiply nothing on tensor cores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from . import activation_rop, embedding_sample_norms, norm_rop, norm_sample_stats, softmax_hvp, softmax_sample
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
        ("fp32", "layer-8192", last, {"KIND": 1, "POSITIONS": 1, "FEATURES": of.WHOLE}),
        ("fp32", "layer-4096", last, {"KIND": 1, "POSITIONS": 1, "FEATURES": 4096}),
        ("bf16", "rms-8192-sums", last, {"KIND": 2, "SUMS": True, "POSITIONS": 1, "FEATURES": of.WHOLE}),
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


def _rop_cases() -> Iterator[Case]:
    of = activation_rop
    results, both = {"of_g_ptr": "*fp32", "of_x_ptr": "*fp32"}, {"OF_G": True, "OF_X": True}
    for dtype, (name, kind) in (*(("fp32", item) for item in of.KINDS.items()), ("bf16", ("gelu", 0))):
        types = dict.fromkeys(("x_ptr", "g_ptr", "c_ptr"), POINTERS[dtype]) | results
        constants = both | {"KIND": kind, "BLOCK": of.BLOCK}
        warps = Tile(0, 0, of.WARPS, 3, 0)
        yield Case("activation-rop", dtype, name, of._activation_kernel, types, constants, ("count",), warps, False)
    of = norm_rop
    flags = ("C", "MEAN", "WEIGHT", "C_WEIGHT", "C_BIAS", "OF_G", "OF_X", "OF_W")
    few = {"C_BIAS": False, "OF_X": False, "OF_W": False}  # a GGN's product
    for dtype, name, block, known, more in (
        ("fp32", "all", of.WHOLE, ("features",), {}),
        ("bf16", "all", 1024, ("features",), {}),
        ("fp32", "all", 64, (), {}),
        ("fp32", "g", of.WHOLE, ("features",), few),
        ("fp32", "g", 1024, ("features",), few),
        ("bf16", "rms", 2048, ("features",), {"MEAN": False, "C_BIAS": False}),
    ):  # fmt: skip
        names = ("x_ptr", "g_ptr", "c_ptr", "weight_ptr", "c_weight_ptr", "c_bias_ptr")
        wide = dict.fromkeys(("mean_ptr", "rstd_ptr", "part_ptr"), "*fp32") | results
        types = dict.fromkeys(names, POINTERS[dtype]) | wide
        constants = dict.fromkeys(flags, True) | {"ROWS": max(1, of.ELEMENTS // block), "BLOCK": block} | more
        tile = Tile(0, 0, of.warps(block), 3, 0)
        yield Case("norm-rop", dtype, f"{name}-{block}", of._norm_kernel, types, constants, known, tile, False)


MADE = (_softmax_cases, _sample_cases, _stats_cases, _rop_cases)
