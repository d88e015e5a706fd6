"""What ahead.py compiles: every kernel x dtype x configuration that the launchers can choose."""

from __future__ import annotations

from collections.abc import Iterator

from . import (
    ahead_conv,
    ahead_streams,
    gram,
    grouped,
    linear_rop,
    moments,
    products,
    sample_dots,
    sample_grads,
    sample_gram,
)
from . import sample_norms_squared as norms
from .ahead_case import DTYPE, POINTERS, VARIANTS, Case, label
from .tiles import Tile


def _gram_cases() -> Iterator[Case]:
    types = {"part_ptr": "*fp32", "out_ptr": "*fp32", "alpha": "fp32", "beta": "fp32"}

    def case(dtype: str, table: str, tile: Tile, variant: str) -> Case:
        product = table.removesuffix("-odd")
        constants = {"PRECISION": product, "SIDE": tile.side, "DEPTH": tile.depth, "CHUNK": tile.chunk}
        constants |= {"EVEN": variant in ("even", "columns"), "stride_xn" if variant == "columns" else "stride_xd": 1}
        return Case(
            "gram", dtype, label(product, tile, variant), gram._gram_kernel, {"x_ptr": POINTERS[dtype], **types}, constants,
            () if variant == "odd" else ("stride_xn", "stride_xd", "width", "rows"), tile, product != "ieee",
        )  # fmt: skip

    for table, rows in gram.TILES.items():
        for _, _, tile in rows:
            for variant in ("odd",) if table == "exact-odd" else VARIANTS if table == "exact" else ("even", "odd"):
                if (table, variant) != ("exact", "odd"):
                    yield case(DTYPE[table.removesuffix("-odd")], table, tile, variant)
    yield case("fp16", "exact", gram.TILES["exact"][-1][-1], "even")
    for side in sorted({tile.side for rows in gram.TILES.values() for _, _, tile in rows}):
        constants = {"ADD": True, "MIRROR": True, "SIDE": side, "SQUARE": gram.SQUARE, "stride_oj": 1}
        yield Case("gram-add", "fp32", str(side), gram._add_kernel, types, constants, (), Tile(side, 0, 4, 3, 0), False)


def _norms_cases() -> Iterator[Case]:
    outer = {"BLOCK_M": 1, "BLOCK_F": norms.OUTER_ELEMENTS, "stride_ai": 1, "stride_go": 1}
    strides = tuple(f"stride_{x}" for x in ("an", "at", "ai", "gm", "gt", "go"))
    for dtype in ("bf16", "fp32"):
        types = {"a_ptr": POINTERS[dtype], "g_ptr": POINTERS[dtype], "part_ptr": "*fp32", "out_ptr": "*fp32"}
        yield Case("norms-outer", dtype, "even", norms._outer_kernel, types, outer, strides, Tile(0, 0, 4, 3, 0), False)
    for (route, key), tile in norms.TILES.items():
        product = key.removesuffix("-odd")
        types = {"a_ptr": POINTERS[DTYPE[product]], "g_ptr": POINTERS[DTYPE[product]], "part_ptr": "*fp32"}
        sides = {"SIDE": tile.side} if route == "gram" else {"SIDE_O": tile.side, "SIDE_I": tile.side}
        function = norms._gram_kernel if route == "gram" else norms._direct_kernel
        has_odd = (route, f"{product}-odd") in norms.TILES
        for variant in ("odd",) if key != product else ("even", "ragged") if has_odd else ("even", "odd"):
            constants = {
                "PRECISION": product,
                "DEPTH": tile.depth,
                "CHUNK": tile.chunk,
                "stride_ai": 1,
                "stride_go": 1,
                **sides,
            }
            constants["EVEN"] = variant == "even"
            known = () if variant == "odd" else (*strides, "t_all", "i_all", "o_all")
            name = label(product, tile, variant)
            cores = product != "ieee"
            yield Case(f"norms-{route}", DTYPE[product], name, function, types, constants, known, tile, cores)


_PAIR = tuple(f"stride_{x}" for x in ("an", "at", "ai", "gm", "gt", "go"))


