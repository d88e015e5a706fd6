"""The Triton kernels held against their references: on a GPU where there is one, else on the CPU in Triton's interpreter
(tests/conftest.py sets TRITON_INTERPRET=1), with the tiles that a GPU uses."""

import math

import lower
import pytest
import torch
from on_triton import DEVICE, DTYPES, PRECISIONS, poisoned, stated, tensor

from hvpfast import ops, testing

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from hvpfast.kernels import gram, tiles  # noqa: E402
from hvpfast.kernels import sample_norms_squared as norms  # noqa: E402

# gram -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, precision", PRECISIONS)
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 1), (17, 3), (65, 17), (63, 65), (64, 64), (200, 63)])
def test_gram_sizes(rows, width, dtype, precision):
    for ones_column in (False, True):
        x, out = tensor(rows, width, dtype=dtype), poisoned(width + ones_column, width + ones_column)
        result = gram.gram(x, out=out, ones_column=ones_column, alpha=0.5, precision=precision)
        assert result is out
        testing.assert_accurate(out, ops.gram, x, ones_column=ones_column, alpha=0.5, precision=stated(precision))
        assert torch.equal(out, out.T)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_layouts(layout, dtype):
    for shape in ((33, 17), (3, 5, 48), (17,)):
        x = tensor(*shape, dtype=dtype, layout=layout)
        result = gram.gram(x, ones_column=True, alpha=2.0)
        testing.assert_accurate(result, ops.gram, x, ones_column=True, alpha=2.0)


@pytest.mark.parametrize(
    "product, dtype",
    [("exact", torch.bfloat16), *((name, torch.float32) for name in ("bf16", "bf16x3", "bf16x6", "ieee"))],
)
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_gram_splits_and_blends_on_every_tile(product, dtype, splits):
    tables = [table for name, table in gram.TILES.items() if name.removesuffix("-odd") == product]
    for tile in {tile for table in tables for _, _, tile in table}:
        for rows, width in ((128, 128), (150, 130)):
            x, before = tensor(rows, width, dtype=dtype), tensor(width + 1, width + 1, seed=1)  # not symmetric
            out = before.clone()
            gram.launch(x, out, 0.3, 0.7, True, product, tile, splits)
            testing.assert_accurate(
                out, ops.gram, x, out=before, alpha=0.3, beta=0.7, ones_column=True,
                precision=product if product in ("bf16", "bf16x3") else "ieee",
            )  # fmt: skip


@pytest.mark.parametrize("key, dtype", [("exact", torch.bfloat16), ("exact", torch.float16), ("bf16x3", torch.float32),
                                        ("bf16", torch.float32), ("ieee", torch.float32)])  # fmt: skip
@pytest.mark.parametrize("rows, width, splits", [(1, 8, 1), (64, 64, 1), (70, 72, 3), (130, 264, 2)])
def test_gram_copied_by_tma_is_gram_loaded_by_threads(rows, width, splits, key, dtype):
    """Zeros outside x, whatever lies there: the same products in the same order."""
    wide = torch.full((rows + 3, width + 16), math.nan, dtype=dtype, device=DEVICE)
    x = wide[:rows, 8 : 8 + width].copy_(tensor(rows, width, dtype=dtype))
    assert gram.copyable(x) and not gram.copyable(wide[:rows, 1 : 1 + width]) and not gram.copyable(x.T)
    assert not gram.copyable(x[:1].expand(rows, width)) or rows == 1
    for tile in {tile for _, _, tile in gram.TILES[key]}:
        first, second = poisoned(width + 1, width + 1), poisoned(width + 1, width + 1)
        for out, tma in ((first, True), (second, False)):
            gram.launch(x, out, 0.5, 0.0, True, key, tile._replace(tma=tma), splits)
        assert torch.equal(first, second)


def test_gram_tiles_of_rows_that_only_tma_copies():
    x = tensor(100, 40, dtype=torch.bfloat16)  # rows of 80 bytes
    assert gram.choose_tile(x, "exact").tma and not gram.choose_tile(x[:, 1:], "exact").tma
    assert gram.choose_tile(tensor(100, 48), "ieee") == gram.TILES["ieee"][0][-1]


def test_gram_is_the_same_twice_and_writes_into_strided_outputs():
    x, wide = tensor(300, 40, dtype=torch.bfloat16), poisoned(80, 41)
    first = gram.gram(x, out=wide[::2, :40])
    assert torch.equal(first, gram.gram(x))
    assert wide[1::2].isnan().all() and wide[:, 40].isnan().all()
    testing.assert_accurate(first, ops.gram, x)


