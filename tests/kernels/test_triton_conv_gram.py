"""conv_gram's Triton kernels, in each form and on every tile, against the reference in float64; the plan against counting."""

import itertools

import pytest
import torch
from hvpfast.kernels import conv_gram, conv_plan
from hvpfast.kernels.native import _cpu_convolution as convolution
from on_triton import DEVICE, DTYPES, PRECISIONS, poisoned, stated, tensor

from hvpfast import ops, patches, testing

# (N, C, *spatial), kernel and the rest: 1 to 3 axes, borders on one side only, strides that leave pixels out, offsets that
# meet nothing, dilations beyond the image.
CASES = (
    ((2, 4, 9), (3, 1, 1, 1)),
    ((3, 2, 8), (4, 3, 2, 1)),
    ((2, 3, 6, 5), (3, 1, 1, 1)),
    ((2, 2, 7, 6), ((3, 2), (2, 1), (1, 0), (1, 2))),
    ((1, 2, 7, 6), ((4, 2), 1, "same", 1)),
    ((2, 2, 4, 3), (3, 1, (3, 2), 2)),
    ((2, 2, 3, 4, 3), ((1, 2, 2), 1, (0, 1, 0), 1)),
    ((2, 2, 5, 5), (1, 2, 0, 1)),
    ((1, 2, 3, 3), (3, 1, 3, 1)),
)


def named(kernel, stride, padding, dilation):
    return {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}


def run(x, how, form, *, groups=1, alpha=1.0, beta=0.0, out=None, ones_column=False, precision="ieee", **more):
    axes, _, _, features, _ = convolution(x.shape, *how, groups)
    width = features + ones_column
    if out is None:
        out = poisoned(width, width) if groups == 1 else poisoned(groups, width, width)
    conv_gram.launch(x, axes, groups, out, alpha, beta, ones_column, precision, form=form, **more)
    return out


@pytest.mark.parametrize("form", ["boxes", "patches", "lanes"])
@pytest.mark.parametrize("shape, how", CASES, ids=str)
def test_every_form(form, shape, how):
    for groups in (1, 3 if shape[1] == 3 else 2) if form != "patches" else (1,):
        x = tensor(*shape)
        out = run(x, how, form, groups=groups, ones_column=True, alpha=0.5, least=1)
        want = named(*how) | {"groups": groups, "ones_column": True, "alpha": 0.5}
        testing.assert_accurate(out, ops.conv_gram, x, **want)
        assert torch.equal(out, out.mT)


@pytest.mark.parametrize("key", conv_gram.TILES)
def test_every_tile(key):
    product = key.removesuffix("-odd")
    dtype = torch.bfloat16 if product == "exact" else torch.float32
    tables = [(tile, "boxes") for _, tile in conv_gram.TILES[key]] + [(conv_gram.GATHERED[product], "patches")]
    for tile, form in tables:
        channels = (tile.side, tile.side + 16, tile.side + 3) if form == "boxes" else (7,)
        for c in channels:
            x = tensor(2, c, 5, 6, dtype=dtype)
            how = (3, 1, 1, 1) if form == "patches" else ((2, 1), 1, (1, 0), 1)
            out = run(x, how, form, precision=product, tile=tile)
            testing.assert_accurate(out, ops.conv_gram, x, **named(*how), precision=stated(product))


@pytest.mark.parametrize("form", ["boxes", "patches", "lanes"])
def test_pieces_of_boxes_are_added_and_blended(form):
    x, how = tensor(5, 4, 9, 8), ((1, 2), 1, (0, 1), 1)
    groups = 2 if form == "lanes" else 1
    for processors in (1, 20):  # programs as long as they get, or as short
        width = 8 // groups + 1
        before = tensor(groups, width, width, seed=3) if groups > 1 else tensor(width, width, seed=3)  # not symmetric
        more = {"alpha": -0.5, "beta": 0.75, "ones_column": True}
        out = run(x, how, form, groups=groups, out=before.clone(), least=1, processors=processors, **more)
        testing.assert_accurate(out, ops.conv_gram, x, **named(*how), groups=groups, out=before, **more)
        again = run(x, how, form, groups=groups, out=before.clone(), least=1, processors=processors, **more)
        assert torch.equal(out, again)


