"""Probes of one Hessian, set-up included: top eigenvalues, trace, spectral density; against ARPACK and the peers."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import scipy.sparse.linalg

import hvpfast as hf
from bench import models, peers
from bench.conftest import describe, devices
from bench.contest import CLOCK, Call, Pace, Unfit, hold, replay, require
from bench.models import Workload

WORKLOAD = "MLP 784-512-10, N=1000"
MATVECS = 64
EIGENVALUES = 1e-3  # relative accuracy that is asked of everyone

Numbers = list[float]


def _mean(samples) -> Numbers:
    """A stochastic trace and its standard error."""
    samples = np.asarray(samples, dtype=float)
    return [float(samples.mean()), float(samples.std(ddof=1) / math.sqrt(len(samples)))]


# top eigenvalues ------------------------------------------------------------------------------------------------------


def eigs_hvpfast(work: Workload, k: int) -> Call:
    return lambda: hf.eigsh(hf.Hessian(*work), k=k, which="LA", tol=EIGENVALUES).values.tolist()


def eigs_arpack(work: Workload, k: int) -> Call:
    """SciPy's ARPACK on hvpfast's own products: what the probe itself is worth."""

    def call() -> Numbers:
        operator = hf.Hessian(*work).to_scipy()
        found = scipy.sparse.linalg.eigsh(operator, k=k, which="LA", tol=EIGENVALUES, return_eigenvectors=False)
        return sorted(found.tolist(), reverse=True)

    return call


def eigs_curvlinops(work: Workload, k: int) -> Call:
    """Its documented way: export to SciPy, ARPACK."""
    peers.load("curvlinops")

    def call() -> Numbers:
        operator = peers.curvlinops_operator("HessianLinearOperator", *work).to_scipy()
        found = scipy.sparse.linalg.eigsh(operator, k=k, which="LA", tol=EIGENVALUES, return_eigenvectors=False)
        return sorted(found.tolist(), reverse=True)

    return call


def eigs_pyhessian(work: Workload, k: int) -> Call:
    """Power iteration; its tolerance is on the change of the value between two steps."""
    module = peers.load("pyhessian")
    if k > 1:
        raise Unfit("power iteration with deflation finds the largest in magnitude, not the largest")
    cuda = work.data[0].is_cuda

    def call() -> Numbers:
        computer = module.hessian(work.model, work.loss, data=work.data, cuda=cuda)
        return computer.eigenvalues(maxIter=200, tol=EIGENVALUES, top_n=k)[0]

    return call


# trace ----------------------------------------------------------------------------------------------------------------


def trace_hvpfast(work: Workload, _: int) -> Call:
    def call() -> Numbers:
        found = hf.trace(hf.Hessian(*work), matvecs=MATVECS)
        return [found.value, found.stderr]

    return call


def trace_curvlinops(work: Workload, _: int) -> Call:
    trace = peers.load("curvlinops").hutchinson_trace

    def call() -> Numbers:
        operator = peers.curvlinops_operator("HessianLinearOperator", *work)
        return [float(trace(operator, num_matvecs=MATVECS)), 0.0]

    return call


def trace_pyhessian(work: Workload, _: int) -> Call:
    module, cuda = peers.load("pyhessian"), work.data[0].is_cuda

    def call() -> Numbers:
        computer = module.hessian(work.model, work.loss, data=work.data, cuda=cuda)
        return _mean(computer.trace(maxIter=MATVECS, tol=0.0))

    return call


# density: one vector, so that the products, not their number, are compared ---------------------------------------------


def density_hvpfast(work: Workload, steps: int) -> Call:
    def call() -> Numbers:
        found = hf.density(hf.Hessian(*work), probes=1, steps=steps)
        return [float((found.nodes * found.weights).sum() / found.weights.sum()), float(found.nodes.max())]

    return call


def density_pyhessian(work: Workload, steps: int) -> Call:
    module, cuda = peers.load("pyhessian"), work.data[0].is_cuda

    def call() -> Numbers:
        computer = module.hessian(work.model, work.loss, data=work.data, cuda=cuda)
        nodes, weights = (np.asarray(x) for x in computer.density(iter=steps, n_v=1))
        return [float((nodes * weights).sum() / weights.sum()), float(nodes.max())]

    return call


def density_curvlinops(work: Workload, steps: int) -> Call:
    cached = peers.load("curvlinops").LanczosApproximateSpectrumCached

    def call() -> Numbers:
        operator = peers.curvlinops_operator("HessianLinearOperator", *work)
        found = cached(operator, steps, (-1.0, 100.0))
        found.approximate_spectrum(num_repeats=1, num_points=64)
        return []

    return call


PROBES = {
    "eigsh k=1": (1, {"hvpfast": eigs_hvpfast, "scipy": eigs_arpack, "curvlinops": eigs_curvlinops, "pyhessian": eigs_pyhessian}),
    "eigsh k=6": (6, {"hvpfast": eigs_hvpfast, "scipy": eigs_arpack, "curvlinops": eigs_curvlinops, "pyhessian": eigs_pyhessian}),
    f"trace, {MATVECS} products": (
        0,
        {"hvpfast": trace_hvpfast, "curvlinops": trace_curvlinops, "pyhessian": trace_pyhessian},
    ),
    "density, 1 vector, 64 steps": (
        64,
        {"hvpfast": density_hvpfast, "curvlinops": density_curvlinops, "pyhessian": density_pyhessian},
    ),
}  # fmt: skip


def compete(probe: str, work: Workload, pace: Pace, quick: bool):
    number, contestants = PROBES[probe]
    number = min(number, 2 if probe.startswith("eigsh") else 8) if quick else number
    hessian = hf.Hessian(*work)
    if probe.startswith("eigsh"):
        exact = hf.eigsh(hessian, k=number, which="LA", tol=1e-6).values.tolist()
    elif probe.startswith("trace"):
        tight = hf.trace(hessian, matvecs=4 * MATVECS, seed=99)
        exact = [tight.value, tight.stderr]
    else:
        exact = hf.eigsh(hessian, k=1, which="LA", tol=1e-4).values.tolist()

    def check(name: str, result: Numbers) -> None:
        if probe.startswith("eigsh"):
            # each tolerance means something else (a residual, a change): ten times what was asked of all
            worst = max(abs(r - e) / abs(exact[0]) for r, e in zip(result, exact, strict=True))
            assert worst <= 10 * EIGENVALUES, f"{result}, exact {exact}"
        elif probe.startswith("trace"):
            error = result[1] or 2 * exact[1]  # no error stated: that of as many products
            assert abs(result[0] - exact[0]) <= 5 * math.hypot(error, exact[1]), f"{result}, exact {exact}"
        elif result:
            assert abs(result[1] - exact[0]) <= 0.05 * exact[0], f"largest node {result[1]}, lambda_max {exact[0]}"

    def of(function):
        def prepare() -> Call:
            copied = Workload(copy.deepcopy(work.model), work.loss, work.data)
            call = function(copied, number)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call()
            except Exception as failure:
                if function.__name__.endswith("hvpfast"):
                    raise
                raise Unfit(f"{type(failure).__name__}: {str(failure).splitlines()[0]}") from failure
            return call

        return prepare

    return hold({name: of(function) for name, function in contestants.items()}, check, pace)


ROWS = [(device, probe, name) for device in devices() for probe, (_, named) in PROBES.items() for name in named]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("device", "probe", "contestant"), ROWS)
def bench_probe(benchmark, contests, pace, quick, device, probe, contestant):
    def held():
        work = models.make(WORKLOAD, device, quick, n=8 if quick else 1000)
        return compete(probe, work, pace, quick)

    outcome = contests.get(("probes", device, probe, quick), held)
    require(outcome, contestant)
    rival = outcome.fastest([name for name in outcome.times if name != "hvpfast"])
    benchmark.group = f"{probe}, {WORKLOAD} [{device}]"
    benchmark.extra_info.update(
        suite="probes",
        case=f"{probe}, {WORKLOAD}",
        contestant=contestant,
        device=device,
        device_name=describe(device),
        ratio=outcome.ratio(contestant, rival) if rival else None,
        against=rival,
        peak_memory=outcome.peak_bytes[contestant],
        versions=peers.versions(),
    )
    replay(benchmark, outcome, contestant)
