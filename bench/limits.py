"""What the figures that fall short of their aims are bound by: `python -m bench.limits`.

Each row times ours, one plain gradient, and what ours cannot do without, written in plain torch: the model's forward pass, the
backward passes to layers' outputs (no weight's gradient), and the products that the result is made of. In alternating rounds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hvpfast as hf
from bench.contest import Pace, hold
from bench.models import WORKLOADS, Workload, make, resnet18

Products = Callable[[list[Tensor], list[Tensor]], object]


class Row(NamedTuple):
    """A figure: the call, its model, how many backward passes and which products of (inputs, output gradients) it needs."""

    name: str
    work: Workload
    call: Callable[[], object]
    passes: int = 1
    products: Products | None = None


def _linear(widths: list[int], n: int) -> Workload:
    torch.manual_seed(0)
    layers = [part for i, o in itertools.pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())]
    data = torch.randn(n, widths[0]), torch.randint(0, widths[-1], (n,))
    return Workload(nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss(), data)


def _squares(inputs: list[Tensor], grads: list[Tensor]) -> None:
    for a, g in zip(inputs, grads, strict=True):
        torch.mm(g.square().T, a.square())


def _grams(inputs: list[Tensor], grads: list[Tensor]) -> None:
    for a, g in zip(inputs, grads, strict=True):
        hf.ops.gram(a, ones_column=True)
        hf.ops.gram(g)


def rows() -> Iterator[Row]:
    """The figures, each with a model of its own."""
    for what, work in (
        ("MLP 784-512-10, N=256", make(WORKLOADS[0], "cpu", False, 256)),
        ("MLP 784-512-10, N=1024", make(WORKLOADS[0], "cpu", False, 1024)),
        ("MLP 3 x 1024, N=512", _linear([1024] * 4, 512)),
    ):
        yield Row(f"norms, {what}", work, lambda work=work: hf.per_sample_grad_norms(*work))
        yield Row(f"second moment, {what}", work, lambda work=work: hf.grad_second_moment(*work), 1, _squares)
    work = _linear([1024, 1024, 10], 8192)
    yield Row("factors (mc), linear 1024-1024-10, N=8192", work, lambda: hf.KFAC(*work).factors, 1, _grams)
    torch.manual_seed(0)
    image = Workload(
        resnet18().eval(), nn.CrossEntropyLoss(), (torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,)))
    )
    yield Row("factors (type-2), ResNet-18, N=64", image, lambda: hf.KFAC(*image, fisher_type="type-2").factors, 9)


def needed(row: Row) -> None:
    """The forward pass, the backward passes to layers' outputs, and the products."""
    model, loss, (x, y) = row.work
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    inputs, outputs = [], []

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        inputs.append(args[0].detach())
        outputs.append(output)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    value = loss(model(x), y)
    for handle in handles:
        handle.remove()
    for left in reversed(range(row.passes)):
        grads = torch.autograd.grad(value, outputs, retain_graph=left > 0)
    if row.products is not None:
        row.products(inputs, list(grads))


def gradient(row: Row) -> None:
    model, loss, (x, y) = row.work
    torch.autograd.grad(loss(model(x), y), list(model.parameters()))


def products(n: int, d: int, pace: Pace) -> str:
    """How fast `gram` and torch's products multiply: all but torch's in float32 run on AMX, where there is AMX."""
    x = torch.randn(n, d)
    half, own, full, theirs = (
        x.bfloat16(),
        torch.empty(d, d),
        torch.empty(d, d),
        torch.empty(d, d, dtype=torch.bfloat16),
    )
    calls = {
        "float32": lambda: torch.mm(x.T, x, out=full),
        "torch": lambda: torch.mm(half.T, half, out=theirs),
        "bf16": lambda: hf.ops.gram(half, out=own),
        "bf16x3": lambda: hf.ops.gram(x, out=own),
    }
    outcome = hold({name: (lambda call=call: call) for name, call in calls.items()}, lambda name, result: None, pace)
    triangle = n * d * (d + 1)
    flops = {"float32": 2 * n * d * d, "torch": 2 * n * d * d, "bf16": triangle, "bf16x3": 3 * triangle}
    rates = {name: flops[name] / outcome.median(name) / 1e12 for name in calls}
    return (
        f"| N={n}, {d} features | {rates['bf16x3']:.2f} | {rates['bf16']:.2f} | {rates['torch']:.2f} "
        f"| {rates['float32']:.2f} | {rates['bf16x3'] / 3 / rates['float32']:.2f}x | {rates['bf16'] / rates['torch']:.2f}x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each contestant of a row (default 0.5)")
    pace = Pace(rounds=5, most=40, seconds=parser.parse_args().seconds, warmup=0.3)
    print("| figure | ours, ms | in gradients | what it cannot do without, in gradients |\n|---|---|---|---|")
    for row in rows():
        calls = {"ours": row.call, "needed": lambda row=row: needed(row), "gradient": lambda row=row: gradient(row)}
        outcome = hold(
            {name: (lambda call=call: call) for name, call in calls.items()}, lambda name, result: None, pace
        )
        ours, least = (1 / outcome.ratio(name, "gradient") for name in ("ours", "needed"))
        print(f"| {row.name} | {1e3 * outcome.median('ours'):.1f} | {ours:.2f} | {least:.2f} |", flush=True)
    print(
        "\nTFLOP/s of `gram`'s own products (a triangle; three for bf16x3) and of torch's (a square), what a square in bf16x3 "
        "at gram's rate gains over torch's in float32, and gram's rate on bfloat16 data over torch's:\n"
    )
    print("| X | bf16x3 | bfloat16 data | torch, bfloat16 | torch, float32 | a square gains | over torch's |")
    print("|---|---|---|---|---|---|---|")
    for n, d in ((8192, 1024), (8192, 2048), (4096, 4096)):
        print(products(n, d, pace), flush=True)


if __name__ == "__main__":
    main()
