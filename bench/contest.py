"""Contests: several ways to one result, checked first, then timed in alternating rounds of one process.

Absolute times drift by up to 2x between processes and within one; the ratio of two neighbours in a round does not. So a
group's contestants are timed together, A B C A B C ..., and each one's pytest-benchmark entry replays its own times.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Pace:
    """How long a contest may take: `rounds` at least, more until `seconds` a contestant; `block` seconds a timing."""

    rounds: int = 5
    most: int = 40
    seconds: float = 1.0
    warmup: float = 0.3
    block: float = 0.002


QUICK = Pace(rounds=2, most=2, seconds=0.0, warmup=0.0, block=0.0)


@dataclass
class Outcome:
    """Seconds a call for each contestant, round by round; or the reason why it took no part."""

    times: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)  # ours only: a peer's wrong result is a reason to leave it out
    peak_bytes: dict[str, int | None] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def ratio(self, name: str, against: str) -> float:
        """How many times faster `name` is than `against`: the median over rounds of their ratios."""
        pairs = zip(self.times[against], self.times[name], strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)

    def fastest(self, names: list[str]) -> str | None:
        return min((n for n in names if n in self.times), key=self.median, default=None)


class Unfit(Exception):
    """A contestant cannot take part; says why."""


def hold(prepare: Mapping[str, Callable[[], Call]], check: Callable[[str, object], None], pace: Pace) -> Outcome:
    """Prepare, check and time contestants in turns.

    Args:
        prepare: name -> a function that sets up and returns the call to time; raises `Unfit` with the reason.
        check: called with each name and its first result; raises AssertionError on a wrong one.
    """
    outcome, calls = Outcome(), {}
    for name, start in prepare.items():
        try:
            calls[name] = start()
            outcome.peak_bytes[name], result = _peak(calls[name])
            check(name, result)
        except (Unfit, AssertionError) as error:
            calls.pop(name, None)
            if isinstance(error, Unfit):
                outcome.reasons[name] = str(error)
            else:
                (outcome.wrong if name.startswith("hvpfast") else outcome.reasons)[name] = f"wrong result: {error}"
    result = None
    repeats = {name: _warm(call, pace) for name, call in calls.items()}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        started, done = time.perf_counter(), 0
        while done < pace.rounds or (
            done < pace.most and time.perf_counter() - started < pace.seconds * max(len(names), 1)
        ):
            turn = done % len(names) if names else 0  # no contestant always follows the same one
            for name in names[turn:] + names[:turn]:
                outcome.times.setdefault(name, []).append(_seconds(calls[name], repeats[name]))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return outcome


def _warm(call: Call, pace: Pace) -> int:
    """Warm up; returns how many calls fill a block."""
    once, total = math.inf, 0.0
    while True:
        once = min(once, _seconds(call, 1))
        total += once
        if total >= pace.warmup:
            return max(1, min(10_000, int(pace.block / max(once, 1e-9))))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(call: Call, repeats: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize()
    return (time.perf_counter() - start) / repeats


def _peak(call: Call) -> tuple[int | None, object]:
    """(bytes that one call takes at most above what was held before, its result); None where that cannot be read."""
    if torch.cuda.is_available():
        _synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        _synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken now
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return None, call()
    result = call()
    return max(0, _status("VmHWM") - before), result


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


class Clock:
    """A timer for pytest-benchmark that shows times which were taken before."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-13  # pytest-benchmark asks for the timer's precision, and waits until it moves
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def require(outcome: Outcome, name: str) -> None:
    """Skip a contestant that could not take part, saying why; fail one of ours whose result was wrong."""
    if name in outcome.reasons:
        pytest.skip(f"{name}: {outcome.reasons[name]}")
    if name in outcome.wrong:
        pytest.fail(f"{name}: {outcome.wrong[name]}")


def replay(benchmark, outcome: Outcome, name: str) -> None:
    """Enter one contestant's times into pytest-benchmark; the test must be marked `benchmark(timer=CLOCK)`."""
    assert name in outcome.times, name
    times = iter(outcome.times[name])
    benchmark.pedantic(lambda: CLOCK.advance(next(times)), rounds=len(outcome.times[name]), iterations=1)


@dataclass(frozen=True)
class Peaks:
    """What this machine reaches now: flop/s of `torch.mm` by dtype, bytes/s of a copy (read and written)."""

    flops: dict[torch.dtype, float]
    bandwidth: float

    def percent(self, flops: float, moved: float, dtype: torch.dtype, seconds: float) -> float:
        """Share of the roofline: the time that the flops or the bytes need at least, over the time taken, in percent."""
        return 100 * max(flops / self.flops[dtype], moved / self.bandwidth) / seconds


def measure_peaks(device: str, quick: bool) -> Peaks:
    side, rounds = (256, 2) if quick else (8192 if device == "cuda" else 2048, 7)
    flops = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.randn(side, side, device=device).to(dtype)
        y = torch.empty_like(x)
        flops[dtype] = 2 * side**3 / min(_seconds(lambda x=x, y=y: torch.mm(x, x, out=y), 1) for _ in range(rounds))
    count = 1 << (20 if quick else 28 if device == "cuda" else 26)
    source, target = torch.zeros(count, device=device), torch.zeros(count, device=device)
    seconds = min(_seconds(lambda: target.copy_(source), 1) for _ in range(rounds))
    return Peaks(flops, 8 * count / seconds)
