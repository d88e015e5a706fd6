"""The crossovers of `hvpfast tune`: from how much work on a Triton kernel is faster than its reference on this GPU."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from hvpfast import dispatch, testing

FEATURES = tuple(1 << power for power in range(4, 12))  # of the rungs of a ladder, on both sides
DTYPES = (torch.float32, torch.bfloat16)


class Rung(NamedTuple):
    """One size: its work as the kernel's `worthwhile` weighs it, and both ways to the result."""

    work: float
    kernel: Callable[[], object]
    reference: Callable[[], object]


def ladder(name: str, dtype: torch.dtype, device: torch.device, features: tuple[int, ...] = FEATURES) -> Iterator[Rung]:
    """An op on data of growing size, 16 samples of 16 positions (convolutions: an eighth of the channels)."""
    op = dispatch.OPS[name]
    tables = importlib.import_module("hvpfast.kernels.tables")
    worthwhile = importlib.import_module(f"hvpfast.kernels.{name}").worthwhile
    for width in features:
        extents = {"i": max(1, width // 8), "o": 1} if name == "conv_gram" else {"i": width, "o": width}
        args, kwargs = testing.make_inputs(name, n=16, t=16, **extents, dtype=dtype, device=device)
        yield Rung(
            tables.work(worthwhile, *args, **kwargs, precision="auto"),
            lambda args=args, kwargs=kwargs: op.on("triton")(*args, **kwargs),
            lambda args=args, kwargs=kwargs: op.reference(*args, **kwargs),
        )


def pays(rungs: Iterator[Rung], clock: Callable[[Callable[[], object]], float]) -> float:
    """The work from which on the kernel was never slower: 0 if it never was, twice the last rung's if it was there too."""
    least, beyond, last_slower = 0.0, 0.0, False
    for rung in rungs:
        last_slower = clock(rung.kernel) > clock(rung.reference)
        if last_slower:
            least, beyond = math.inf, 2 * rung.work
        elif least == math.inf:
            least = rung.work
    return beyond if last_slower else least


def search(names: list[str], device: torch.device, clock: Callable, seconds: float = math.inf) -> dict[str, float]:
    """op -> least work, for float32 and bfloat16 alike, of those that the time was enough for; prints a line for each."""
    deadline, found = time.monotonic() + seconds, {}
    for name in names:
        if time.monotonic() > deadline:
            print("the time is over; what is left keeps its crossovers")
            break
        each = [pays(ladder(name, dtype, device), clock) for dtype in DTYPES]
        found[name] = max(each)
        print(f"{name:<32}pays from {each[0]:.3g} products on (float32), {each[1]:.3g} (bfloat16)", flush=True)
    return found
