"""Sums over batches and columns that become the factors of a block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hvpfast import heap, ops
from hvpfast.capture import kronecker
from hvpfast.capture.layers import Normal
from hvpfast.capture.problem import Problem
from hvpfast.capture.sites import Site
from hvpfast.capture.units import Layout, Unit
from hvpfast.operators.factor import Dense, Diagonal, Factor, Thin
from hvpfast.operators.sweep import Run
from hvpfast.ops.shared import add_rows, mirror_lower

# Features beyond which a factor is kept as its diagonal: a language model's vocabulary would need terabytes.
LARGEST_FACTOR = 16384
# Numbers up to which the block of a norm layer, or of parameters without a rule, is kept whole; its diagonal beyond.
LARGEST_BLOCK = 512
# Features from which a sum of Gram matrices may hold its lower triangle only, and after how many additions: mirroring it in
# the end costs what four of them save (two cores with AVX-512 and AMX, 2026-11-22).
LEAST_LOWER, BOTH_FIRST = 1024, 4


def _whole_first(total: Tensor | None, known: int) -> float:
    """How many additions to a factor write both triangles before they write the lower one; known: additions of a batch."""
    if total is None or total.dim() != 3 or total.shape[-1] < LEAST_LOWER or not _kernel_adds(total):
        return math.inf
    return 0 if known >= 2 * BOTH_FIRST else BOTH_FIRST


def _kernel_adds(total: Tensor) -> bool:
    """Whether a kernel adds to lower triangles: few rows on the reference take up to four times as long so."""
    rows = total.new_empty(256, total.shape[-1])
    return ops.gram.choose(rows, out=total[0], mirror=False).backend != "reference"


class KroneckerSums:
    """A and G of a unit. A is the mean over rows (samples and positions, each counted as the loss counts it), G the sum
    over rows and columns of the loss's own share: where they do not depend on each other, G (x) A is the block.

    Args:
        single: whether there is one batch only, so that few rows may stand for their Gram matrix.
    """

    def __init__(self, unit: Unit, run: Run, approx: str, single: bool, dtype: torch.dtype, device: torch.device):
        self.unit, self.layout, self.approx = unit, unit.layout, approx
        self.weight, self.ones = self.layout.weight is not None, self.layout.bias is not None
        self._totals = [
            None if thin else (torch.empty if len(shape) == 3 else torch.zeros)(shape, dtype=dtype, device=device)
            for shape, thin in self._shapes(unit, run, approx, single)
        ]
        self._added, self._lower = [0, 0], [False, False]  # additions; whether one wrote the lower triangle only
        known = len(unit.calls), len(unit.calls) * run.columns  # additions of a batch
        self._whole_first = [_whole_first(*pair) for pair in zip(self._totals, known, strict=True)]
        # What a single batch is divided by, at once: rows are kept of no other.
        self._whole = (run.total, run.weight) if single else (1.0, 1.0)
        self._single = single
        self._rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._column: Tensor | None = None
        self.reached = False

    @staticmethod
    def _shapes(unit: Unit, run: Run, approx: str, single: bool) -> list[tuple[tuple[int, ...], bool]]:
        """Of A and of G: the shape kept, and whether it is rows (B, R, I) that stand for their Gram matrix."""
        layout: Layout = unit.layout
        inputs = outputs = run.rows(unit)
        if approx == "reduce":
            inputs, outputs = run.samples, outputs // len(unit.calls) if run.separate else run.samples
        shapes = []
        for size, many, lookup in (
            (layout.inputs, inputs, layout.kind == "rows"),
            (layout.outputs, outputs * run.columns, False),
        ):
            if lookup or size > LARGEST_FACTOR:
                shapes.append(((layout.groups, size), False))
            elif single and 0 < 2 * many <= size:
                shapes.append(((layout.groups, many, size), True))
            else:
                shapes.append(((layout.groups, size, size), False))
        return shapes

    @classmethod
    def numbers(cls, unit: Unit, run: Run, approx: str, single: bool) -> int:
        """How many numbers the factors hold."""
        return sum(math.prod(shape) for shape, _ in cls._shapes(unit, run, approx, single))

    def add_inputs(self, run: Run) -> None:
        """The inputs of every call in this batch."""
        rows, numbers = run.rows(self.unit), self.unit.calls
        if self.approx == "reduce" and len(numbers) > 1:
            self._add_reduced_inputs(run, rows)
            return
        for number in numbers:
            call = run.tape.calls[number]
            normal, samples = call.kronecker, call.samples
            w, alpha = run.weights(number)
            if self.approx == "reduce":
                if w is not None and w.dim() == 2:
                    w, alpha = w.sum(1), float(samples)
                alpha = alpha / samples
            else:
                alpha = alpha / rows
            self._add_input(normal, samples, w, alpha)

    def _add_input(self, normal, samples: int, w: Tensor | None, alpha: float) -> None:
        total, arguments, alpha = self._totals[0], (self.approx, self.weight, self.ones, w), alpha / self._whole[0]
        if total is None:
            self._rows[0].append(kronecker.input_rows(normal, *arguments, scale=alpha**0.5))
        elif total.dim() == 2:
            kronecker.add_input_squares(total, normal, samples, *arguments, alpha)
        else:
            kronecker.add_input_gram(total, normal, samples, *arguments, alpha, **self._blend(0, normal))

    def _blend(self, side: int, normal: Normal | None = None) -> dict[str, float | bool]:
        """How the next Gram matrix is added: what is added first reads nothing. Those of images are always whole."""
        count, image = self._added[side], normal is not None and normal.image is not None
        mirror = image or count < self._whole_first[side]
        self._added[side] += 1
        self._lower[side] |= not mirror
        return {"beta": float(count > 0), "mirror": mirror}

    def _add_reduced_inputs(self, run: Run, rows: int) -> None:
        """A layer with several calls: the mean over the positions of all."""
        mean: Tensor | None = None
        for number in self.unit.calls:
            call = run.tape.calls[number]
            normal = call.kronecker
            part = kronecker.input_rows(normal, "reduce", self.weight, self.ones, None)
            part = part * (call.samples * normal.positions / rows)
            mean = part if mean is None else mean + part
        w, alpha = run.weights(self.unit.calls[0])
        if w is not None:
            w = w if w.dim() == 1 else w.sum(1)
            mean, alpha = mean * w.to(mean.dtype).sqrt().reshape(1, -1, 1), float(run.samples)
        self._add_rows(0, mean, alpha / run.samples)

    def add_outputs(self, run: Run, number: int, grad: Tensor) -> None:
        """The gradient of one column at one call's output."""
        self.reached = True
        normal = run.tape.calls[number].kronecker
        # Where a column has every position's term, their sum is the gradient of none of them.
        approx = "expand" if run.separate else self.approx
        if self.approx == "reduce" and len(self.unit.calls) > 1:
            rows = kronecker.output_rows(normal, grad, approx)
            self._column = rows if self._column is None else self._column + rows
            return
        total, alpha = self._totals[1], run.weight / self._whole[1]
        if total is None:
            self._add_rows(1, kronecker.output_rows(normal, grad, approx), run.weight)
        elif total.dim() == 2:
            kronecker.add_output_squares(total, normal, grad, approx, alpha)
        else:
            kronecker.add_output_gram(total, normal, grad, approx, alpha, **self._blend(1, normal))

    def end_column(self, run: Run) -> None:
        if self._column is not None:
            self._add_rows(1, self._column, run.weight)
            self._column = None

    def _add_rows(self, side: int, rows: Tensor, alpha: float) -> None:
        """Rows (B, R, size) of the input (0) or output (1) factor."""
        total, alpha = self._totals[side], alpha / self._whole[side]
        if total is None:
            self._rows[side].append(rows * alpha**0.5)
        elif total.dim() == 2:
            total.add_(rows.square().sum(1), alpha=alpha)
        else:
            blend = self._blend(side)
            for one, out in zip(rows, total, strict=True):
                ops.gram(one, out=out, alpha=alpha, **blend)

    def check(self, run: Run) -> None:
        """Raise NonFiniteError if a gradient of this batch was not finite. A Gram matrix is finite where its diagonal is."""
        total = self._totals[1]
        for x in self._rows[1] if total is None else [total.diagonal(dim1=1, dim2=2) if total.dim() == 3 else total]:
            run.require_finite(x, self.unit.name)

    def finish(self, terms: float, weight: float) -> tuple[Factor, Factor]:
        """A over the sum of the terms' shares, G over the batches' total weight."""
        made: list[Factor] = []
        for side, scale in enumerate((1 / terms, 1 / weight)):
            total, rows = self._totals[side], self._rows[side]
            if total is None:
                made.append(Thin(rows[0] if len(rows) == 1 else torch.cat(rows, 1)))
                continue
            if total.dim() == 3 and not self._added[side]:
                total.zero_()
            if self._lower[side]:
                mirror_lower(total)
            made.append((Diagonal if total.dim() == 2 else Dense)(total if self._single else total.mul_(scale)))
        return made[0], made[1]


