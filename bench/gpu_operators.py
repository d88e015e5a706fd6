"""Whole products and factors on the GPU, beside autograd's gradient and curvlinops where it is installed: the groups of `gpu.py`
that say what the ops' times come to. The least work is that of the linear layers' products, three of them a gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from gpu_cases import DEVICE, REHEARSAL, Timed, with_tf32
from torch import Tensor, nn

import hvpfast as hf
from bench import kfac_peers, peers
from bench.contest import Unfit
from bench.models import Workload

# Products of the layers' size that a gradient, a kept graph's product with the Hessian or the GGN, and factors from a drawn label
# take: forward 1, each side of a backward pass 1 (tests/operators and docs: 2 N P flops each).
_GRADIENT, _HESSIAN, _GGN = 3, 6, 4


def _workload(width: int, depth: int, samples: int) -> Workload:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).to(DEVICE)
    data = torch.randn(samples, width, device=DEVICE), torch.randint(0, 10, (samples,), device=DEVICE)
    return Workload(model, nn.CrossEntropyLoss(), data)


def _entered(prepare: Callable[[], Callable[[], object]]) -> Callable[[], object] | None:
    try:
        return prepare()
    except Unfit:  # not installed, or of another version
        return None


def operator_times(width: int, depth: int, samples: int) -> Iterator[Timed]:
    """Products with a vector of an MLP's Hessian and GGN, float32, graphs kept between them, and its K-FAC factors."""
    work = _workload(width, depth, samples)
    model, loss, data = work
    params = list(model.parameters())
    numbers = sum(p.numel() for p in params)
    v = torch.randn(numbers, device=DEVICE)
    unit, size, shape = 2.0 * samples * numbers, 4.0 * 3 * numbers, f"MLP {depth} x {width} N={samples}"

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(model(data[0]), data[1]), params)

    for kind, count in (("Hessian", _HESSIAN), ("GGN", _GGN)):
        group = f"{kind} @ v {shape}"
        ours, captured = (getattr(hf, kind)(model, loss, data) for _ in range(2))
        runs = {
            "hvpfast": lambda ours=ours: ours @ v,
            "hvpfast, CUDA graphs": _captured(lambda captured=captured: captured @ v),
            "hvpfast, every op by its reference": _by_reference(lambda ours=ours: ours @ v),
        }
        theirs = _entered(lambda kind=kind: peers.PRODUCTS[kind]["curvlinops"](model, loss, data, v))
        yield Timed(group, "a gradient, fp32", with_tf32(False, gradient), _GRADIENT * unit, size, "fp32")
        for name, run in runs.items():
            yield Timed(group, f"{name} fp32", with_tf32(False, run), count * unit, size, "fp32")
            yield Timed(group, f"{name} tf32", with_tf32(True, run), count * unit, size, "tf32")
        if theirs is not None:
            yield Timed(group, "curvlinops fp32", with_tf32(False, theirs), count * unit, size, "fp32")
            yield Timed(group, "curvlinops tf32", with_tf32(True, theirs), count * unit, size, "tf32")
    group, half = f"K-FAC factors {shape}", unit * (_GRADIENT + 1)  # both Gram matrices, by halves
    yield Timed(group, "a gradient, fp32", with_tf32(False, gradient), _GRADIENT * unit, size, "fp32")
    yield Timed(group, "hvpfast fp32", lambda: hf.KFAC(model, loss, data).factors, half, size, "bf16", 3)
    for name, prepare in (("curvlinops", kfac_peers.curvlinops), ("curvlinops hooks", kfac_peers.curvlinops_hooks)):
        other = Workload(copy.deepcopy(model), loss, data)
        run = _entered(lambda prepare=prepare, other=other: prepare("mc")(other))
        if run is not None:
            yield Timed(group, f"{name} fp32", with_tf32(False, run), half, size, "fp32")


def _by_reference(run: Callable[[], object]) -> Callable[[], object]:
    def called() -> object:
        with hf.backend("reference"):
            return run()

    return called


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """From CUDA graphs or not at all; the first two calls linearise and capture."""

    def called() -> object:
        with hf.cuda_graphs(_GRAPHS):
            return run()

    return called


def graphs_hold() -> tuple[int, list[str]]:
    """Products from CUDA graphs beside those without, of batches of unequal size: how many were compared, and what is wrong."""
    model, loss, (x, y) = _workload(64, 3, 128)
    batches = [(x[:100], y[:100]), (x[100:], y[100:])]
    cases, failures = 0, []
    for kind in (hf.Hessian, hf.GGN, hf.EmpiricalFisher):
        plain, captured = kind(model, loss, batches), kind(model, loss, batches)
        for columns in (1, 3):
            for change in (False, True):
                if change:
                    with torch.no_grad():
                        model[0].weight.mul_(1.01)
                for _ in range(4):  # linearised, captured, replayed twice
                    v, cases = torch.randn(columns, plain.shape[0], device=DEVICE).T, cases + 1
                    expected = plain @ v
                    try:
                        with hf.cuda_graphs(_GRAPHS):
                            got = captured @ v
                    except hf.BackendError as error:
                        return cases, [*failures, str(error)]
                    error = float((got - expected).norm() / expected.norm())
                    if not error < 1e-5:
                        failures.append(f"{kind.__name__}, {columns} columns: off by {error:.1e}")
    return cases, failures


_GRAPHS = "auto" if REHEARSAL else "required"
SHAPES = ((16, 1, 5),) if REHEARSAL else ((1024, 4, 8192), (256, 8, 512), (64, 3, 128))
