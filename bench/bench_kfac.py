"""Kronecker factors and EKFAC, set-up included, against the peers and against one gradient of the same batch.

`python -m bench.bench_kfac CASE QUANTITY CONTESTANT` measures one contestant's peak memory in a process of its own, after a
run on two samples: what the allocator still holds for others would hide it.
"""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvpfast as hf
from bench import kfac_peers, models
from bench.conftest import describe, devices
from bench.contest import CLOCK, Call, Pace, Unfit, _peak, hold, replay, require
from bench.kfac_peers import Found
from bench.models import Workload
from bench.peers import versions

CASES = (
    "linear 1024-1024-10, N=8192",
    "convolution 64 on 32x32, N=128",
    "convolution 128 on 16x16, N=128",
    "convolution 256 on 8x8, N=128",
    "ResNet-18, N=64",
)
QUANTITIES = ("factors, mc", "factors, type-2", "EKFAC, mc")
GRADIENT = "one gradient"
OURS = (GRADIENT, "hvpfast")
COSINE = 1 - 1e-5  # of factors: the statistics' own precision is 3e-6


def make(case: str, device: str, quick: bool) -> Workload:
    """Float32, seeded; in miniature if quick."""
    torch.manual_seed(0)
    kind, sizes = case.split()[:2]
    if kind == "linear":
        n, wide = (8, 12) if quick else (8192, 1024)
        model, x = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, 10)), torch.randn(n, wide)
    elif kind == "convolution":
        n, c, side = (2, 4, 6) if quick else (128, int(sizes), {64: 32, 128: 16, 256: 8}[int(sizes)])
        model = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.AvgPool2d(side), nn.Flatten(), nn.Linear(c, 10)
        )
        x = torch.randn(n, c, side, side)
    else:
        n = 2 if quick else 64
        model = models.resnet18((8, 8, 16, 16)) if quick else models.resnet18()
        x = torch.randn(n, 3, *([8] * 2 if quick else [32] * 2))
    y = torch.randint(0, 10, (n,))
    return Workload(model.to(device).eval(), nn.CrossEntropyLoss(), (x.to(device), y.to(device)))


def hvpfast_factors(fisher_type: str):
    def prepare(work: Workload) -> Call:
        def call() -> Found:
            operator = hf.KFAC(*work, fisher_type=fisher_type)
            block = next(iter(operator.blocks()))
            return Found(lambda: block.a.dense()[0], lambda: block.g.dense()[0])

        return call

    return prepare


def hvpfast_ekfac(work: Workload) -> Call:
    def call() -> Found:
        operator = hf.EKFAC(*work, fisher_type="mc")
        blocks = operator._eigen()
        return Found(values=lambda: sum(float(block.spectrum.values.sum()) for block in blocks))

    return call


def gradient(work: Workload) -> Call:
    model, loss, (x, y) = work
    params = list(model.parameters())

    def call() -> None:
        torch.autograd.grad(loss(model(x), y), params)

    return call


CONTESTANTS = {
    "factors, mc": {GRADIENT: gradient, "hvpfast": hvpfast_factors("mc"), **kfac_peers.factors("mc")},
    "factors, type-2": {GRADIENT: gradient, "hvpfast": hvpfast_factors("type-2"), **kfac_peers.factors("type-2")},
    "EKFAC, mc": {GRADIENT: gradient, "hvpfast": hvpfast_ekfac, **kfac_peers.EKFAC},
}


