"""Tiles and crossovers of a GPU as data: tables/sm_<capability>.json, or what HVPFAST_TABLES names (a file, or a folder of them).

A table says which device it was measured on, or that it holds expectations. Its `tiles` come before those in the kernels' files,
with which a table need not be whole; its `crossovers` are the least work for which an op's kernel runs. It is read once: no call
ever times anything. `hvpfast tune` makes one.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .tiles import Tile, facts, product

FOLDER = Path(__file__).with_name("tables")
CUBLAS = "cuBLAS's float32 product is expected to be faster than Triton's on CUDA cores (not yet measured)"


class Table(NamedTuple):
    """What one file says."""

    path: str
    measured: dict[str, str | None]  # "tiles", "crossovers" -> device and date; None: expectations
    tiles: dict[str, Tile]  # "<kernel> <row>" -> tile
    crossovers: dict[str, float]  # op -> least work


def path_for(capability: int) -> Path:
    """The file for a compute capability (80, 90, ...): HVPFAST_TABLES, else the package's of the nearest GPU not above it."""
    asked = os.environ.get("HVPFAST_TABLES")
    if asked and not Path(asked).is_dir():
        return Path(asked)
    for folder in (Path(asked), FOLDER) if asked else (FOLDER,):
        found = {int(path.stem[3:]): path for path in folder.glob("sm_*.json") if path.stem[3:].isdigit()}
        fitting = [number for number in found if number <= capability]
        if fitting:
            return found[max(fitting)]
    return FOLDER / "sm_80.json"


def read(path: Path) -> Table:
    """The table in a file; ValueError says what in it is wrong."""
    try:
        content = json.loads(path.read_text())
        tiles = {name: Tile(*numbers) for name, numbers in content["tiles"].items()}
        crossovers = {name: float(least) for name, least in content["crossovers"].items()}
        measured = {name: content["measured"][name] for name in ("tiles", "crossovers")}
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"hvpfast: the table {path} cannot be read ({type(error).__name__}: {error}); make it with `hvpfast tune`, or unset "
            f"HVPFAST_TABLES"
        ) from error
    for name, tile in tiles.items():
        powers = all(isinstance(n, int) and n > 0 and n & (n - 1) == 0 for n in (tile.side, tile.depth, tile.warps))
        if not (
            powers
            and min(tile.side, tile.depth) >= 16
            and tile.warps <= 16
            and 1 <= tile.stages <= 8
            and tile.chunk >= 0
            and isinstance(tile.tma, bool)
        ):
            raise ValueError(
                f"hvpfast: the table {path} has {list(tile.listed)} for {name!r}; it must be side and depth (powers of two "
                f"from 16 on), warps (1 to 16), stages (1 to 8), chunk (0 or more) and true where TMA copies it"
            )
    return Table(str(path), measured, tiles, crossovers)


@functools.cache
def table(device: torch.device) -> Table:
    """The table for a device, read once."""
    return read(path_for(facts(device).capability))


def tile(device: torch.device, name: str, otherwise: Tile) -> Tile:
    """The tile that the device's table has under this name, or the one given."""
    return table(device).tiles.get(name, otherwise)


def of(device: torch.device, kernel: str, rows: dict[str, Tile], product: str, fits: bool) -> Tile:
    """A kernel's tile for a product; where the data do not `fit` (16 bytes at a time), its "-odd" one if there is one."""
    key = product if fits or f"{product}-odd" not in rows else f"{product}-odd"
    return tile(device, f"{kernel} {key}", rows[key])


_asked: list[float] | None = None  # what `below` was asked for while `work` listens


def work(worthwhile: Callable[..., str | None], *args, **kwargs) -> float:
    """How much work a kernel's `worthwhile` sees in some arguments: what its crossover is a number of."""
    global _asked
    _asked = heard = []
    try:
        worthwhile(*args, **kwargs)
    finally:
        _asked = None
    return heard[0]


def below(device: torch.device, op: str, work: float) -> str | None:
    """Why so little work (products, or elements written) is not worth an op's launches, or None."""
    if _asked is not None:
        _asked.append(work)
    found = table(device)
    least = found.crossovers.get(op, 0.0)
    if work >= least:
        return None
    where = found.measured["crossovers"]
    said = f"measured on {where}" if where else "an expectation, not yet measured"
    return f"{work:.2g} products are below {least:.2g}, from which on its kernel pays ({said})"


def slower(x: torch.Tensor, op: str, work: float, precision: str, plain: bool = True) -> str | None:
    """Why the reference is expected to be faster for so much work on data like x, or None; `plain`: cuBLAS has this product."""
    few = below(x.device, op, work)
    if few is None and plain and product(x.dtype, precision) == "ieee":
        return CUBLAS
    return few