@pytest.mark.parametrize("dtype, precision", PRECISIONS)
def test_the_op(dtype, precision):
    for shape, groups, kwargs in (
        ((2, 20, 6, 4), 1, {"padding": (1, 0)}), ((2, 6, 8, 8), 3, {"padding": 1, "stride": 2}),
        ((3, 3, 9, 9), 1, {"stride": 2, "padding": 3}),
    ):  # fmt: skip
        for approx in ("expand", "reduce"):
            x = tensor(*shape, dtype=dtype)
            more = {"groups": groups, "kfac_approx": approx, "ones_column": True, **kwargs}
            result = conv_gram.conv_gram(x, 3, precision=precision, **more)
            testing.assert_accurate(result, ops.conv_gram, x, 3, precision=stated(precision), **more)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_formats(dtype):
    x = tensor(2, 17, 5, 6, dtype=dtype)
    for y in (*(testing.laid_out(x, layout) for layout in testing.LAYOUTS), x.to(memory_format=torch.channels_last)):
        result = conv_gram.conv_gram(y, 3, padding=1, ones_column=True)
        testing.assert_accurate(result, ops.conv_gram, y, 3, padding=1, ones_column=True)


def test_nothing_and_what_is_not_finite():
    empty = torch.empty(0, 3, 5, 5, device=DEVICE)
    assert torch.equal(conv_gram.conv_gram(empty, 3, ones_column=True), torch.zeros(28, 28, device=DEVICE))
    x = tensor(2, 17, 6, 6)
    x[1, 4, 0, 0] = float("inf")
    result, want = conv_gram.conv_gram(x, 3, padding=1), ops.conv_gram.reference(x, 3, padding=1)
    assert want[result.isnan()].isnan().all()  # the reference multiplies the padding's zeros with it too
    assert torch.equal(result.diagonal().isfinite(), want.diagonal().isfinite()) and not result.isfinite().all()
    assert "float64" in conv_gram.supports(x.double(), 3)


@pytest.mark.parametrize("shape, how", CASES, ids=str)
def test_boxes_cover_each_pair_of_pixels_once(shape, how):
    axes, *_ = convolution(shape, *how, 1)
    boxes, sets, blocks = conv_plan.boxes_of(axes)
    size = tuple(axis[0] for axis in axes)
    index = torch.arange(1, 1 + size[0] * size[1] * size[2], dtype=torch.float64).reshape(1, 1, *shape[2:])
    seen = patches.patches(index, patches.geometry(shape[2:], *how))[0, :, 0].long()  # (T, K2), 0 outside
    steps = (size[1] * size[2], size[2], 1)
    for u, v in itertools.combinations_with_replacement(range(seen.shape[1]), 2):
        both = seen[:, u].gt(0) & seen[:, v].gt(0)
        expected = sorted(zip((seen[both, u] - 1).tolist(), (seen[both, v] - 1).tolist(), strict=True))
        found = []
        for member in sets[blocks[u, v]] if (u, v) in blocks else ():
            away = sum(d * step for d, step in zip(boxes[member].delta, steps, strict=True))
            ranges = [
                [(run.start + at * axis[2]) * step for at in range(run.count)]
                for run, axis, step in zip(boxes[member].runs, axes, steps, strict=True)
            ]
            found += [(sum(place), sum(place) + away) for place in itertools.product(*ranges)]
        assert sorted(found) == expected


def test_3x3_takes_13_shifts_and_29_boxes():
    axes, *_ = convolution((8, 64, 32, 32), 3, 1, 1, 1, 1)
    boxes, _, blocks = conv_plan.boxes_of(axes)
    assert len({box.delta for box in boxes}) == 13 and len(boxes) == 29 and len(blocks) == 45


def test_magic_numbers_divide():
    for divisor in (1, 2, 3, 7, 10, 56, 64, 641, 65535, 65536, (1 << 31) - 1):
        number, shift = conv_plan.magic(divisor)
        for n in (0, 1, divisor - 1, divisor, 2 * divisor - 1, (1 << 31) - 1, 123456789):
            if n < 1 << 31 and divisor > 1:
                assert number < 1 << 32 and n * number >> 32 + shift == n // divisor


def test_a_capture_says_that_it_needs_the_tables_before(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once with the same shapes before the capture"):
        conv_plan.plan("boxes", ((1, 1, 1, 1, 0, 1),) * 3, 1, 1, 17, 16, 16, 8, 132, torch.device("cuda", 0))
