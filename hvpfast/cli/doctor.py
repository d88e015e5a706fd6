"""`hvpfast doctor`: what is installed, what this machine can run, and why not the rest."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

import torch

from hvpfast import dispatch, testing
from hvpfast.cli import environment


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "doctor",
        help="what is installed, what would run for each op, and why not the rest",
        description="Prints versions, the CPU and its kernel tiers, CUDA devices, the outcome of the build, and for every op "
        "which backend would run on CPU and on CUDA tensors, and why not the others. Paste it into bug reports.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it; returns 0."""
    for title, rows in (
        ("Versions", _versions()),
        ("Machine", _machine()),
        ("Native kernels", _build()),
        ("Ops", _ops()),
    ):
        print(f"{title}\n{'-' * len(title)}")
        rows = list(rows)
        wide = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"{name:<{wide}}  {value}".rstrip())
        print()
    return 0


def _versions() -> Iterator[tuple[str, str]]:
    for name, version in environment.versions().items():
        yield name, version or "not installed"
    yield "executable", sys.executable


def _machine() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{environment.cpu_model()}, {os.cpu_count()} cores"
    yield "torch threads", str(torch.get_num_threads())
    capability = getattr(torch.backends.cpu, "get_cpu_capability", None)
    if capability is not None:
        yield "torch's cpu tier", capability()
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield "cuda", f"torch {'is built for CUDA ' + built + ' but' if built else 'is a CPU build and'} sees no device"
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        yield (
            f"cuda:{index}",
            f"{found.name}, sm_{found.major}{found.minor}, {memory:.0f} GiB, {found.multi_processor_count} SMs",
        )


def _build() -> Iterator[tuple[str, str]]:
    try:
        from hvpfast.kernels import native
    except ImportError as error:
        yield "hvpfast.kernels", f"cannot be imported: {error}"
        return
    yield from ((name, str(state)) for name, state in native.build_report().items())
    for device in ("cpu", "cuda"):
        yield f"_{device}", native.missing(device) or "loaded"
    if native.missing("cpu") is None:
        from hvpfast.kernels import _cpu

        for name in ("tiers", "tier", "threads"):
            asked = getattr(_cpu, name, None)
            if callable(asked):
                try:
                    yield f"cpu {name}", _shown(asked())
                except TypeError:  # needs arguments: not a question that we can ask
                    continue
    for name in ("HVPFAST_BACKEND", "HVPFAST_PRECISION", "HVPFAST_CUDA_GRAPHS", "HVPFAST_TABLES", "TRITON_INTERPRET"):
        if name in os.environ:
            yield name, os.environ[name]


def _shown(value: object) -> str:
    if isinstance(value, dict):  # a reason each, or None where there is none
        return ", ".join(f"{name}: {'ready' if item is None else _shown(item)}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _ops() -> Iterator[tuple[str, str]]:
    """One row an op and device: what would run; then the reasons, each once, with the ops that it concerns."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name, op in dispatch.OPS.items():
        for device in devices:
            label = f"{name} on {device}" if len(devices) > 1 else name
            try:
                args, kwargs = testing.make_inputs(name, n=256, t=1, i=256, o=256, device=device)
                choice = op.choose(*args, **kwargs)
            except (ValueError, TypeError, dispatch.BackendError) as error:
                yield label, f"no answer: {error}"
                continue
            yield label, f"{choice.backend} runs for float32, N = I = O = 256"
            for other, why in choice.why_not.items():
                if other in op.backends:  # the table below lists what nobody has written
                    yield "", f"not {other}: {why}"
    yield "", ""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, where, reason in dispatch.backends():
        if where != "reference":
            state = (reason or "ready").replace(f"{name} has no", "it has no")
            reasons.setdefault((where, state), []).append(name)
    for (where, state), names in sorted(reasons.items(), key=lambda item: dispatch.BACKENDS.index(item[0][0])):
        yield where, f"{state}: {', '.join(names)}"