@pytest.mark.parametrize("rows, width", [(0, 5), (3, 1), (65, 17), (40, 130)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_the_lower_triangle(rows, width, dtype):
    for blend in ({}, {"ones_column": True, "alpha": 0.3, "beta": -0.7}):
        lower.assert_lower(gram.gram, tensor(rows, width, dtype=dtype), **blend)


@pytest.mark.parametrize("ones_column", [False, True])
def test_gram_of_nothing(ones_column):
    empty = tensor(0, 5)
    assert torch.equal(gram.gram(empty), torch.zeros(5, 5, device=DEVICE))
    before = tensor(5 + ones_column, 5 + ones_column, seed=1)
    out = gram.gram(empty, out=before.clone(), beta=0.25, ones_column=ones_column)
    assert torch.equal(out, 0.25 * before)
    none = gram.gram(tensor(7, 0), ones_column=ones_column)
    assert none.tolist() == ([[7.0]] if ones_column else [])


@pytest.mark.parametrize("precision", ["ieee", "bf16x3", "bf16"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_gram_keeps_what_is_not_finite(bad, precision):
    x = tensor(40, 20)
    x[7, 3] = bad
    result = gram.gram(x, precision=precision)
    touched = torch.zeros(20, 20, dtype=torch.bool)
    touched[3, :] = touched[:, 3] = True
    assert torch.equal(~result.isfinite().cpu(), touched)


def test_gram_says_what_it_cannot_do():
    assert "float64" in gram.supports(tensor(3, 4).double())
    x = tensor(4, 4)
    assert "shares memory" in gram.supports(x, out=x)
    assert gram.supports(x) is None


def test_gram_shapes_that_are_chosen():
    assert gram.choose_splits(21, 512, 132) == 6  # D = 768: 21 tiles on 132 processors, one full wave
    assert gram.choose_splits(528, 512, 132) == 1  # D = 4096: four full waves already
    assert gram.choose_splits(1, 2, 132) == 1


@triton.jit
def _place_kernel(rows_ptr, columns_ptr, first):
    row, column = tiles.triangle(first + tl.program_id(0))
    tl.store(rows_ptr + tl.program_id(0), row)
    tl.store(columns_ptr + tl.program_id(0), column)


@pytest.mark.parametrize("side", [1, 100, 4000, 30000])  # the float32 root is off from about 4000 rows on
def test_triangle_counts_every_tile(side):
    first = side * (side + 1) // 2 - 1  # the last tile of a row, then the first of the next
    count = 120
    rows, columns = (torch.empty(count, dtype=torch.int32, device=DEVICE) for _ in range(2))
    _place_kernel[(count,)](rows, columns, first)
    expected = [(side - 1, side - 1)] + [(side, column) for column in range(side + 1)]
    while len(expected) < count:
        row = expected[-1][0] + 1
        expected += [(row, column) for column in range(row + 1)]
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected[:count]


# sample_norms_squared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, precision", PRECISIONS)
@pytest.mark.parametrize(
    "n, t, i, o, k",
    [
        (1, 1, 1, 1, 1), (5, 1, 17, 65, 3), (3, 2, 1, 3, 1), (3, 3, 17, 63, 2), (2, 17, 63, 65, 1),
        (2, 65, 70, 90, 3), (2, 66, 17, 33, 2), (2, 65, 64, 10, 1), (2, 64, 64, 128, 1), (1, 128, 32, 64, 1),
    ],
)  # fmt: skip
def test_norms_sizes(n, t, i, o, k, dtype, precision):
    args, _ = testing.make_inputs("sample_norms_squared", n=n, t=t, i=i, o=o, k=k, dtype=dtype, device=DEVICE)
    result = norms.sample_norms_squared(*args, precision=precision)
    testing.assert_accurate(result, ops.sample_norms_squared, *args, precision=stated(precision))
    assert torch.equal(result, norms.sample_norms_squared(*args, precision=precision))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t, i, o", [(1, 17, 5), (5, 18, 9), (40, 18, 9)])
def test_norms_layouts(t, i, o, dtype, layout):
    args, _ = testing.make_inputs(
        "sample_norms_squared", n=3, t=t, i=i, o=o, k=2, dtype=dtype, layout=layout, device=DEVICE
    )
    testing.assert_accurate(norms.sample_norms_squared(*args), ops.sample_norms_squared, *args)


@pytest.mark.parametrize("route, key", norms.TILES)
def test_norms_on_every_tile(route, key):
    product = key.removesuffix("-odd")
    dtype = torch.float32 if product != "exact" else torch.bfloat16
    launch = norms.launch_gram if route == "gram" else norms.launch_direct
    for t, i, o in ((64, 64, 64), (70, 65, 33)):
        args, _ = testing.make_inputs("sample_norms_squared", n=2, t=t, i=i, o=o, k=2, dtype=dtype, device=DEVICE)
        result = launch(*args, product, norms.TILES[route, key])
        stated_bound = {"bf16x4": "bf16x3", "exact": "ieee"}.get(product, product)
        testing.assert_accurate(result, ops.sample_norms_squared, *args, precision=stated_bound)


@pytest.mark.parametrize("shapes", [((0, 3, 4), (0, 3, 5)), ((3, 0, 4), (6, 0, 5)), ((3, 2, 0), (3, 2, 5))])
def test_norms_of_nothing(shapes):
    a, g = (tensor(*shape) for shape in shapes)
    assert torch.equal(norms.sample_norms_squared(a, g), torch.zeros(len(g), device=DEVICE))


@pytest.mark.parametrize("t", [1, 20, 50])
def test_norms_keep_what_is_not_finite(t):
    (a, g), _ = testing.make_inputs("sample_norms_squared", n=4, t=t, i=33, o=34, device=DEVICE)
    g[2, 0, 1] = math.inf
    result = norms.sample_norms_squared(a, g, precision="bf16x3")
    assert result.isfinite().tolist() == [True, True, False, True]