class RowSums:
    """The block of a norm layer, of a table that is also a Linear's weight, or of parameters that no rule covers: the
    second moment of its rows, whole if small, else its diagonal, for which no rows are made where a rule knows it."""

    def __init__(self, unit: Unit, params: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device):
        self.unit, self._sizes = unit, [params[name].numel() for name in unit.names]
        self.total = torch.zeros(self._shape(sum(self._sizes)), dtype=dtype, device=device)

    @staticmethod
    def _shape(size: int) -> tuple[int, ...]:
        return (size, size) if size <= LARGEST_BLOCK else (size,)

    @classmethod
    def numbers(cls, size: int) -> int:
        """How many numbers the block of `size` parameters holds."""
        return math.prod(cls._shape(size))

    def add(self, sites: Sequence[Site], samples: int, alpha: float) -> None:
        """The rows of each parameter, N = `samples`; those of one that no gradient reaches are zero."""
        if self.total.dim() == 2:
            rows = [
                site.sample_grads().reshape(samples, size) if site.rows else self.total.new_zeros(samples, size)
                for site, size in zip(sites, self._sizes, strict=True)
            ]
            ops.gram(torch.cat(rows, 1), out=self.total, alpha=alpha, beta=1.0)
            return
        for site, part in zip(sites, self.total.split(self._sizes), strict=True):
            if site.rows:
                part.add_(site.second_moment().reshape(-1), alpha=alpha)

    def add_diagonal(self, values: Tensor, alpha: float) -> None:
        """values (p,)"""
        (self.total.diagonal() if self.total.dim() == 2 else self.total).add_(values, alpha=alpha)

    def finish(self, weight: float) -> Tensor:
        return self.total.div_(weight)


