"""What a launch must not ask of CUDA, and what the kernels' 32-bit counts cannot hold: grids are recorded, nothing runs."""

import pytest
import torch
from hvpfast.kernels import (
    conv_gram,
    linear_rop,
    moments,
    norm_sample_stats,
    sample_dots,
    sample_gram,
    softmax_hvp,
    tiles,
)
from hvpfast.kernels import sample_norms_squared as norms

from hvpfast import ops, testing

MANY = 70_000  # more than the second and third axes of a grid take


class Recorder:
    """Stands for a kernel."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(tuple(grid))
        return lambda *arguments, **options: None


def wide(*shape: int) -> torch.Tensor:
    """No memory to speak of."""
    return torch.zeros(1).expand(shape)


def dots():
    sample_dots.launch(wide(40, 3), wide(40, 2), wide(MANY, 2, 3), "ieee", sample_dots.TILES["ieee"])


def weighted_by_samples():
    a, g, out = torch.zeros(2, 33, 3), torch.zeros(2, 33, 2), torch.zeros(MANY, 2, 3)
    moments.by_samples(a, g, wide(2, MANY), "ieee", weighted=out, splits=1)


def weighted_by_rows():
    moments.by_rows(
        torch.zeros(2, 1, 3), torch.zeros(2, 1, 2), wide(2, MANY), torch.zeros(MANY, 2, 3), "ieee", splits=1
    )


def norms_of_many_rows_with_one_input():
    norms.launch_gram(wide(1, 8, 40), wide(MANY, 8, 40), "ieee", norms.TILES["gram", "ieee"])


def many_vectors_of_few_rows():
    softmax_hvp.launch(wide(3, 10), wide(MANY, 3, 10), None, torch.zeros(MANY, 3, 10))


def many_long_samples():
    norm_sample_stats.launch(wide(MANY, 600, 16), wide(MANY, 600, 16), splits=(1, 2))


def many_directions():
    args = wide(20, 3), wide(4, 3), wide(MANY, 20, 3), wide(MANY, 4, 3)
    linear_rop.launch(*args, None, "ieee", linear_rop.TILES["ieee"])


@pytest.mark.parametrize(
    ("module", "kernel", "run"),
    [
        (sample_dots, "_dots_kernel", dots),
        (moments, "_samples_kernel", weighted_by_samples),
        (moments, "_rows_kernel", weighted_by_rows),
        (norms, "_gram_kernel", norms_of_many_rows_with_one_input),
        (softmax_hvp, "_rows_kernel", many_vectors_of_few_rows),
        (norm_sample_stats, "_stats_kernel", many_long_samples),
        (linear_rop, "_rop_kernel", many_directions),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_grids_that_cuda_takes(module, kernel, run, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(module, kernel, recorder)
    run()
    assert recorder.grids
    for first, *others in recorder.grids:
        assert first < 1 << 31 and all(0 < other <= 65535 for other in others), recorder.grids


def test_sums_in_several_launches_are_those_of_one(monkeypatch):
    monkeypatch.setattr(tiles, "MOST_PROGRAMS", 3)
    (a, g, _), _ = testing.make_inputs("weighted_grad", n=5, t=3, i=7, o=4, device="cpu")
    if tiles.unfit(a) is not None:
        pytest.skip(tiles.unfit(a))
    c = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    by_samples, by_rows = torch.full((2, 8, 4, 7), torch.nan)
    moments.by_samples(a, g, c, "ieee", weighted=by_samples)
    moments.by_rows(a, g, c, by_rows, "ieee")
    for result in (by_samples, by_rows):
        testing.assert_accurate(result, ops.weighted_grad, a, g, c)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("gram", (wide(1 << 31, 1),)),
        ("sample_norms_squared", (wide(1, 1 << 31, 1), wide(1, 1 << 31, 1))),
        ("weighted_grad", (wide(1 << 16, 1 << 15, 2), wide(1 << 16, 1 << 15, 2), wide(1 << 16))),
        ("second_moment", (wide(1 << 31, 1, 2), wide(1 << 31, 1, 2))),
        ("sample_dots", (wide(1 << 31, 1, 2), wide(1 << 31, 1, 2), wide(2, 2))),
        ("linear_rop", (wide(1 << 31, 2), wide(2, 2), wide(1 << 31, 2), wide(2, 2))),
        ("softmax_hvp", (wide(1 << 31, 2), wide(1 << 31, 2))),
        ("norm_rop", (wide(1 << 31, 2), wide(1 << 31, 2), wide(1 << 31))),
        ("sample_gram", (wide(1 << 20, 1, 4096), wide(1 << 20, 1, 8), wide(2, 1, 4096), wide(2, 1, 8))),
    ],
)
def test_what_is_counted_in_32_bits_is_refused_beyond(name, args):
    reason = ops.__dict__[name].why_not("triton", *args)
    assert reason is not None and ("32 bits" in reason or "no CUDA device" in reason)


def test_more_groups_than_a_launch_takes():
    assert "groups" in (conv_gram.supports(wide(1, MANY, 4), 1, groups=MANY) or "")
    assert "32 bits" in sample_gram.supports(
        wide(1 << 20, 1, 4096), wide(1 << 20, 1, 8), wide(2, 1, 4096), wide(2, 1, 8)
    )
