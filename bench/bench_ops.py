"""Each op on each backend, against its reference, torch's own formulations and the peers."""

from __future__ import annotations

import pytest
import torch

from bench import peers
from bench.cases import ROWS, Row, inputs, work
from bench.conftest import describe, devices
from bench.contest import CLOCK, Unfit, hold, replay, require
from bench.formulations import FORMULATIONS
from hvpfast import dispatch
from hvpfast.testing import assert_accurate

REDUCED = ("ieee", "bf16x3")


def contestants(row: Row) -> list[str]:
    """Names of all that may run a row; those of ours begin with `hvpfast`."""
    ours = [
        f"hvpfast {backend} {precision}" if row.dtype is torch.float32 else f"hvpfast {backend}"
        for backend in dispatch.OPS[row.op].backends
        for precision in (REDUCED if row.dtype is torch.float32 else REDUCED[:1])
    ]
    return ["reference", *FORMULATIONS.get(row.op, {}), *ours, *peers.OPS.get(row.op, {})]


PAIRS = [(device, row, name) for device in devices() for row in ROWS for name in contestants(row)]


def _joined(result) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else torch.cat([x.flatten() for x in result])


def compete(row: Row, device: str, pace):
    op = dispatch.OPS[row.op]
    args, kwargs = inputs(row, device)
    # Of gigabytes of gradients the first and the last samples are held against float64, which would need several times that.
    few = torch.tensor([0, 1, 2, -3, -2, -1]) if row.op == "sample_grads" and row.n * row.i * row.o > 1 << 27 else None
    checked = args if few is None else tuple(x[few] for x in args)
    before = {key: (x.clone() if few is None else x[few]) if key == "out" else x for key, x in kwargs.items()}

    def ours(name: str):
        _, backend, *rest = name.split()
        precision = rest[0] if rest else "ieee"
        with dispatch.precision(precision):
            reason = op.why_not(backend, *args, **kwargs)
        if reason is not None:
            raise Unfit(f"{backend}: {reason}")
        bound = op.on(backend)

        def call():
            with dispatch.precision(precision):
                return bound(*args, **kwargs)

        return call

    def check(name: str, result) -> None:
        result = result if few is None else result[few]
        precision = name.rpartition(" ")[2] if name.startswith("hvpfast") else "ieee"
        if name.startswith("hvpfast"):
            assert_accurate(result, op, *checked, precision=precision, **before)
        elif name != "reference":  # a formulation may round its result to 16 bit; it must still be the same quantity
            truth, result = _joined(op.reference(*checked, **before)).double(), _joined(result)
            error = float((result.double().reshape(truth.shape) - truth).norm() / truth.norm())
            assert error <= 1e-5 + 4 * torch.finfo(row.dtype).eps, f"relative error {error:.1e}"

    prepare = {"reference": lambda: lambda: op.reference(*args, **kwargs)}
    prepare |= {
        name: (lambda f=function: lambda: f(*args, **kwargs)) for name, function in FORMULATIONS.get(row.op, {}).items()
    }
    prepare |= {name: (lambda name=name: ours(name)) for name in contestants(row) if name.startswith("hvpfast")}
    prepare |= {name: (lambda f=function: f(*args)) for name, function in peers.OPS.get(row.op, {}).items()}
    return hold(prepare, check, pace)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("device", "row", "contestant"), PAIRS, ids=[f"{row.name}-{name}-{device}" for device, row, name in PAIRS]
)
def bench_op(benchmark, contests, pace, quick, peaks, device, row, contestant):
    row = row.shrunk() if quick else row
    outcome = contests.get(("ops", device, row, quick), lambda: compete(row, device, pace))
    require(outcome, contestant)
    flops, moved = work(row)
    seconds = outcome.median(contestant)
    rival = outcome.fastest([name for name in outcome.times if not name.startswith("hvpfast")])
    benchmark.group = f"{row.name} [{device}]"
    benchmark.extra_info.update(
        suite="ops",
        case=row.name,
        contestant=contestant,
        device=device,
        device_name=describe(device),
        ratio=outcome.ratio(contestant, rival),
        against=rival,
        over_reference=outcome.ratio(contestant, "reference"),
        flops=flops,
        bytes=moved,
        gflops_per_s=flops / seconds / 1e9,
        gbytes_per_s=moved / seconds / 1e9,
        roofline_percent=peaks[device].percent(flops, moved, row.dtype, seconds),
        peak_gflops=peaks[device].flops[row.dtype] / 1e9,
        peak_gbytes=peaks[device].bandwidth / 1e9,
        peak_memory=outcome.peak_bytes[contestant],
        versions=peers.versions(),
    )
    replay(benchmark, outcome, contestant)