def _moments_cases() -> Iterator[Case]:
    results = {"squares_ptr": "*fp32", "weighted_ptr": "*fp32", "norms_ptr": "*fp32", "out_ptr": "*fp32"}
    known = (
        *_PAIR,
        "stride_qs",
        "stride_qo",
        "stride_ws",
        "stride_wd",
        "stride_wo",
        "stride_s",
        "stride_d",
        "stride_o",
    )
    units = dict.fromkeys(("stride_ai", "stride_go", "stride_qi", "stride_wi", "stride_i"), 1)
    sums = {"squares": (True, False, False), "weighted": (False, True, False), "all": (True, True, True)}
    for (route, key), tile in moments.TILES.items():
        product = key.partition("-")[0]
        constants = {
            "PRECISION": product,
            "SIDE_O": tile.side,
            "SIDE_I": tile.side,
            "DEPTH": tile.depth,
            "CHUNK": tile.chunk,
        }
        function = moments._samples_kernel if route == "samples" else moments._rows_kernel
        if route == "samples":
            asked = (
                ["all"] * (key in ("exact", "bf16x3", "bf16x6", "ieee"))
                + ["weighted"] * (product == "exact")
                + ["squares"]
            )
            variants = [
                (what, {}, even) for what in asked for even in (("even",) if "-short" in key else ("even", "odd"))
            ]
        else:
            plain = [
                ("squares", {"FLAT": True, "ONE": True}, "ragged"),
                ("weighted", {"FLAT": False, "ONE": True}, "ragged"),
            ]
            many = [("weighted", {"FLAT": False, "ONE": False}, "odd")]
            variants = plain if "-one" in key else plain + many
        for dtype in ("bf16", "fp16") if (route, product) == ("rows", "bf16x6") else (DTYPE[product],):
            types = dict.fromkeys(("a_ptr", "g_ptr", "c_ptr"), POINTERS[dtype]) | results
            for what, more, variant in variants:
                flags = dict(zip(("SQUARES", "WEIGHTED", "NORMS"), sums[what], strict=True)) | {
                    "EVEN": variant == "even"
                }
                where = () if variant == "odd" else (*known, "t_all", "i_all", "o_all")
                yield Case(
                    f"moments-{route}", dtype, label(product, tile, what, variant), function, types,
                    constants | units | flags | more, where, tile, product != "ieee",
                )  # fmt: skip


def _product_cases() -> Iterator[Case]:
    known = ("stride_xk", "stride_xr", "stride_yk", "stride_s", "stride_r", "length", "r_all", "c_all")
    for key, tile in products.TILES.items():
        name = key.removesuffix("-odd")
        dtypes = ("fp32", "bf16") if name == "bf16x6" else (DTYPE[name],)  # bf16: rotated by a float32 matrix
        for dtype in dtypes:
            types = {"x_ptr": POINTERS[dtype], "y_ptr": POINTERS[DTYPE[name]], "out_ptr": "*fp32"}
            constants = {"PRECISION": name, "SIDE": tile.side, "DEPTH": tile.depth, "CHUNK": tile.chunk}
            constants |= {"stride_xk": 1, "stride_yc": 1, "stride_c": 1}
            for variant in _variants(products.TILES, key):
                yield Case(
                    "product", dtype, label(name, tile, variant), products._product_kernel, types,
                    constants | {"EVEN": variant == "even"}, () if variant == "odd" else known, tile, name != "ieee",
                )  # fmt: skip


def _variants(table: dict, key: str) -> tuple[str, ...]:
    """The variants of a table's row, some of which "-odd" rows may have taken over."""
    if key.endswith("-odd"):
        return ("odd",)
    return ("even", "ragged") if f"{key}-odd" in table else ("even", "odd")