def first_gram(work: Workload) -> Tensor:
    """A of the first layer without the bias, float64 rows a few samples at a time, up to its scale."""
    layer, x = next(m for m in work.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))), work.data[0]
    total = 0.0
    for part in x.split(8):
        rows = part
        if isinstance(layer, nn.Conv2d):
            rows = F.unfold(part, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            rows = rows.transpose(1, 2).flatten(0, 1)
        total = total + rows.double().T @ rows.double()
    return total


def expected_trace(work: Workload) -> float:
    """Of the Monte-Carlo Fisher, which is the sum of corrected eigenvalues: by plain autograd on a few samples."""
    model, (x, _) = work.model, work.data
    few = min(len(x), 16)
    squares = 0.0
    for one in x[:few]:
        logits = model(one[None])
        shares = logits.detach().softmax(1)[0]
        for label, share in enumerate(shares):
            loss = F.cross_entropy(logits, torch.tensor([label], device=x.device))
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            squares += float(share) * sum(float(grad.square().sum()) for grad in grads)
    return squares / few


def cosine(one: Tensor, other: Tensor) -> float:
    size = min(len(one), len(other))
    one, other = (x[:size, :size].double() for x in (one, other))
    return float((one * other).sum() / (one.norm() * other.norm()))


def compete(work: Workload, quantity: str, pace: Pace, rivals: list[str] | None):
    drawn = quantity != "factors, type-2"
    truth = first_gram(work) if quantity.startswith("factors") else None
    slopes = None
    if not drawn:
        with hf.backend("reference"), hf.precision("ieee"):
            slopes = hvpfast_factors("type-2")(work)().g()
    level = expected_trace(work) if quantity.startswith("EKFAC") else None

    def check(name: str, result: Found | None) -> None:
        if result is None:
            return
        if truth is not None:
            found = cosine(result.a(), truth)
            assert found > COSINE, f"A of the first layer: cosine {found}"
        if slopes is not None and result.g is not None:
            found = cosine(result.g(), slopes)
            assert found > COSINE, f"G of the first layer: cosine {found}"
        if level is not None:
            found = result.values()
            assert 0.5 < found / level < 2, f"sum of eigenvalues {found}, expected about {level}"

    def of(name: str, function):
        def prepare() -> Call:
            copied = Workload(copy.deepcopy(work.model), copy.deepcopy(work.loss), work.data)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    return function(copied)
                except Exception as failure:
                    raise unfit(name, failure) from failure

        return prepare

    def guarded(name: str, call: Call) -> Call:
        def guard() -> Found | None:
            try:
                return call()
            except Exception as failure:
                raise unfit(name, failure) from failure

        return guard

    chosen = {name: f for name, f in CONTESTANTS[quantity].items() if rivals is None or name in (*OURS, *rivals)}
    prepare = {name: of(name, function) for name, function in chosen.items()}
    return hold({name: lambda n=name, p=p: guarded(n, p()) for name, p in prepare.items()}, check, pace)


def unfit(name: str, failure: Exception) -> Exception:
    """A peer's error is a reason to leave it out; ours is ours."""
    if name in OURS or isinstance(failure, Unfit):
        return failure
    return Unfit(f"{type(failure).__name__}: {str(failure).splitlines()[:1]}")


ROWS = [
    (device, case, quantity, name)
    for device in devices()
    for case in CASES
    for quantity in QUANTITIES
    for name in CONTESTANTS[quantity]
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("device", "case", "quantity", "contestant"), ROWS)
def bench_kfac(benchmark, contests, pace, quick, rivals, device, case, quantity, contestant):
    if rivals is not None and contestant not in (*OURS, *rivals):
        pytest.skip(f"{contestant}: left out by --bench-rivals")

    def held():
        return compete(make(case, device, quick), quantity, pace, rivals)

    outcome = contests.get(("kfac", device, case, quantity, quick), held)
    require(outcome, contestant)
    rival = outcome.fastest([name for name in outcome.times if name not in OURS])
    benchmark.group = f"{quantity}, {case} [{device}]"
    benchmark.extra_info.update(
        suite="kfac",
        case=f"{quantity}, {case}",
        contestant=contestant,
        device=device,
        device_name=describe(device),
        ratio=outcome.ratio(contestant, rival) if rival else None,
        against=rival,
        gradients=1 / outcome.ratio(contestant, GRADIENT),
        peak_memory=outcome.peak_bytes[contestant],
        versions=versions(),
    )
    replay(benchmark, outcome, contestant)


def main(arguments: list[str]) -> int:
    case, quantity, contestant = arguments
    work = make(case, "cpu", False)
    prepare = CONTESTANTS[quantity][contestant]
    x, y = work.data
    prepare(Workload(copy.deepcopy(work.model), copy.deepcopy(work.loss), (x[:2], y[:2])))()
    taken, _ = _peak(prepare(work))
    print(f"{case} | {quantity} | {contestant} | {taken / 2**20:.0f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
