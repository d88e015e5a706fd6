"""Per-sample quantities of whole models, in plain gradients: against torch.func, Opacus and BackPACK."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import hvpfast as hf
from bench import models, peers
from bench.bench_operators import gradient
from bench.conftest import describe, devices
from bench.contest import CLOCK, Call, Unfit, hold, replay, require
from bench.models import Workload

# (workload, N): the MLP at the batch size of a training step.
WORKLOADS = (
    ("MLP 784-512-10, N=1024", 256),
    ("CNN 64-128-256 on 32x32, N=128", None),
    ("transformer d=256, 4 layers, S=128, N=16", None),
)


def vmapped(work: Workload) -> dict[str, Tensor]:
    """torch.func: the gradients of all samples, name by name, (N, *shape)."""
    named = {name: p.detach() for name, p in work.model.named_parameters()}

    def value(parts, x, y):
        return work.loss(functional_call(work.model, parts, (x[None],)), y[None])

    return vmap(grad(value), (None, 0, 0))(named, *work.data)


FINISH = {
    "norms": lambda grads: sum(part.flatten(1).square().sum(1) for part in grads).sqrt(),
    "second moment": lambda grads: torch.cat([part.square().sum(0).flatten() for part in grads]),
    "gradients": lambda grads: torch.cat([part.flatten(1) for part in grads], 1),
}
EXTENSIONS = {"norms": "BatchL2Grad", "second moment": "SumGradSquared", "gradients": "BatchGrad"}


def ours(kind: str, work: Workload) -> Call:
    if kind == "norms":
        return lambda: hf.per_sample_grad_norms(*work)
    function = hf.grad_second_moment if kind == "second moment" else hf.per_sample_grads
    return lambda: list(function(*work).values())


def torch_func(kind: str, work: Workload) -> Call:
    if kind == "gradients":
        return lambda: list(vmapped(work).values())
    return lambda: FINISH[kind](list(vmapped(work).values()))


def opacus(kind: str, work: Workload) -> Call:
    """The hooks of its GradSampleModule, and what is made of the gradients that they leave."""
    if any(isinstance(module, nn.MultiheadAttention) for module in work.model.modules()):
        raise Unfit("opacus has its own attention layer and takes no nn.MultiheadAttention")
    wrap = peers.load("opacus").GradSampleModule
    model = wrap(copy.deepcopy(work.model).train(), loss_reduction="sum")
    total = type(work.loss)(reduction="sum")

    def call():
        model.zero_grad()
        total(model(work.data[0]), work.data[1]).backward()
        grads = [p.grad_sample for p in model.parameters()]
        return grads if kind == "gradients" else FINISH[kind](grads)

    return call


def backpack(kind: str, work: Workload) -> Call:
    package, extensions = peers.load("backpack"), peers.load("backpack.extensions")
    if not isinstance(work.model, nn.Sequential):
        raise Unfit("backpack takes a Sequential of the layers that it knows")
    name = EXTENSIONS[kind]
    model = package.extend(copy.deepcopy(work.model))
    total = package.extend(type(work.loss)(reduction="sum"))
    made = getattr(extensions, name)()
    saved = {"BatchL2Grad": "batch_l2", "SumGradSquared": "sum_grad_squared", "BatchGrad": "grad_batch"}[name]

    def call():
        model.zero_grad()
        with package.backpack(made):
            total(model(work.data[0]), work.data[1]).backward()
        parts = [getattr(p, saved) for p in model.parameters()]
        return sum(parts).sqrt() if kind == "norms" else parts

    return call


def ours_reused(work: Workload) -> Call:
    room: dict[str, Tensor] = hf.per_sample_grads(*work)
    return lambda: list(hf.per_sample_grads(*work, out=room).values())


RIVALS = {"torch.func": torch_func, "opacus": opacus, "backpack": backpack}


def compete(kind: str, work: Workload, pace):
    truth = FINISH[kind]([part.double() for part in vmapped(work).values()])

    def check(name: str, result) -> None:
        if name == "gradient":
            return
        if kind != "norms" and not isinstance(result, Tensor):
            result = torch.cat([part.flatten(1 if kind == "gradients" else 0) for part in result], -1)
        error = float((result.double() - truth).norm() / truth.norm())
        assert error <= 1e-4, f"relative error {error:.1e}"

    def of_rival(function):
        def prepare():
            try:
                return function(kind, work)
            except Unfit:
                raise
            except Exception as failure:  # whatever a peer raises is the reason why it is not in the table
                raise Unfit(f"{type(failure).__name__}: {failure}") from failure

        return prepare

    prepare = {"gradient": lambda: gradient(work, truth), "hvpfast": lambda: ours(kind, work)}
    if kind == "gradients":
        prepare["hvpfast, out="] = lambda: ours_reused(work)
    prepare |= {name: of_rival(function) for name, function in RIVALS.items()}
    return hold(prepare, check, pace)


ROWS = [
    (device, workload, n, kind, name)
    for device in devices()
    for workload, n in WORKLOADS
    for kind in FINISH
    for name in ("gradient", "hvpfast", *(["hvpfast, out="] if kind == "gradients" else []), *RIVALS)
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("device", "workload", "n", "kind", "contestant"), ROWS)
def bench_samples(benchmark, contests, pace, quick, device, workload, n, kind, contestant):
    key = ("samples", device, workload, kind, quick)
    outcome = contests.get(key, lambda: compete(kind, models.make(workload, device, quick, None if quick else n), pace))
    require(outcome, contestant)
    rival = outcome.fastest([name for name in outcome.times if not name.startswith("hvpfast") and name != "gradient"])
    case = f"per-sample {kind}, {workload.rpartition('N=')[0] + f'N={n}' if n else workload}"
    benchmark.group = f"{case} [{device}]"
    benchmark.extra_info.update(
        suite="samples",
        case=case,
        contestant=contestant,
        device=device,
        device_name=describe(device),
        ratio=outcome.ratio(contestant, rival),
        against=rival,
        gradients=1 / outcome.ratio(contestant, "gradient"),
        peak_memory=outcome.peak_bytes[contestant],
        versions=peers.versions(),
    )
    replay(benchmark, outcome, contestant)
