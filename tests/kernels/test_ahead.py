"""Kernels compiled ahead of time for GPUs that are not here. All of them: `python -m bench.ahead` (CI runs it)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from hvpfast.kernels import tables, tuning  # noqa: E402

ROOT = Path(__file__).parents[2]
KEY = "gram.gram_kernel bf16-fp32 PRECISION=exact,TMA,SIDE=128,DEPTH=64,CHUNK=16 8w3s"


@pytest.fixture
def bench(monkeypatch):
    """bench.ahead and bench.launched, which are not part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import ahead, launched

    return ahead, launched


@pytest.fixture
def run(clean_env):
    def started(*arguments, **changes):
        command = [sys.executable, "-m", "bench.ahead", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=clean_env | changes, cwd=ROOT, timeout=300)

    return started


def test_main_kernels_use_wgmma_and_tma_and_do_not_spill(run):
    done = run("--op", "gram", "--only", "bf16x3,TMA,SIDE=128|bf16-fp32.*TMA,SIDE=128", "--target", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    start = next(n for n, line in enumerate(done.stdout.splitlines()) if line.startswith("target"))
    head, *lines = [line.split(maxsplit=8) for line in done.stdout.splitlines()[start:-2]]
    assert len(lines) == 4 and head[-1] == "name"
    for line in lines:
        row = dict(zip(head, line, strict=True))
        assert int(row["wgmma"]) > 0 and int(row["tma"]) > 0 and int(row["stack"]) == 0


def test_what_there_is_no_time_for_is_said(run):
    done = run("--op", "gram", "--only", "add_kernel", "--target", "90", "--jobs", "1", "--seconds", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"the time is over: \d+ of \d+ were not compiled", done.stdout)


def test_what_it_says_of_what_it_cannot_do(run):
    done = run(TRITON_INTERPRET="1")
    assert done.returncode != 0 and "TRITON_INTERPRET is set" in done.stderr
    done = run("--op", "bias_sample_stats", "--only", "no such kernel")
    assert done.returncode != 0 and "nothing matches 'no such kernel'; names look like" in done.stderr


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, None),
        ({"stack": 16}, "16 stack, the limit is 0"),
        ({"stack": 56}, "it spills"),
        ({"wgmma": 0}, "it has no wgmma"),
        ({"wgmma": 2}, "2 wgmma, the limit is 4"),
        ({"tma": 0}, "it has no TMA copies"),
        ({"registers": 250}, "250 registers, the limit is"),
        ({"shared": 200_000}, "RTX-class GPUs have"),
    ],
)
def test_what_breaks_a_row(bench, change, said):
    ahead, launched = bench
    constants = {"PRECISION": "exact", "EVEN": False, "TMA": True, "SIDE": 128, "DEPTH": 64, "CHUNK": 16}
    types = (("x_tiles", "tensordesc<bf16[64, 128]>"), ("x_ptr", "*bf16"), ("part_ptr", "*fp32"))
    one = launched.Launch("hvpfast.kernels.gram", "_gram_kernel", types, tuple(constants.items()), (), 8, 3)
    assert one.targets == (90, 100) and one.name == KEY
    row = ahead.Row(KEY, 90, 144, 98360, 0, 0, 4, 0, 6)
    limits = ahead.widened({}, [row])
    assert limits == {KEY: {"90": [144, 98360, 0, 0, 4, 0, 6]}}
    changed = row._replace(**change)
    broken = ahead.check([changed], limits, {KEY: one})
    assert (not broken) if said is None else any(said in each for each in broken)
    assert "no limits" in ahead.check([row], {}, {KEY: one})[0]
    assert ahead.gone(limits, {}) and not ahead.gone(limits, {KEY: one})
    assert not any("limit is" in each for each in ahead.check([changed], ahead.widened(limits, [changed]), {KEY: one}))


def test_what_does_not_compile_is_said(bench):
    ahead, launched = bench
    wrong = launched.Launch("hvpfast.kernels.gram", "_add_kernel", (), (("SIDE", 64),), (), 4, 3)
    assert "wrong sm_90: it does not compile: KeyError" in ahead._job("wrong", wrong, 90)


def test_every_tile_of_every_table_is_compiled():
    """Limits are held for each entry of the packages' tables, in 16 bits and in float32 as the entry says."""
    named = list(json.loads((ROOT / "bench" / "ahead.json").read_text()))
    norms, moments = "sample_norms_squared", "moments"
    modules = {"product": "products", "conv_boxes": "conv_gram", "conv_patches": "conv_gram", "norms_gram": norms,
               "norms_direct": norms, "moments_samples": moments, "moments_rows": moments}  # fmt: skip
    for capability in (80, 90, 100):
        for entry, tile in tables.read(tables.path_for(capability)).tiles.items():
            kernel, key, *_ = entry.split()
            product = key.partition("-")[0]
            parts = (f"PRECISION={product},", f"={tile.side},", f"DEPTH={tile.depth},", f" {tile.warps}w{tile.stages}s")
            of_kernel = [name for name in named if name.startswith(f"{modules.get(kernel, kernel)}.")]
            assert any(all(part in name for part in parts) and tile.tma == ("TMA" in name) for name in of_kernel), entry


def test_tables_differ_in_what_the_recorder_takes_apart(bench):
    _, launched = bench
    first, *others = (tables.read(tables.path_for(capability)).tiles for capability in (90, 80, 100))
    for other in others:
        differ = {entry.split()[0] for entry in first if first[entry] != other[entry]}
        assert differ <= set(launched.BY_GENERATION)
    assert first.keys() == {case.name for case in tuning.cases(tuning.torch.device("cpu"), scale=512)}
