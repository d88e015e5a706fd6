"""Dense float64 truth beside every library: `python -m bench.proof [--out docs/proof.md]`.

Each case is a network so small that plain autograd has the whole matrix, and of a kind for which K-FAC is no approximation:
all samples that count have the input x or -x in an odd network (a a' is the same for both, their outputs are not), or there
is one sample and one pixel, or the network is linear under a squared error. What then differs is an error, not an
approximation.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import hvpfast as hf
from bench import proof_peers
from bench.contest import Unfit

DRAWS = 40_000  # samples of the Monte-Carlo rows; their noise is below 2 %
NOISE = 0.02
EXACT = 1e-6  # a relative error above this is wrong in float64


@dataclass(frozen=True)
class Case:
    """One model, loss and data set, and what is asked of it.

    Attributes:
        quantity: "K-FAC", "K-FAC, drawn labels", "GGN", "Hessian" or "gradient norms". batches: one or more.
    """

    name: str
    quantity: str
    model: nn.Module
    loss: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    approx: str = "expand"

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.cat(parts) for parts in zip(*self.batches, strict=True))

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())


class Twice(nn.Module):
    """One Linear, called on both halves of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.shared(x[:, 0]), self.shared(x[:, 1])], 1)


class Tied(nn.Module):
    """Two Linears of one weight, on the two halves of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.first(x[:, 0]), self.second(x[:, 1])], 1)


def _odd() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False))


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


def _convolution(channels: int, features: int, side: int, **options: object) -> nn.Module:
    """A convolution with one output pixel, and a head."""
    first = nn.Conv2d(channels, features, **options)
    assert first(torch.zeros(1, channels, side, side)).shape[2:].numel() == 1
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3))


def cases() -> list[Case]:
    """All of them, seeded, float64."""
    torch.manual_seed(0)
    f64 = {"dtype": torch.float64}
    n, weight = 8, torch.tensor([0.2, 3.0, 1.0, 0.5], **f64)
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 1.0], **f64)[:, None]
    x, y = torch.randn(1, 5, **f64) * signs * 2, torch.arange(n) % 4
    some, strange = y.clone(), x.clone()
    some[[1, 2, 6]] = -100
    strange[[1, 2, 6]] = torch.randn(3, 5, **f64)
    many, labels = x.repeat(DRAWS // n, 1), y.repeat(DRAWS // n)
    multi = torch.randint(0, 2, (n, 4), generator=torch.Generator().manual_seed(1)).to(**f64)
    plain, plain_multi, ce = [(x, y)], [(x, multi)], nn.CrossEntropyLoss
    split = [(strange[:5], some[:5]), (strange[5:], some[5:])]
    varied, pair = torch.randn(n, 5, **f64), torch.randn(n, 2, 4, **f64)
    uneven = [(varied[:5], some[:5]), (varied[5:], some[5:])]
    linear = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))
    normed = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    one, sums = torch.tensor([1]), torch.randn(n, 2, 3, **f64)

    def image(c: int, side: int) -> list[tuple[Tensor, Tensor]]:
        return [(torch.randn(1, c, side, side, **f64), one)]

    pictures = [(torch.randn(n, 4, 6, 6, **f64), y % 3)]

    def convolutions(**options: object) -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 6, 3, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))

    listed = [
        Case("cross-entropy, one sample", "K-FAC", _network(), ce(), [(varied[:1], one)]),
        Case("cross-entropy", "K-FAC", _odd(), ce(), plain),
        Case("cross-entropy, sum", "K-FAC", _odd(), ce(reduction="sum"), plain),
        Case("two unequal batches", "K-FAC", _odd(), ce(), [(x[:6], y[:6]), (x[6:], y[6:])]),
        Case("ignore_index", "K-FAC", _odd(), ce(), [(strange, some)]),
        Case("ignore_index, two batches", "K-FAC", _odd(), ce(), split),
        Case("label smoothing", "K-FAC", _odd(), ce(label_smoothing=0.2), plain),
        Case("class weights", "K-FAC", _odd(), ce(weight=weight), plain),
        Case("class weights, sum", "K-FAC", _odd(), ce(weight=weight, reduction="sum"), plain),
        Case("class weights and ignore_index", "K-FAC", _odd(), ce(weight=weight), [(strange, some)]),
        Case("cross-entropy", "K-FAC, drawn labels", _odd(), ce(), [(many, labels)]),
        Case("label smoothing", "K-FAC, drawn labels", _odd(), ce(label_smoothing=0.2), [(many, labels)]),
        Case("class weights", "K-FAC, drawn labels", _odd(), ce(weight=weight), [(many, labels)]),
        Case("squared error, linear network", "K-FAC", linear, nn.MSELoss(), [(varied, varied[:, :4] * 2)]),
        Case("BCE with pos_weight", "K-FAC", _odd(), nn.BCEWithLogitsLoss(pos_weight=weight), plain_multi),
        Case("convolution", "K-FAC", _convolution(4, 6, 3, kernel_size=3), ce(), image(4, 3)),
        Case("dilated convolution", "K-FAC", _convolution(4, 6, 5, kernel_size=3, dilation=2), ce(), image(4, 5)),
        Case("grouped convolution", "K-FAC", _convolution(4, 6, 3, kernel_size=3, groups=2), ce(), image(4, 3)),
        Case("depthwise convolution", "K-FAC", _convolution(4, 4, 3, kernel_size=3, groups=4), ce(), image(4, 3)),
        Case("padding='same', even kernel", "K-FAC", _convolution(3, 4, 1, kernel_size=4, padding="same"), ce(), image(3, 1)),
        Case("Linear over positions", "K-FAC", nn.Sequential(nn.Linear(4, 3)), nn.MSELoss(), [(pair, sums)]),
        Case("a module called twice", "K-FAC", Twice(), nn.MSELoss(), [(pair, sums)]),
        Case("two layers of one weight", "K-FAC", Tied(), nn.MSELoss(), [(pair, sums)]),
        Case("two unequal batches", "GGN", _network(), ce(), [(varied[:6], y[:6]), (varied[6:], y[6:])]),
        Case("ignore_index, two batches", "GGN", _network(), ce(), uneven),
        Case("class weights, two batches", "GGN", _network(), ce(weight=weight), [(varied[:5], y[:5]), (varied[5:], y[5:])]),
        Case("two unequal batches", "Hessian", _network(), ce(), [(varied[:6], y[:6]), (varied[6:], y[6:])]),
        Case("ignore_index, two batches", "Hessian", _network(), ce(), uneven),
        Case("convolution", "gradient norms", convolutions(), ce(), pictures),
        Case("dilated convolution", "gradient norms", convolutions(dilation=2), ce(), pictures),
        Case("grouped convolution", "gradient norms", convolutions(groups=2), ce(), pictures),
        Case("class weights, sum", "gradient norms", _network(), ce(weight=weight, reduction="sum"), [(varied, y)]),
        Case("LayerNorm", "gradient norms", normed, ce(), [(varied, y)]),
        Case("two layers of one weight", "gradient norms", Tied(), nn.MSELoss(), [(pair, sums)]),
    ]  # fmt: skip
    for case in listed:
        case.model.double()(case.batches[0][0])  # a lazy layer takes its shape
        if isinstance(case.model, Tied):
            case.model.second.weight = case.model.first.weight
    return listed


# Truth ------------------------------------------------------------------------------------------------------------------


def _flat_grads(value: Tensor, params: Sequence[Tensor], **options: object) -> Tensor:
    grads = torch.autograd.grad(value, params, materialize_grads=True, **options)
    return torch.cat([grad.reshape(-1) for grad in grads])


def truth(case: Case, empirical: bool = False) -> Tensor:
    """By plain autograd, all data as one batch: (P, P), or the norms (N,) of the gradients of each sample's own loss.

    `empirical`: of the gradients at the data's own targets, for one sample.
    """
    (x, y), params = case.whole, case.params
    if case.quantity == "K-FAC, drawn labels":  # its expectation; the eight inputs repeat
        x, y = x[:8], y[:8]
    if case.quantity == "gradient norms":
        return torch.stack(
            [_flat_grads(case.loss(case.model(x[i : i + 1]), y[i : i + 1]), params).norm() for i in range(len(x))]
        )
    output = case.model(x)
    if empirical:
        g = _flat_grads(case.loss(output, y), params)
        return torch.outer(g, g)
    if case.quantity == "Hessian":
        slopes = _flat_grads(case.loss(output, y), params, create_graph=True)
        return torch.stack([_flat_grads(s, params, retain_graph=True) for s in slopes])
    jacobian = torch.stack([_flat_grads(f, params, retain_graph=True) for f in output.reshape(-1)])
    middle = torch.autograd.functional.hessian(lambda f: case.loss(f, y), output.detach())
    return jacobian.T @ middle.reshape(output.numel(), -1) @ jacobian


def ours(case: Case) -> Tensor:
    data, model = case.batches, case.model
    if case.quantity.startswith("K-FAC"):
        kind = "type-2" if case.quantity == "K-FAC" else "mc"
        return hf.KFAC(model, case.loss, data, fisher_type=kind, kfac_approx=case.approx).to_dense()
    if case.quantity == "gradient norms":
        return hf.per_sample_grad_norms(model, case.loss, data[0])
    return getattr(hf, case.quantity)(model, case.loss, data).to_dense()


def compared(case: Case) -> Tensor | None:
    """(P, P) bool, what of a matrix is compared: of K-FAC each parameter's own block, and within it each group's own, since
    that is what every library's factors describe (some keep weight and bias apart); None for everything."""
    if not case.quantity.startswith("K-FAC"):
        return None
    owner, count = [], 0
    convolutions = {id(m.weight): m.groups for m in case.model.modules() if isinstance(m, nn.Conv2d)}
    convolutions |= {id(m.bias): m.groups for m in case.model.modules() if isinstance(m, nn.Conv2d)}
    for p in case.params:
        groups = convolutions.get(id(p), 1)
        owner.append(count + torch.arange(groups).repeat_interleave(p.numel() // groups))
        count += groups
    ids = torch.cat(owner)
    return ids[:, None] == ids[None, :]


class Shape(Exception):
    """The factors describe a matrix of another shape."""


def error(case: Case, value: Tensor, exact: Tensor) -> float:
    """Relative, Frobenius. Raises `Shape` where the shapes differ."""
    if value.shape != exact.shape:
        raise Shape
    mask = compared(case)
    if mask is not None:
        value, exact = value * mask, exact * mask
    return float((value.detach() - exact).norm() / exact.norm())


# The table --------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What each library gave: a relative error, or a word."""

    case: Case
    norm: float
    entries: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def entry(case: Case, relative: float) -> str:
    drawn = case.quantity.endswith("drawn labels")
    wrong = relative > (NOISE if drawn else EXACT)
    text = f"{relative:.1%}" if drawn or relative > 1e-3 else f"{relative:.0e}"
    return f"**{text}**" if wrong else text


def run(peers: dict[str, Callable[[Case], Tensor]]) -> list[Row]:
    rows = []
    for case in cases():
        exact = truth(case)
        row = Row(case, float(exact.norm()), {"hvpfast": entry(case, error(case, ours(case), exact))})
        for name, function in peers.items():
            mine = copy.deepcopy(case)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    value = function(mine)
                reference = truth(case, empirical=True) if name in proof_peers.EMPIRICAL else exact
                row.entries[name] = entry(case, error(case, value, reference))
            except Unfit:
                row.entries[name] = "n/a"
            except proof_peers.Absent:
                row.entries[name] = "**absent**"
            except Shape:
                row.entries[name] = "**wrong shape**"
            except Exception as failure:  # whatever a peer raises is its answer
                row.entries[name] = f"raises {type(failure).__name__}"
                row.reasons[name] = str(failure)
        rows.append(row)
    return rows


INTRODUCTION = """# Proof

Every number is a relative error (Frobenius) against the dense float64 matrix that plain autograd gives for the whole data
set. In every K-FAC row K-FAC equals the matrix in theory (samples that count have the input x or -x in an odd network, or
there is one sample and one output pixel, or the network is linear under a squared error), so an error is an error and not
the approximation's.

- **bold**: a number was returned and it is wrong, or factors of a shape that is not the parameter's (*wrong shape*), or
  some parameters were left without a result, without an error (*absent*). *raises*: the library refused, which is honest.
  *n/a*: its interface has no place for the case (it takes no loss, one batch only, or does not compute the quantity).
  Warnings and remarks in docstrings are not counted.
- Each library is used as its documentation says, at its own scale: what it returns is multiplied by the factor between its
  convention (a sum, a mean, unit variance) and the loss's, which is known beforehand, before it is compared. Compared are
  each parameter's own block and each group's own block, which all of them describe.
- kfac-pytorch computes the empirical Fisher only; it is held against that, of one sample.
- "K-FAC, drawn labels" is the Monte-Carlo Fisher of {draws} samples: up to 2 % is noise.

`python -m bench.proof --out docs/proof.md`, {date}: {versions}.
"""


def markdown(rows: list[Row], names: Sequence[str]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in proof_peers.versions().items())
    date = datetime.date.today().isoformat()
    lines = [INTRODUCTION.format(draws=DRAWS, date=date, versions=versions)]
    lines.append("| quantity | case | norm of the truth | " + " | ".join(names) + " |")
    lines.append("|" + "---|" * (3 + len(names)))
    for row in rows:
        cells = (row.case.quantity, row.case.name, f"{row.norm:.4g}", *(row.entries[name] for name in names))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def elsewhere(label: str, path: str) -> dict[str, Callable[[Case], Tensor]]:
    """Another version of curvlinops, by its checkout: asked in a process of its own, case after case as here."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", "-m", "bench.proof", "--values", "curvlinops"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    answers = iter(torch.load(io.BytesIO(done.stdout), weights_only=True))

    def answer(case: Case) -> Tensor:
        value = next(answers)
        if isinstance(value, Tensor):
            return value
        if value == "Unfit":
            raise Unfit(value)
        raise type(value, (Exception,), {})

    return {label: answer}


def values(name: str) -> list[Tensor | str]:
    """Of every case, what one library returns, or the name of what it raises."""
    found: list[Tensor | str] = []
    for case in cases():
        try:
            found.append(proof_peers.FUNCTIONS[name][1](case).detach().contiguous())
        except Exception as failure:
            found.append(type(failure).__name__)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.proof", description="Dense truth beside every library.")
    parser.add_argument("--out", type=Path, help="write the page there too")
    parser.add_argument("--alone", action="store_true", help="hvpfast only")
    parser.add_argument("--also", metavar="LABEL=PATH", help="another version of curvlinops: a checkout")
    parser.add_argument("--values", metavar="NAME", help="only what this library returns, as torch.save writes it")
    arguments = parser.parse_args(argv)
    torch.set_default_dtype(torch.float64)
    if arguments.values:
        torch.save(values(arguments.values), sys.stdout.buffer)
        return 0
    peers = {} if arguments.alone else proof_peers.installed()
    if arguments.also:
        label, _, path = arguments.also.partition("=")
        peers = {**dict(list(peers.items())[:1]), **elsewhere(label, path), **dict(list(peers.items())[1:])}
    rows = run(peers)
    page = markdown(rows, ["hvpfast", *peers])
    print(page)
    if arguments.out is not None:
        arguments.out.write_text(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
