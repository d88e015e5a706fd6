"""Every tile that a table can set, with a run of its kernel on data of the size that it is for: what `hvpfast tune` times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import conv_gram, gram, grouped, linear_rop, moments, products, sample_dots, sample_grads, sample_gram
from . import sample_norms_squared as norms
from .native import _cpu_convolution as convolution
from .tiles import Tile, choose_splits, facts


class Case(NamedTuple):
    """One entry of a table: its name, the tile that holds without one, and a run with any tile."""

    name: str
    tile: Tile
    run: Callable[[Tile], Tensor]
    tma: bool = False  # whether TMA can copy its tiles


def candidates(case: Case) -> list[Tile]:
    """What is tried for an entry, the tile that holds now first; `side` stays, since launchers choose rows by it."""
    tile = case.tile
    depths = [depth for depth in (tile.depth, tile.depth // 2, tile.depth * 2) if depth >= 16]
    found = [tile]
    for tma, depth, warps, stages in itertools.product((False, True)[: 1 + case.tma], depths, (4, 8), (2, 3, 4)):
        chunk = tile.chunk * tile.depth // depth  # the same count of k a chunk
        other = Tile(tile.side, depth, warps, stages, chunk, tma)
        if other not in found:
            found.append(other)
    return found


def cases(device: torch.device, scale: int = 1) -> Iterator[Case]:
    """All of them; `scale` divides sizes, for a rehearsal."""

    def draw(product: str, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if product == "exact" else torch.float32
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    def size(extent: float, key: str = "") -> int:
        return max(3, int(extent) // scale) + (1 if key.endswith("-odd") else 0)

    def named(key: str) -> str:
        return key.partition("-")[0]

    for key, rows in gram.TILES.items():
        for n, (most, _, tile) in enumerate(rows):
            x = draw(named(key), size(8192), size(min(most, 2048), key))

            run = lambda tile, x=x, key=key: _gram(x, named(key), tile)  # noqa: E731
            yield Case(f"gram {key} {n}", tile, run, gram.copyable(x))
    for key, tile in products.TILES.items():
        x = draw(named(key), size(8192), size(1024, key))
        yield Case(f"product {key}", tile, lambda tile, x=x, key=key: products.product(x, x, named(key), tile=tile))
    for key, tile in sample_grads.TILES.items():
        if key != "outer":
            a = draw(named(key), size(64), size(256), size(1024, key))
            yield Case(f"sample_grads {key}", tile, lambda tile, a=a, key=key: _grads(a, named(key), tile))
    for key, tile in sample_dots.TILES.items():
        x, w = draw(named(key), size(8192), size(1024, key)), draw(named(key), 1, size(1024, key), size(1024, key))
        yield Case(
            f"sample_dots {key}",
            tile,
            lambda tile, x=x, w=w, key=key: sample_dots.launch(x, x, w, named(key), tile).sum(0),
        )
    for key, tile in linear_rop.TILES.items():
        x, w = draw(named(key), size(8192), size(1024, key)), draw(named(key), size(1024, key), size(1024, key))
        yield Case(
            f"linear_rop {key}",
            tile,
            lambda tile, x=x, w=w, key=key: linear_rop.launch(x, w, x[None], w[None], None, named(key), tile),
        )
    for key, tile in sample_gram.TILES.items():
        x = draw(named(key), size(4096), 1, size(1024, key))
        yield Case(f"sample_gram {key}", tile, lambda tile, x=x, key=key: _pairs(x, named(key), tile))
    for (route, key), tile in norms.TILES.items():
        launch = norms.launch_gram if route == "gram" else norms.launch_direct
        a = draw(named(key), size(64), size(256), size(1024, key))
        yield Case(
            f"norms_{route} {key}", tile, lambda tile, a=a, key=key, launch=launch: launch(a, a, named(key), tile)
        )
    for (route, key), tile in moments.TILES.items():
        a = draw(
            named(key) if route == "samples" else "", size(64), size(256) if route == "samples" else 1, size(1024, key)
        )
        yield Case(
            f"moments_{route} {key}", tile, lambda tile, a=a, key=key, route=route: _moments(a, route, named(key), tile)
        )
    for key, rows in conv_gram.TILES.items():
        for n, (most, tile) in enumerate(rows):
            channels = size(min(most, 256), key)
            x = draw(named(key), size(32), channels, size(28), size(28))
            yield Case(f"conv_boxes {key} {n}", tile, lambda tile, x=x, key=key: _conv(x, named(key), "boxes", tile))
    for key, tile in conv_gram.GATHERED.items():
        x = draw(key, size(32), 3, size(112), size(112))
        yield Case(f"conv_patches {key}", tile, lambda tile, x=x, key=key: _conv(x, key, "patches", tile))
    for key, tile in grouped.TILES.items():
        x = [draw("", 1, size(extent), size(extent)) for extent in (1024, 512, 1024)]
        yield Case(f"grouped {key}", tile, lambda tile, x=x, key=key: _grouped(x, key, tile))


def _gram(x: Tensor, product: str, tile: Tile) -> Tensor:
    out = x.new_empty(x.shape[1], x.shape[1], dtype=torch.float32)
    blocks = -(-x.shape[1] // tile.side)
    splits = choose_splits(blocks * (blocks + 1) // 2, -(-len(x) // tile.depth), facts(x.device).processors)
    gram.launch(x, out, 1.0, 0.0, False, product, tile, splits)
    return out


def _grads(a: Tensor, product: str, tile: Tile) -> Tensor:
    out = a.new_empty(len(a), a.shape[2], a.shape[2], dtype=torch.float32)
    sample_grads.launch(a, a, out, product, tile)
    return out


def _pairs(x: Tensor, product: str, tile: Tile) -> Tensor:
    out = x.new_empty(len(x), len(x), dtype=torch.float32)
    sample_gram.launch_pairs(x, x, x, x, out, True, product, tile)
    return out


def _moments(a: Tensor, route: str, product: str, tile: Tile) -> Tensor:
    out = a.new_empty(a.shape[2], a.shape[2], dtype=torch.float32)
    if route == "samples":
        moments.by_samples(a, a, None, product, squares=out, tile=tile)
    else:
        moments.by_rows(a, a, None, out[None], product, tile=tile)
    return out


def _conv(x: Tensor, product: str, form: str, tile: Tile) -> Tensor:
    axes = convolution(x.shape, 3, 1, 1, 1, 1)[0]
    width = x.shape[1] * math.prod(axis[1] for axis in axes)
    out = x.new_empty(width, width, dtype=torch.float32)
    conv_gram.launch(x, axes, 1, out, 1.0, 0.0, False, product, form=form, tile=tile)
    return out


def _grouped(x: list[Tensor], product: str, tile: Tile) -> Tensor:
    outs = [torch.empty_like(one) for one in x]
    grouped.run([([grouped.Job(one, one, out) for one, out in zip(x, outs, strict=True)], True, False)], product, tile)
    return torch.cat([out.flatten() for out in outs])