def _grads_cases() -> Iterator[Case]:
    units, known = (
        {"stride_ai": 1, "stride_go": 1, "stride_i": 1},
        (*_PAIR, "stride_m", "stride_o", "t_all", "i_all", "o_all"),
    )
    for key, tile in sample_grads.TILES.items():
        product = key.removesuffix("-odd")
        if product == "outer":
            for dtype in ("bf16", "fp32"):
                types = {"a_ptr": POINTERS[dtype], "g_ptr": POINTERS[dtype], "out_ptr": "*fp32"}
                sides = {"SIDE_O": tile.side, "SIDE_I": tile.depth}
                yield Case(
                    "grads-outer", dtype, "even", sample_grads._outer_kernel, types, units | sides, known, tile, False
                )
            continue
        types = {"a_ptr": POINTERS[DTYPE[product]], "g_ptr": POINTERS[DTYPE[product]], "out_ptr": "*fp32"}
        constants = {
            "PRECISION": product,
            "SIDE_O": tile.side,
            "SIDE_I": tile.side,
            "DEPTH": tile.depth,
            "CHUNK": tile.chunk,
        }
        for variant in _variants(sample_grads.TILES, key):
            yield Case(
                "grads", DTYPE[product], label(product, tile, variant), sample_grads._grads_kernel, types,
                constants | units | {"EVEN": variant == "even"}, () if variant == "odd" else known, tile, product != "ieee",
            )  # fmt: skip


def _dots_cases() -> Iterator[Case]:
    units, known = (
        {"stride_ai": 1, "stride_go": 1, "stride_wi": 1},
        ("stride_ap", "stride_gp", "stride_wd", "stride_wo", "i_all", "o_all"),
    )
    for key, tile in sample_dots.TILES.items():
        product = key.removesuffix("-odd")
        types = dict.fromkeys(("a_ptr", "g_ptr", "w_ptr"), POINTERS[DTYPE[product]]) | {"part_ptr": "*fp32"}
        constants = {"PRECISION": product, "SIDE": tile.side, "DEPTH": tile.depth, "CHUNK": tile.chunk}
        for variant in _variants(sample_dots.TILES, key):
            yield Case(
                "dots", DTYPE[product], label(product, tile, variant), sample_dots._dots_kernel, types,
                constants | units | {"EVEN": variant == "even"}, () if variant == "odd" else known, tile, product != "ieee",
            )  # fmt: skip


def _rop_cases() -> Iterator[Case]:
    """ "columns": the sum runs over the rows of all four, as for a weight's gradient."""
    along, across = (
        dict.fromkeys((f"stride_{x}{end}" for x, end in zip("xwab", ends, strict=True)), 1) for ends in ("iiii", "popo")
    )
    known = ("p_all", "o_all", "i_all", "stride_ak", "stride_bk", "stride_k", "stride_p", "stride_s")
    for key, tile in linear_rop.TILES.items():
        product = key.removesuffix("-odd")
        types = dict.fromkeys((f"{x}_ptr" for x in ("x", "w", "dx", "dw", "db")), POINTERS[DTYPE[product]]) | {
            "out_ptr": "*fp32"
        }
        constants = {"PRECISION": product, "SIDE": tile.side, "DEPTH": tile.depth, "CHUNK": tile.chunk, "BIAS": True}
        variants = _variants(linear_rop.TILES, key)
        for variant in (*variants, *(("columns",) if "even" in variants else ())):
            units, rows = (across, "iiii") if variant == "columns" else (along, "popo")
            where = (*known, *(f"stride_{x}{end}" for x, end in zip("xwab", rows, strict=True)))
            flags = units | {"EVEN": variant in ("even", "columns"), "stride_do": 1, "stride_o": 1}
            yield Case(
                "linear-rop", DTYPE[product], label(product, tile, variant), linear_rop._rop_kernel, types,
                constants | flags, () if variant == "odd" else where, tile, product != "ieee",
            )  # fmt: skip


