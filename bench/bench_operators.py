"""Hessian- and GGN-vector products, in gradients: against autograd, torch.func and the peers."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvpfast as hf
from bench import models, peers
from bench.conftest import describe, devices
from bench.contest import CLOCK, Call, Unfit, hold, replay, require
from bench.models import WORKLOADS, Workload
from hvpfast.testing import error

OURS = {"Hessian": hf.Hessian, "GGN": hf.GGN}


def _flat(parts) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _split(v: Tensor, params: list[Tensor]) -> list[Tensor]:
    return [part.view_as(p) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]


def _columns(call, v: Tensor) -> Tensor:
    return call(v) if v.dim() == 1 else torch.stack([call(column) for column in v.T], 1)


def gradient(work: Workload, v: Tensor) -> Call:
    params = list(work.model.parameters())

    def call():
        return _flat(torch.autograd.grad(work.loss(work.model(work.data[0]), work.data[1]), params))

    return call


def retained(work: Workload, v: Tensor) -> Call:
    """Double backward through one kept graph of the gradient; one vector after the other."""
    params = list(work.model.parameters())
    slope = torch.autograd.grad(work.loss(work.model(work.data[0]), work.data[1]), params, create_graph=True)

    def one(column: Tensor) -> Tensor:
        return _flat(torch.autograd.grad(slope, params, _split(column, params), retain_graph=True))

    return lambda: _columns(one, v)


def rebuilt(work: Workload, v: Tensor) -> Call:
    """The whole of it every time, as a user's function does it."""

    def one(column: Tensor) -> Tensor:
        return retained(work, column)()

    return lambda: _columns(one, v)


def _functional(work: Workload) -> tuple[dict[str, Tensor], list[Tensor]]:
    named = {name: p.detach() for name, p in work.model.named_parameters()}
    return named, list(named.values())


def forward_over_reverse(work: Workload, v: Tensor) -> Call:
    """torch.func: jvp of grad."""
    named, params = _functional(work)

    def value(parts):
        return work.loss(functional_call(work.model, parts, (work.data[0],)), work.data[1])

    def one(column: Tensor) -> Tensor:
        tangent = dict(zip(named, _split(column, params), strict=True))
        return _flat(jvp(grad(value), (named,), (tangent,))[1].values())

    return lambda: _columns(one, v)


def gauss_newton(work: Workload, v: Tensor) -> Call:
    """torch.func: jvp, the loss's HVP at the output, vjp."""
    named, params = _functional(work)

    def output(parts):
        return functional_call(work.model, parts, (work.data[0],))

    def one(column: Tensor) -> Tensor:
        tangent = dict(zip(named, _split(column, params), strict=True))
        at, pushed = jvp(output, (named,), (tangent,))
        middle = jvp(grad(lambda f: work.loss(f, work.data[1])), (at,), (pushed,))[1]
        return _flat(vjp(output, named)[1](middle)[0].values())

    return lambda: _columns(one, v)


def r_operator(work: Workload, v: Tensor) -> Call:
    """Double backward twice through kept graphs: J v by differentiating J'u in u, then J' S J v."""
    params = list(work.model.parameters())
    output = work.model(work.data[0])
    slope = torch.autograd.grad(work.loss(output, work.data[1]), output, create_graph=True)[0]
    dummy = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, params, dummy, create_graph=True)

    def one(column: Tensor) -> Tensor:
        pushed = torch.autograd.grad(pulled, dummy, _split(column, params), retain_graph=True)[0]
        middle = torch.autograd.grad(slope, output, pushed, retain_graph=True)[0]
        return _flat(torch.autograd.grad(output, params, middle, retain_graph=True))

    return lambda: _columns(one, v)


FORMULATIONS = {
    "Hessian": {"autograd retained": retained, "autograd rebuilt": rebuilt, "torch.func": forward_over_reverse},
    "GGN": {"autograd retained": r_operator, "torch.func": gauss_newton},
}


def ours(kind: str, work: Workload, v: Tensor) -> Call:
    operator = OURS[kind](work.model, work.loss, work.data)
    return lambda: operator @ v


def compete(kind: str, columns: int, work: Workload, device: str, pace):
    size = sum(p.numel() for p in work.model.parameters())
    v = torch.randn(size, *((columns,) if columns > 1 else ()), generator=torch.Generator().manual_seed(1)).to(device)
    exact = Workload(copy.deepcopy(work.model).double(), work.loss, (work.data[0].double(), work.data[1]))
    reference = gauss_newton if kind == "GGN" else forward_over_reverse
    first = v if columns == 1 else v[:, 0]  # one column in float64 is what there is time for
    truth = reference(exact, first.double())()
    own = error(reference(work, first)(), truth)
    del exact

    def check(name: str, result: Tensor) -> None:
        if name == "gradient":
            return
        got = error(result if columns == 1 else result[:, 0], truth)
        limits = [3 * each + 64 * torch.finfo(torch.float32).eps for each in own]
        assert all(g <= limit for g, limit in zip(got, limits, strict=True)), f"errors {got}, at most {limits}"

    def of_peer(function):
        def prepare():
            copied = Workload(copy.deepcopy(work.model), work.loss, work.data)  # peers leave .grad and hooks behind
            try:
                return function(*copied, v)
            except Unfit:
                raise
            except Exception as failure:  # whatever a peer raises is the reason why it is not in the table
                raise Unfit(f"{type(failure).__name__}: {failure}") from failure

        return prepare

    prepare = {"gradient": lambda: gradient(work, v)}
    prepare |= {name: functools.partial(function, work, v) for name, function in FORMULATIONS[kind].items()}
    prepare["hvpfast"] = lambda: ours(kind, work, v)
    prepare |= {name: of_peer(function) for name, function in peers.PRODUCTS[kind].items()}
    return hold(prepare, check, pace)


@contextlib.contextmanager
def twice_differentiable():
    """Attention and transformer layers in a form that can be differentiated twice, and forward: the same for all, so that all can
    take part."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


ROWS = [
    (device, workload, kind, columns, name)
    for device in devices()
    for workload in WORKLOADS
    for kind in OURS
    for columns in (1, 10)
    for name in ("gradient", *FORMULATIONS[kind], "hvpfast", *peers.PRODUCTS[kind])
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("device", "workload", "kind", "columns", "contestant"), ROWS)
def bench_product(benchmark, contests, pace, quick, device, workload, kind, columns, contestant):
    key = ("products", device, workload, kind, columns, quick)

    def held():
        with twice_differentiable():
            return compete(kind, columns, models.make(workload, device, quick), device, pace)

    outcome = contests.get(key, held)
    require(outcome, contestant)
    rival = outcome.fastest([name for name in outcome.times if name not in ("hvpfast", "gradient")])
    case = f"{kind} @ v, {columns} column{'s' if columns > 1 else ''}, {workload}"
    benchmark.group = f"{case} [{device}]"
    benchmark.extra_info.update(
        suite="operators",
        case=case,
        contestant=contestant,
        device=device,
        device_name=describe(device),
        ratio=outcome.ratio(contestant, rival),
        against=rival,
        gradients_per_column=1 / outcome.ratio(contestant, "gradient") / columns,
        peak_memory=outcome.peak_bytes[contestant],
        versions=peers.versions(),
    )
    replay(benchmark, outcome, contestant)
