"""A training step with K-FAC against one of plain SGD: factors every 10 steps, inverses every 100.

Each kind of step (one that only preconditions, one that takes factors, one that renews inverses too) is timed in turns
with SGD's, and a row "average" is 90, 9 and 1 of them in 100, round by round. Eigenbases are always found anew: what an
earlier one still gives depends on how far training has gone since.
"""

from __future__ import annotations

import copy

import pytest
import torch

import hvpfast as hf
from bench import models, peers
from bench.conftest import describe, devices
from bench.contest import CLOCK, Call, hold, replay, require
from bench.models import WORKLOADS, Workload

# The weights stay where they are: K-FAC would fit the one batch in ten steps, and gradients of denormal numbers are slow.
LR = 1e-9
METHODS = {
    "eigen": (hf.optim.KFACPreconditioner, {"compute_method": "eigen"}),
    "inverse": (hf.optim.KFACPreconditioner, {"compute_method": "inverse"}),
    "EKFAC": (hf.optim.EKFACPreconditioner, {}),
}
KINDS = {"plain step": (False, False, 90), "factor step": (True, False, 9), "inverse step": (True, True, 1)}


def _step(work: Workload, preconditioner=None) -> Call:
    optimizer = torch.optim.SGD(work.model.parameters(), lr=LR, momentum=0.9)

    def call():
        optimizer.zero_grad()
        work.loss(work.model(work.data[0]), work.data[1]).backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()

    return call


def _own(work: Workload) -> Workload:
    return Workload(copy.deepcopy(work.model).train(), work.loss, work.data)


def _check(method: str, work: Workload) -> None:
    """The preconditioned gradient is that of the operator, to what the tolerance leaves out."""
    kind, options = METHODS[method]
    work = _own(work)
    preconditioner = kind(work.model, kl_clip=None, **options)
    work.loss(work.model(work.data[0]), work.data[1]).backward()
    plain = {name: p.grad.clone() for name, p in work.model.named_parameters()}
    preconditioner.step()
    operator = (hf.EKFAC if method == "EKFAC" else hf.KFAC)(*work, fisher_type="empirical")
    wanted = operator.inverse(0.001, "pi" if method == "inverse" else "exact") @ plain
    for name, p in work.model.named_parameters():
        off = float((p.grad - wanted[name]).norm() / wanted[name].norm())
        assert off < 0.02, f"{name} is off by {off:.2g}"


def compete(method: str, work: Workload, pace):
    _check(method, work)
    kind, options = METHODS[method]
    own = _own(work)
    now = {"factors": True, "inverses": True}
    preconditioner = kind(
        own.model,
        factor_update_steps=lambda step: 1 if now["factors"] else step + 1,
        inv_update_steps=lambda step: 1 if now["inverses"] else step + 1,
        **options,
    )
    step = _step(own, preconditioner)
    step()

    def of_kind(factors: bool, inverses: bool) -> Call:
        def call():
            now.update(factors=factors, inverses=inverses)
            for layer in preconditioner._layers.values() if inverses else ():
                layer.eigen = None
            step()

        return call

    prepare = {"SGD": lambda: _step(_own(work))}
    for name, (factors, inverses, _) in KINDS.items():
        prepare[f"hvpfast {name}"] = lambda f=factors, i=inverses: of_kind(f, i)

    def check(name: str, result: object) -> None:
        assert all(bool(torch.isfinite(p).all()) for p in own.model.parameters()), "a parameter is not finite"

    outcome = hold(prepare, check, pace)
    parts = [(outcome.times[f"hvpfast {name}"], share) for name, (*_, share) in KINDS.items()]
    rounds = zip(*(times for times, _ in parts), strict=True)
    outcome.times["hvpfast average"] = [
        sum(t * share for t, (_, share) in zip(times, parts, strict=True)) / 100 for times in rounds
    ]
    outcome.peak_bytes["hvpfast average"] = outcome.peak_bytes["hvpfast inverse step"]
    return outcome


ROWS = [
    (device, workload, method, name)
    for device in devices()
    for workload in WORKLOADS
    if workload.split()[0] in ("CNN", "transformer")
    for method in METHODS
    for name in ("SGD", *(f"hvpfast {kind}" for kind in KINDS), "hvpfast average")
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("device", "workload", "method", "contestant"), ROWS)
def bench_training(benchmark, contests, pace, quick, device, workload, method, contestant):
    key = ("training", device, workload, method, quick)
    outcome = contests.get(key, lambda: compete(method, models.make(workload, device, quick), pace))
    require(outcome, contestant)
    case = f"{method}, {workload}"
    benchmark.group = f"training step: {case} [{device}]"
    benchmark.extra_info.update(
        suite="optim",
        case=case,
        contestant=contestant,
        device=device,
        device_name=describe(device),
        ratio=outcome.ratio(contestant, "SGD"),
        against="SGD",
        sgd_steps=1 / outcome.ratio(contestant, "SGD"),
        peak_memory=outcome.peak_bytes[contestant],
        versions=peers.versions(),
    )
    replay(benchmark, outcome, contestant)
