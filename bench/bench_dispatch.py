"""What a call of an op costs over the plain function behind it: at most three microseconds."""

from __future__ import annotations

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
