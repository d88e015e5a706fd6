"""Tables of tiles and crossovers, and the search that makes one: host code, with a clock and a device that are not real."""

import importlib
import json

import pytest
import torch
from hvpfast.kernels import gram, sample_dots, tables, tiles, tuning
from on_triton import DEVICE, tensor

from hvpfast import ops, testing
from hvpfast.cli import crossovers, tune

HERE = torch.device(DEVICE)


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Makes a table with some content the one in force."""

    def named(**changes):
        content = {"measured": {"tiles": "a GPU", "crossovers": None}, "crossovers": {}, "tiles": {}, **changes}
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(content))
        monkeypatch.setenv("HVPFAST_TABLES", str(path))
        tables.table.cache_clear()
        return path

    yield named
    tables.table.cache_clear()


def test_the_tables_of_the_package():
    compiled = {case.name: case.tile for case in tuning.cases(HERE, scale=512)}
    for capability in (80, 90, 100):
        table = tables.read(tables.path_for(capability))
        assert table.path.endswith(f"sm_{capability}.json")
        assert set(table.crossovers) <= set(ops.__dict__) and table.measured == {"tiles": None, "crossovers": None}
        # Until a GPU has been seen; other tiles must be compiled ahead of time as well.
        assert {name: tile._replace(tma=False) for name, tile in table.tiles.items()} == compiled
        assert {name.split()[0] for name, tile in table.tiles.items() if tile.tma} == (
            {"gram"} if capability > 80 else set()
        )
    assert tables.path_for(86).name == "sm_80.json" and tables.path_for(121).name == "sm_100.json"
    assert tables.path_for(75).name == "sm_80.json"


def test_a_table_replaces_tiles_and_crossovers(use):
    x = tensor(100, 40)
    assert gram.choose_tile(x, "bf16x3") == gram.TILES["bf16x3"][0][-1]._replace(tma=True)  # as on an H100
    other = tiles.Tile(32, 16, 4, 2, 32)
    use(tiles={"gram bf16x3 0": list(other), "sample_dots ieee": list(other)}, crossovers={"gram": 1e30})
    assert gram.choose_tile(x, "bf16x3") == other and gram.choose_tile(x, "ieee") == gram.TILES["ieee"][0][-1]
    testing.assert_accurate(gram.gram(x, precision="bf16x3"), ops.gram, x, precision="bf16x3")
    w = torch.zeros(3, 4, device=DEVICE)
    dots = sample_dots.sample_dots(tensor(5, 1, 4), tensor(5, 1, 3), w)
    assert torch.equal(dots, torch.zeros(5, device=DEVICE))
    assert "1e+30" in gram.worthwhile(x) and "not yet measured" in gram.worthwhile(x)
    use(crossovers={"gram": 1e30}, measured={"tiles": None, "crossovers": "a GPU, 2026"})
    assert "measured on a GPU, 2026" in gram.worthwhile(x)


@pytest.mark.parametrize(
    ("content", "said"),
    [({"tiles": {"gram ieee 0": [48, 16, 4, 2, 0]}}, "powers of two"), ({"tiles": {"gram ieee 0": [64]}}, "cannot be read"),
     ({"tiles": {"x": [64, 16, 4, 9, 0]}}, "stages"), ({"tiles": {"x": [64, 16, 4, 3, 0, 2]}}, "TMA"),
     ({"crossovers": None}, "hvpfast tune")],
)  # fmt: skip
def test_what_is_wrong_in_a_table_is_said(use, content, said):
    path = use(**content)
    with pytest.raises(ValueError, match=said) as raised:
        tables.read(path)
    assert "mine.json" in str(raised.value)


def test_every_entry_runs_with_its_own_tile_and_has_others():
    names = set()
    for case in tuning.cases(HERE, scale=256):
        result = case.run(case.tile)
        assert result.dtype is torch.float32 and bool(result.isfinite().all()) and bool(result.any())
        others = tuning.candidates(case)
        assert others[0] == case.tile and len(set(others)) == len(others) > 3
        assert {tile.tma for tile in others} == ({False, True} if case.tma else {False})
        assert all(tile.side == case.tile.side and tile.depth >= 16 for tile in others)
        assert case.name not in names
        names.add(case.name)


def test_the_search_takes_the_fastest_that_agrees(tmp_path, capsys, use):
    own, best, wrong, broken = (tiles.Tile(64, depth, 4, 3, 0) for depth in (16, 32, 64, 128))
    speed = {own: 2.0, best: 1.0, wrong: 0.1}
    last = []

    def run(tile):
        last[:] = [tile]
        if tile is broken:
            raise RuntimeError("out of shared memory")
        return torch.tensor([1.0, 2.0]) * (2.0 if tile is wrong else 1.0)

    def clock(call):
        call()
        return speed[last[0]]

    kept = tuning.Case("kept", best, run)
    assert tune.in_force(kept, {"kept": own}).tile == own and tune.in_force(kept, {}) == kept
    made = tune.search([tuning.Case("gram ieee 0", own, run), kept], lambda case: [own, best, wrong, broken], clock)
    assert made == {"gram ieee 0": best}
    assert "gram ieee 0: (64, 128, 4, 3, 0) left out: RuntimeError" in capsys.readouterr().out
    assert tune.search([kept], lambda case: [best], clock, seconds=-1.0) == {}
    use(tiles={"sample_dots ieee": [64, 16, 4, 2, 64]}, crossovers={"gram": 7.0})
    tune.write(tmp_path / "new.json", tables.table(HERE), made, {}, "a fake GPU")
    again = tables.read(tmp_path / "new.json")
    assert again.tiles == {"gram ieee 0": best, "sample_dots ieee": tiles.Tile(64, 16, 4, 2, 64)}
    assert again.crossovers == {"gram": 7.0} and again.measured["tiles"].startswith("a fake GPU, 20")
    assert again.measured["crossovers"] is None
    tune.write(tmp_path / "new.json", tables.table(HERE), made, {"gram": 9.0}, "a fake GPU")
    again = tables.read(tmp_path / "new.json")
    assert again.crossovers == {"gram": 9.0} and again.measured["crossovers"].startswith("a fake GPU, 20")


@pytest.mark.parametrize("name", sorted(tables.read(tables.path_for(90)).crossovers))
def test_ladders_weigh_work_as_dispatch_does(use, name):
    """The two ways agree, and a rung's own work is the least for which `worthwhile` lets the kernel run."""
    (rung,) = crossovers.ladder(name, torch.bfloat16, HERE, (16,))
    args, kwargs = testing.make_inputs(name, n=16, t=16, i=2 if name == "conv_gram" else 16, o=1 if name == "conv_gram" else 16,
                                       dtype=torch.bfloat16, device=DEVICE)  # fmt: skip
    testing.assert_accurate(rung.kernel(), ops.__dict__[name], *args, **kwargs)
    worthwhile = importlib.import_module(f"hvpfast.kernels.{name}").worthwhile
    for least, runs in ((rung.work, True), (rung.work * 1.001, False)):
        use(crossovers={name: least})
        assert (worthwhile(*args, **kwargs, precision="auto") is None) == runs
    one, two = (next(crossovers.ladder(name, torch.float32, HERE, (width,))).work for width in (16, 32))
    assert two > one > 0


@pytest.mark.parametrize(
    ("kernel", "reference", "least"),
    [
        ("111", "222", 0.0),
        ("322", "233", 10.0),
        ("131", "222", 100.0),
        ("333", "222", 200.0),
        ("113", "222", 200.0),
        ("222", "222", 0),
    ],
)
def test_from_which_work_on_a_kernel_pays(kernel, reference, least, monkeypatch, capsys):
    """Rungs of 1, 10 and 100: the first from which on it was never slower."""
    rungs = [crossovers.Rung(10.0**n, int(kernel[n]), int(reference[n])) for n in range(3)]
    assert crossovers.pays(iter(rungs), float) == least
    monkeypatch.setattr(crossovers, "ladder", lambda name, dtype, device: iter(rungs if dtype is torch.float32 else []))
    assert crossovers.search(["gram"], HERE, float) == {"gram": least} and "pays from" in capsys.readouterr().out
    assert crossovers.search(["gram"], HERE, float, seconds=-1.0) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_needs_a_gpu(capsys):
    from hvpfast.cli import main

    assert main(["tune"]) == 2 and "no CUDA device" in capsys.readouterr().err
