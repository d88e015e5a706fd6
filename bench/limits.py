"""What the figures that fall short of their aims are bound by: `python -m bench.limits`.

Of models each row times ours, one plain gradient, and what ours cannot do without, written in plain torch: the model's forward
pass, the backward passes to layers' outputs (no weight's gradient), and the products that the result is made of.

Of ops each row times ours and torch's formulations, and asks how long the op's products take at the machine's best rate, and its
tensors to be moved once, as `sum` reads them: torch's time over the longer of the two is the most there is to gain.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hvpfast as hf
from bench import cases
from bench.bench_ops import compete
from bench.contest import Outcome, Pace, hold
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


def products(n: int, d: int, pace: Pace) -> tuple[Outcome, str]:
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
    return outcome, (
        f"| N={n}, {d} features | {rates['bf16x3']:.2f} | {rates['bf16']:.2f} | {rates['torch']:.2f} "
        f"| {rates['float32']:.2f} | {rates['bf16x3'] / 3 / rates['float32']:.2f}x | {rates['bf16'] / rates['torch']:.2f}x |"
    )


class Rates(NamedTuple):
    """What the machine does: flops a second of products in float32 (torch's) and in bf16x3 (three products as one; gram's), bytes
    a second that are read from memory and from caches."""

    ieee: float
    bf16x3: float
    memory: float
    caches: float

    def least(self, row: cases.Row, mode: str) -> float:
        """Seconds that the products take, or the tensors to be moved once."""
        flops, moved = cases.work(row)
        if row.op == "conv_gram":
            flops = _offset_flops(row)
        return max(flops / getattr(self, mode), moved / (self.caches if moved < 1 << 23 else self.memory))


def _offset_flops(row: cases.Row) -> int:
    """Of the blocks (u, v) of a convolution's Gram matrix that differ: by v - u and u modulo the stride; (v, u) is its image."""
    stride, padding, dilation, groups = row.options
    along = ((row.side + 2 * padding - dilation * (row.kernel - 1) - 1) // stride + 1) ** row.axes
    places = list(itertools.product(range(row.kernel), repeat=row.axes))

    def kind(u: tuple[int, ...], v: tuple[int, ...]) -> tuple:
        return tuple((y - x, x * dilation % stride) for x, y in zip(u, v, strict=True))

    kinds = {min(kind(u, v), kind(v, u)): u == v for u in places for v in places}
    channels = row.i // groups
    whole = 2 * groups * row.n * along * channels**2
    return sum(whole // 2 if diagonal else whole for diagonal in kinds.values())


def rates(outcomes: dict[tuple[int, int], Outcome], pace: Pace) -> Rates:
    far, near = torch.randn(1 << 26), torch.randn(1 << 20)
    read = hold({"far": lambda: far.sum, "near": lambda: near.sum}, lambda name, result: None, pace)
    best = {
        name: max(2 * n * d * d / outcome.median(name) for (n, d), outcome in outcomes.items())
        for name in ("float32", "bf16x3")
    }
    return Rates(
        best["float32"],
        best["bf16x3"] / 2,
        4 * far.numel() / read.median("far"),
        4 * near.numel() / read.median("near"),
    )


_SHORT = (  # whose aims are missed, by op and size
    *("sample_norms_squared N=128 T=64", "sample_norms_squared N=16 T=128", "sample_norms_squared N=64 T=16"),
    *("sample_norms_squared N=128 T=1024", "sample_norms_squared N=8 T=2048", "sample_norms_squared N=512 T=1"),
    *("second_moment N=16 T=128", "second_moment N=512 T=1", "second_moment N=256 T=1", "second_moment N=128 T=1024"),
    *("sample_gram N=512 T=1", "sample_gram N=256 T=1"),
    *("conv_gram N=128 C=64 32x32 kernel 3 stride 2", "conv_gram N=64 C=128 16x16 kernel 3 stride 2"),
    "conv_gram N=64 C=256 8x8 kernel 3 stride 2",
)


def short(row: cases.Row, machine: Rates, pace: Pace) -> Iterator[str]:
    outcome = compete(row, "cpu", pace)
    rival = outcome.fastest([name for name in outcome.times if not name.startswith("hvpfast")])
    for mode in ("ieee", "bf16x3"):
        name = f"hvpfast cpu {mode}"
        if name in outcome.times:
            most = outcome.median(rival) / machine.least(row, mode)
            label = row.name.removesuffix(" float32")
            yield f"| {label} | {mode} | {1e3 * outcome.median(name):.2f} | {outcome.ratio(name, rival):.2f}x | {most:.2f}x |"


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
    outcomes = {}
    for n, d in ((8192, 1024), (8192, 2048), (4096, 4096)):
        outcomes[n, d], line = products(n, d, pace)
        print(line, flush=True)
    machine = rates(outcomes, pace)
    print(
        f"\nOps against torch's fastest formulation, and the most there is to gain over it: {machine.ieee / 1e9:.0f} GFLOP/s in "
        f"float32, {machine.bf16x3 / 1e9:.0f} in bf16x3, {machine.memory / 1e9:.0f} GB/s from memory, {machine.caches / 1e9:.0f} "
        f"from caches.\n\n| op | precision | ours, ms | against torch | the most |\n|---|---|---|---|---|"
    )
    for row in cases.ROWS:
        if row.dtype is torch.float32 and row.name.startswith(_SHORT):
            for line in short(row, machine, pace):
                print(line, flush=True)


if __name__ == "__main__":
    main()
