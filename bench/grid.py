"""gram over a grid of sizes, layouts and dtypes, against torch's product: `python -m bench.grid` prints the worst cells.

Without `out` the rival is `torch.mm`, with it `torch.mm(out=)`; a 16-bit result of torch's is not widened. A whole call is
timed, the choice of a backend included, in alternating rounds.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from bench.contest import Pace, hold
from hvpfast import ops

FEATURES = (8, 16, 33, 64, 128, 256, 512, 1024, 2048, 4608)
ROWS = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
LAYOUTS = ("contiguous", "strided", "transposed")
MOST = 1 << 37  # flop of the largest cell


def data(n: int, d: int, dtype: torch.dtype, layout: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if layout == "transposed":
        return torch.randn(d, n, generator=generator).to(dtype).T
    x = torch.randn(n, d, generator=generator).to(dtype)
    return torch.cat([x, x], 1)[:, :d] if layout == "strided" else x


def cell(x: Tensor, with_out: bool, pace: Pace) -> tuple[float, str]:
    """(how many times as fast as torch, which backend ran)."""
    d = x.shape[1]
    own, theirs = torch.empty(d, d), torch.empty(d, d, dtype=x.dtype)
    if with_out:
        calls = {"torch": lambda: torch.mm(x.T, x, out=theirs), "hvpfast": lambda: ops.gram(x, out=own)}
    else:
        calls = {"torch": lambda: torch.mm(x.T, x), "hvpfast": lambda: ops.gram(x)}

    def check(name: str, result: Tensor) -> None:
        truth = (x.double().T @ x.double()) if x.numel() < 1 << 20 else torch.mm(x.T, x).double()
        error = float((result.double() - truth).norm() / truth.norm())
        assert error < (1e-5 if x.dtype is torch.float32 else 1e-2), f"{name}: relative error {error:.1e}"

    outcome = hold({name: (lambda call=call: call) for name, call in calls.items()}, check, pace)
    assert not outcome.wrong, outcome.wrong
    return outcome.ratio("hvpfast", "torch"), ops.gram.choose(x, out=own if with_out else None).backend


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.grid", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.02, help="for each contestant of a cell (default 0.02)")
    parser.add_argument("--worst", type=int, default=20, help="how many cells to print (default 20)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layout", choices=LAYOUTS, nargs="*", default=list(LAYOUTS))
    args = parser.parse_args()
    pace = Pace(rounds=7, most=60, seconds=args.seconds, warmup=args.seconds / 2, block=0.0005)
    found = []
    for layout in args.layout:
        for d in FEATURES:
            for n in (n for n in ROWS if 2 * n * d * d <= MOST):
                x = data(n, d, getattr(torch, args.dtype), layout)
                for with_out in (False, True):
                    ratio, backend = cell(x, with_out, pace)
                    found.append((ratio, f"N={n} d={d} {layout}{' out=' if with_out else ''}", backend))
    found.sort()
    print(
        f"{args.dtype}, {torch.get_num_threads()} threads, {len(found)} cells, median ratio "
        f"{statistics.median(ratio for ratio, _, _ in found):.2f}, below 0.95: {sum(r < 0.95 for r, _, _ in found)}"
    )
    for ratio, name, backend in found[: args.worst]:
        print(f"{ratio:6.2f}x  {name}  ({backend})")


if __name__ == "__main__":
    main()
