"""What a call of an op costs over the plain function behind it: at most three microseconds."""

from __future__ import annotations

import statistics
import timeit

import pytest
import torch

from hvpfast import dispatch
from hvpfast.testing import make_inputs

MOST = 3.0  # microseconds


def nothing(*args, **kwargs):
    """Stands for the work, so that only the way to it is timed."""


def hollow(op: dispatch.Op, backend: str) -> dispatch.Op:
    """The op with its checks, questions and order of backends, and nothing to do at the end."""
    made = dispatch.Op(op.reference, op._check, op.backends)
    made.reference = nothing
    if backend != "reference":
        real = op._load(backend)
        made._auto = {"cpu": (dispatch._Implementation(nothing, real.unfit, real.slower),)}
    else:
        made._auto = {"cpu": ()}
    return made


def pairs():
    for name, op in dispatch.OPS.items():
        for backend in ("reference", "cpu"):
            if backend == "reference" or op.why_not(backend) is None:
                yield name, backend


@pytest.mark.parametrize(("name", "backend"), list(pairs()))
def bench_overhead(benchmark, quick, name, backend):
    op = hollow(dispatch.OPS[name], backend)
    args, kwargs = make_inputs(name, n=2, t=1, i=2, o=2)
    kwargs.pop("out", None)
    extended = kwargs if backend == "reference" else {**kwargs, "precision": "auto"}
    calls, rounds = (200, 3) if quick else (5000, 25)
    own, plain = [], []
    with torch.no_grad():
        for _ in range(rounds):  # in turns; the least of each is what the machine does when nothing disturbs it
            own.append(timeit.timeit(lambda: op(*args, **kwargs), number=calls))
            plain.append(timeit.timeit(lambda: nothing(*args, **extended), number=calls))
    overhead = 1e6 * (min(own) - min(plain)) / calls
    benchmark.group = "dispatch"
    benchmark.extra_info.update(
        suite="dispatch", case=f"{name}, {backend}", contestant="call", overhead_us=overhead, limit_us=MOST
    )
    benchmark.pedantic(op, args, kwargs, rounds=rounds, iterations=calls)
    if not quick:
        assert overhead <= MOST, f"{name}: a call costs {overhead:.2f} us over the plain function"


def bench_alternation(benchmark, quick):
    """torch's product and ours in turns take what each takes in a row: both use one pool of threads."""
    n, d = (64, 16) if quick else (1024, 256)
    x, own, theirs = torch.randn(n, d), torch.empty(d, d), torch.empty(d, d)

    def ours():
        dispatch.OPS["gram"](x, out=own)

    def torchs():
        torch.mm(x.T, x, out=theirs)

    def both():
        torchs()
        ours()

    calls, rounds = (5, 3) if quick else (200, 15)
    times = {call: [] for call in (torchs, ours, both)}
    for _ in range(rounds):
        for call, found in times.items():
            found.append(1e6 * timeit.timeit(call, number=calls) / calls)
    extra = [turns - first - second for first, second, turns in zip(*times.values(), strict=True)]
    parts = statistics.median(times[torchs]) + statistics.median(times[ours])
    benchmark.group = "dispatch"
    benchmark.extra_info.update(
        suite="dispatch",
        case=f"torch mm and gram in turns, N={n} I={d}",
        contestant="both",
        overhead_us=statistics.median(extra),
        limit_us=0.05 * parts,
    )
    benchmark.pedantic(both, rounds=rounds, iterations=calls)
