"""Whole products and factors on the GPU, beside autograd's gradient and curvlinops where it is installed: the groups of `gpu.py`
that say what the ops' times come to. The least work is that of the linear layers' products, three of them a gradient."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from gpu_cases import BACKENDS, DEVICE, REHEARSAL, Timed, with_tf32
from torch import Tensor, nn

import hvpfast as hf
from bench import kfac_peers, peers
from bench.contest import Unfit
from bench.models import Workload
from hvpfast import dispatch, testing

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


def captures_hold() -> tuple[int, list[str]]:
    """Every kernel's launches captured in a CUDA graph, replayed on other data and held against a plain call: nothing in them may
    wait for the device or ask the host for memory. How many were compared, and what is wrong."""
    cases, failures = 0, []
    for op, backend in (
        (op, backend) for op in dispatch.OPS.values() for backend in BACKENDS if backend in op.backends
    ):
        args, kwargs = testing.make_inputs(op.name, n=33, t=3, i=40, o=24, device=DEVICE)
        other, _ = testing.make_inputs(op.name, n=33, t=3, i=40, o=24, device=DEVICE, seed=1)
        if op.why_not(backend, *args, **kwargs) is not None or op.name in _FROM_HOST:
            continue
        cases += 1
        try:
            expected = testing.pieces(op.on(backend)(*other, **kwargs))
            replay, held = _graph_of(functools.partial(op.on(backend), *args, **kwargs))
            for to, value in zip(args, other, strict=True):
                if isinstance(to, Tensor):
                    to.copy_(value)
            replay()
            if not all(torch.equal(x, y) for x, y in zip(testing.pieces(held), expected, strict=True)):
                failures.append(f"{op.name} on {backend}: the replay's result is another")
        except Exception as error:  # whatever a capture raises is what is asked for here
            failures.append(f"{op.name} on {backend}: {type(error).__name__}: {error}")
            if "CUDA error" in str(error):
                break
    return cases, failures


def _graph_of(run: Callable[[], object]) -> tuple[Callable[[], None], list[Tensor]]:
    """What replays the captured call, and the tensors that it writes; in a rehearsal the call itself."""
    if REHEARSAL:
        held = [torch.empty_like(x) for x in testing.pieces(run())]
        return lambda: [x.copy_(y) for x, y in zip(held, testing.pieces(run()), strict=True)], held
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled, and workspaces' sizes known, before the capture
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = testing.pieces(run())

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay, held


_FROM_HOST = ("kron_apply", "kron_solve")  # a table of addresses: their kernels refuse a capture, and torch takes it
_GRAPHS = "auto" if REHEARSAL else "required"
SHAPES = ((16, 1, 5),) if REHEARSAL else ((1024, 4, 8192), (256, 8, 512), (64, 3, 128))