def accumulate(
    problem: Problem, runs: Iterable[Run], fisher_type: str, approx: str, single: bool
) -> tuple[list[KroneckerSums], list[RowSums], float, float]:
    """One pass over the data: the sums of every block, what all terms count together, and the batches' total weight.

    `single`: whether few rows may stand for a factor. Raises ValueError for a parameter that no data reach.
    """
    sums, rows = [], []
    dtype, device = ops.accumulate_dtype(problem.space.dtype), problem.space.device
    terms, weights = 0.0, []
    for run in runs:
        if not weights:
            sums = [
                KroneckerSums(unit, run, approx, single, dtype, device) for unit in run.units if unit.layout is not None
            ]
            rows = [RowSums(unit, problem.params, dtype, device) for unit in run.units if unit.layout is None]
        units = {unit.names: unit for unit in run.units}
        for one in (*sums, *rows):
            one.unit = units[one.unit.names]  # the same block; its calls may be others
        terms += run.total
        weights.append(run.weight)
        heap.settle()
        for one in sums:
            one.add_inputs(run)
        read = {number for one in rows for number in one.unit.calls}
        for number in {number for one in sums for number in one.unit.calls} - read if not run.again else ():
            run.tape.calls[number].let_go()
        if fisher_type == "forward-only":
            for one in rows:
                one.add_diagonal(_forward_only(run, one.unit, problem.params), run.total)  # a mean, as A is
        else:
            _pull(run, sums, rows)
    for one in sums:
        if not one.reached and fisher_type != "forward-only":
            raise ValueError(
                f"{problem.who}: no data reach parameter {one.unit.names[0]!r}: the loss does not depend on it, in any batch; "
                f"leave it out with params="
            )
    return sums, rows, terms, problem.batches_total(weights)


def _pull(run: Run, sums: Sequence[KroneckerSums], rows: Sequence[RowSums]) -> None:
    of_call: dict[int, list[KroneckerSums]] = {}
    for one in sums:
        for number in one.unit.calls:
            of_call.setdefault(number, []).append(one)
    of_names = {one.unit.names: one for one in rows}

    def receive(number: int, grad: Tensor) -> None:
        heap.settle()
        for one in of_call[number]:
            one.add_outputs(run, number, grad)

    def receive_sites(unit: Unit, sites: Sequence[Site]) -> None:
        of_names[unit.names].add(sites, run.samples, run.weight)

    def done() -> None:
        for one in sums:
            one.end_column(run)

    run.pull(receive, receive_sites, done)
    for one in sorted((one for one in sums if one.reached), key=lambda one: one.unit.calls, reverse=True):
        one.check(run)  # from the output on: the first that is not finite made the others so


def _forward_only(run: Run, unit: Unit, params: Mapping[str, Tensor]) -> Tensor:
    """(p,): FOOF's G is the identity, so a block is the mean square of what a parameter multiplies, and 1 for a shift; of
    a table (V, D), whether a row is looked up, and the square of what it is multiplied with."""
    values = []
    for name in unit.names:
        p, calls = params[name].detach(), [run.tape.calls[i] for i in unit.calls]
        uses = [call.normal for call in calls if call.weight is params[name]]
        if not uses:
            values.append(torch.ones_like(p).reshape(-1))
            continue
        total, rows = torch.zeros_like(p, dtype=ops.accumulate_dtype(p.dtype)), 0
        for normal in uses:
            a = normal.inputs().flatten(0, 2)  # (R, p), (R, D), or indices (R, 1)
            rows += a.shape[0]
            if normal.kind == "rows":
                a = a if normal.skips is None else a[a[:, 0] != normal.skips]
                add_rows(total, a[:, 0], torch.ones_like(total[:1]).expand(a.shape[0], -1))
            else:
                squares = a.to(total.dtype).square().sum(0)
                total.add_(
                    squares.reshape(p.shape) if normal.kind == "scale" else squares
                )  # (D,) for every row of a table
        values.append(total.div_(rows).reshape(-1))
    return torch.cat(values)