def _sample_gram_cases() -> Iterator[Case]:
    both = (*_PAIR, *(f"stride_{x}" for x in ("bn", "bt", "bi", "hm", "ht", "ho")))
    for key, tile in sample_gram.TILES.items():
        product = key.removesuffix("-odd")
        types = dict.fromkeys(("a_ptr", "g_ptr", "a2_ptr", "g2_ptr"), POINTERS[DTYPE[product]]) | {"out_ptr": "*fp32"}
        constants = {"PRECISION": product, "SIDE": tile.side, "DEPTH": tile.depth, "CHUNK": tile.chunk}
        constants |= dict.fromkeys(("stride_ai", "stride_go", "stride_bi", "stride_ho", "stride_l"), 1)
        for symmetric, positions in ((True, 1), (False, 8)):
            for variant in _variants(sample_gram.TILES, key):
                flags = {
                    "SYMMETRIC": symmetric,
                    "POSITIONS": positions,
                    "POSITIONS_2": positions,
                    "EVEN": variant == "even",
                }
                yield Case(
                    "sample-gram", DTYPE[product], label(product, tile, f"{positions}p", variant), sample_gram._pairs_kernel,
                    types, constants | flags, () if variant == "odd" else (*both, "i_all", "o_all", "stride_m"), tile,
                    product != "ieee",
                )  # fmt: skip


def _grouped_cases() -> Iterator[Case]:
    types = {"jobs_ptr": "*i64", "programs_ptr": "*i32", "damping_ptr": "*fp32"}
    plain, divided, both = (True, False, False), (False, False, True), (True, True, False)
    asked = {"bf16x6": ((plain, True), (divided, True), (both, True), (plain, False)), "bf16x3": ((plain, True),)}
    asked["ieee"] = ((plain, True), (divided, False))
    for name, variants in asked.items():
        tile = grouped.TILES[name]
        for (x_by_k, y_by_k, divide), aligned in variants:
            constants = {"PRECISION": name, "FIELDS": grouped.FIELDS, "SIDE": tile.side, "DEPTH": tile.depth}
            constants |= {"CHUNK": tile.chunk, "X_BY_K": x_by_k, "Y_BY_K": y_by_k, "DIVIDE": divide, "ALIGNED": aligned}
            how = f"{'xk' if x_by_k else 'x'}{'yk' if y_by_k else 'y'}"
            config = label(name, tile, how, "even" if aligned else "odd")
            function = grouped._grouped_kernel
            yield Case("grouped", "fp32", config, function, types, constants, (), tile, name != "ieee")


def cases() -> list[Case]:
    """Every kernel x dtype x configuration that the launchers choose, sparing what differs in nothing that matters."""
    made = (_gram_cases, _norms_cases, _moments_cases, _product_cases, _grads_cases, _dots_cases, _sample_gram_cases)
    made = (*made, _rop_cases, _grouped_cases)
    wide = [case for make in (*made, *ahead_conv.MADE, *ahead_streams.MADE) for case in make()]
    plain = wide + [other for case in wide for other in _narrow(case)]
    known = {case.key(0) for case in plain}
    plain += [twin for twin in map(_in_fp16, plain) if twin is not None and twin.key(0) not in known]
    return plain + [_unit(case) for case in {case.kernel: case for case in wide}.values()]


def _narrow(case: Case) -> Iterator[Case]:
    """Tiles cut down to layers narrower than they are (`tiles.side`), as odd as such layers may be."""
    cut = case.kernel in ("norms-gram", "norms-direct", "moments-samples", "moments-rows", "grads")
    if cut and case.config.endswith(("-odd", "weighted-ragged")) and case.tile.side == 64:
        for o, i in ((16, 64), (32, 32)):
            sides = {"SIDE": o} if "SIDE" in case.constants else {"SIDE_O": o, "SIDE_I": i}
            config, constants = f"{case.config}-narrow{o}", case.constants | sides
            yield case._replace(config=config, constants=constants, tensor_cores=False)


def _in_fp16(case: Case) -> Case | None:
    """The same of float16 data, where the case's are bfloat16."""
    types = {name: POINTERS["fp16"] if kind == POINTERS["bf16"] else kind for name, kind in case.types.items()}
    return case._replace(dtype="fp16", types=types) if case.dtype == "bf16" else None


def _unit(case: Case) -> Case:
    """The case with every integer 1, which Triton makes a constant: an integer's methods are then not there."""
    ones = {name: 1 for name in case.function.arg_names if name not in case.types}
    return case._replace(config=f"{case.config}-unit", constants=ones | case.constants)
