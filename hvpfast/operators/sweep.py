"""Passes over the data that pull the columns of a Fisher's root back to every layer's output, and keep none of them.

A batch's matrix is `sum_k J' u_k u_k' J`, with J the Jacobian of the model's output and u_k columns shaped like it. One
backward pass a column computes the gradients at layers' outputs alone: no weight's gradient is ever formed.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from hvpfast.autocast import as_the_user_has_it
from hvpfast.capture.data import Batch, batch_size
from hvpfast.capture.errors import NonFiniteError, StateError
from hvpfast.capture.problem import Evaluated, Problem, finite
from hvpfast.capture.pull import Receive, last_calls, pull_back
from hvpfast.capture.rows import pattern_of
from hvpfast.capture.samples import autograd_rows
from hvpfast.capture.site import DenseSite, Site
from hvpfast.capture.sites import site_of
from hvpfast.capture.state import preserved
from hvpfast.capture.statistics_precision import statistics_precision
from hvpfast.capture.tape import Tape, recording
from hvpfast.capture.units import Unit, units_of

FISHER_TYPES = ("type-2", "mc", "empirical", "forward-only", "curvature-propagation")

_DRAWN = ("mc", "curvature-propagation")  # whose random error is larger by far than bf16x3's

_apart: weakref.WeakKeyDictionary[nn.Module, dict[tuple, bool]] = weakref.WeakKeyDictionary()
ReceiveSites = Callable[[Unit, list[Site]], None]  # a unit without a layout, and one column's rows of each parameter


class Run:
    """One batch, run and recorded.

    Attributes:
        units: the diagonal blocks. tape: their calls. samples: N. weight: the batch's share of the total, before the
            division by it; total: the sum of the terms' shares of the mean's denominator. again: whether it is pulled once more,
            so that the layers' inputs must stay, and the graph; of a single column, the gradients in its place. apart: whether
            every position of the output is a term whose gradient stays at that position in every layer; separate: whether one
            column has all of them at once, so that sums over positions would mix terms.
    """

    again = False
    _kept: deque[tuple[int, Tensor]] | None = None

    def __init__(self, sweep: Sweep, tape: Tape, evaluated: Evaluated):
        self._sweep, self.tape, self.batch = sweep, tape, evaluated.batch
        problem = sweep.problem
        self._output = problem.output_tensor(evaluated.output)
        self.samples = n = batch_size(self.batch.inputs)
        if self._output.shape[0] % max(1, n):
            n = self.samples = self._output.shape[0]
        self.weight = 1.0 if problem.loss.reduction == "sum" else evaluated.weight
        tensors = list(problem.params.values())
        self._covered = tape.covered(self._output, tensors, n, folded=not sweep.by_sample)
        if sweep.covered:  # a layer that had no rule in the first batch has none in the others: of one sample any has
            self._covered = [own and before for own, before in zip(self._covered, sweep.covered, strict=True)]
        sweep.covered = self._covered
        self.units = units_of(tape, problem.space.names, tensors, self._covered)
        self._last = last_calls(tape, self._output)
        self._terms_of_the_loss(evaluated.batch)

    def _terms_of_the_loss(self, batch: Batch) -> None:
        loss, f, n = self._sweep.problem.loss, self._output.detach(), self.samples
        self._axis = 1
        if loss.elementwise and f.dim() > 2:
            channels_first = bool(self.tape.calls) and self.tape.calls[-1].normal.image is not None
            self._axis = 1 if channels_first else f.dim() - 1
        terms = loss.terms(f, batch.target, self._axis).reshape(n, -1)
        self.total, self._positions = float(terms.sum()), terms.shape[1]
        self._terms = None if bool((terms == terms[0, 0]).all()) else terms
        # What autograd gives row by row would sum over positions, whatever else is known of the layers.
        self.apart = self._positions > 1 and all(self._covered) and self._known_apart()
        self.separate = self.apart

    def weights(self, number: int) -> tuple[Tensor | None, float]:
        """What each row of a call's input counts, (S,) or (S, T) for S rows, and the factor to all, still without the number
        of rows that the unit has in all its calls. None: all count the same, or are taken to, where rows are not in the
        order of the samples (time first)."""
        call = self.tape.calls[number]
        s, t, n = call.samples, call.kronecker.positions, self.samples
        if self._terms is None or s % n or number in self.tape.rows.scattered:
            return None, self.total
        if self.apart and s * t == n * self._positions:
            by_position = self._terms.reshape(s, t)
            return (by_position if t > 1 else by_position[:, 0]), float(s * t)
        return self._terms.sum(1).repeat_interleave(s // n), float(n)

    def rows(self, unit: Unit) -> int:
        """Rows of a unit's input in all its calls: samples times positions."""
        return sum(self.tape.calls[i].samples * self.tape.calls[i].kronecker.positions for i in unit.calls)

    @property
    def columns(self) -> int:
        """How many backward passes `pull` makes."""
        kind, f, apart = self._sweep.fisher_type, self._output, self._positions == 1 or self.apart
        if kind == "type-2" and self._sweep.problem.loss.joint:
            return f[0].numel() * (1 if apart else f.shape[0] // max(1, self.samples))
        if kind == "type-2":
            return self._sweep.problem.loss.rank(f.shape[self._axis] if f.dim() > 1 else 1) * (
                1 if apart else self._positions
            )
        if kind == "empirical":
            return 1 if apart else self._positions
        return 0 if kind == "forward-only" else self._sweep.mc_samples

    def pull(
        self, receive: Receive, receive_sites: ReceiveSites | None = None, done: Callable[[], None] | None = None
    ) -> None:
        """Run every column back; each gradient is handed over as it arrives, and may be dropped; `done` ends a column.

        Gradients that `receive` gets may hold NaN or inf: whoever sums them has less to look at (`require_finite`).
        """
        if self._kept is not None and receive_sites is None:
            while self._kept:
                receive(*self._kept.popleft())
            if done is not None:
                done()
            return
        for call in self.tape.calls:
            call.check()
        needed = {i for unit in self.units if unit.layout is not None for i in unit.calls}
        scales = [unit for unit in self.units if unit.layout is None and unit.own]
        rest = [unit for unit in self.units if unit.layout is None and not unit.own]
        columns = self._columns()
        u, following = next(columns, None), next(columns, None)
        keep = self.again and u is not None and following is None
        if keep:
            self._kept = deque()
        while u is not None:
            sites: dict[tuple[str, ...], list[Site]] = {}
            if receive_sites is not None and rest:
                with self._refusing_changes():
                    sites = self._by_autograd(rest, u)
            kept: dict[int, Tensor] = {}

            def arrived(number: int, grad: Tensor, kept: dict[int, Tensor] = kept) -> None:
                if number in needed:
                    receive(number, grad)
                    if keep:
                        self._kept.append((number, grad))
                if receive_sites is not None and any(number in unit.calls for unit in scales):
                    self.require_finite(grad, self.tape.calls[number].name)
                    kept[number] = grad

            self._backward(u, arrived, retain=following is not None or (self.again and not keep))
            if receive_sites is not None:
                for unit in scales:
                    receive_sites(unit, self._by_rule(unit, kept))
                for unit in rest:
                    receive_sites(unit, sites[unit.names])
            if done is not None:
                done()
            u, following = following, next(columns, None)

    def require_finite(self, x: Tensor, layer: str) -> None:
        """Of gradients at a layer's output, or of what is finite where they are: a sum of their squares."""
        if not finite(x):
            who, batch = self._sweep.problem.who, self.batch.index
            raise NonFiniteError(
                f"{who}: batch {batch}: the gradient at the output of layer {layer!r} has NaN or inf, or its square does"
            )

    # Columns ---------------------------------------------------------------------------------------------------------

    def _columns(self) -> Iterator[Tensor]:
        sweep, f, target = self._sweep, self._output.detach(), self.batch.target
        loss, kind, k = sweep.problem.loss, sweep.fisher_type, sweep.mc_samples
        seed = (sweep.seed * 1_000_003 + self.batch.index) % (1 << 63)
        generator = torch.Generator().manual_seed(seed)
        if kind == "mc":
            for _ in range(k):
                yield loss.draw(f, target, 1, generator)[0].detach() / math.sqrt(k)
        elif kind == "curvature-propagation":
            root = loss.root(f, target)
            for _ in range(k):
                signs = torch.randint(0, 2, f.shape, generator=generator).to(f.device, f.dtype).mul_(2).sub_(1)
                yield root(signs).detach() / math.sqrt(k)
        elif kind == "empirical":
            yield from self._by_position(self._own_gradient(f, target))
        elif kind == "type-2":
            if loss.joint:
                root = loss.root(f, target)
                for z in torch.eye(f[0].numel(), dtype=f.dtype, device=f.device):
                    yield from self._by_row(root(z.view(1, *f.shape[1:]).expand_as(f)).detach())
                return
            for u in loss.columns(f, target, self._axis):
                yield from self._by_position(u)

    def _own_gradient(self, f: Tensor, target: object) -> Tensor:
        """Gradients of the terms at the data's own targets, times the root of their shares of the loss."""
        loss = self._sweep.problem.loss
        leaf = f.requires_grad_(True)
        with torch.enable_grad():
            with as_the_user_has_it():
                losses = loss.sample_losses(leaf, target)
            (u,) = torch.autograd.grad(losses.sum(), leaf)
        if loss.reduction == "sum":
            return u.detach()
        d = loss.terms(f.detach(), target, self._axis).to(f.dtype)  # (R, positions of an output row)
        scale = d.sum(1, keepdim=True) / (torch.where(d > 0, d, torch.ones_like(d)) * d.sum()).sqrt()
        scale = torch.where(d > 0, scale, torch.zeros_like(d)).reshape(self.samples, -1, 1)
        return self._from_terms(self._as_terms(u.detach()) * scale)

    def _by_position(self, u: Tensor) -> Iterator[Tensor]:
        """The column, or where positions meet inside the model, one column a position: their cross terms are not S's."""
        if self._positions == 1 or self.apart:
            yield u
            return
        terms = self._as_terms(u)
        for t in range(self._positions):
            one = torch.zeros_like(terms)
            one[:, t] = terms[:, t]
            yield self._from_terms(one)

    def _by_row(self, u: Tensor) -> Iterator[Tensor]:
        """The same for a loss with one term a row of the output, of which a sample may have several."""
        per = u.shape[0] // max(1, self.samples)
        if per <= 1 or self.apart:
            yield u
            return
        rows = u.reshape(self.samples, per, -1)
        for t in range(per):
            one = torch.zeros_like(rows)
            one[:, t] = rows[:, t]
            yield one.view_as(u)

    def _as_terms(self, u: Tensor) -> Tensor:
        """Shaped like the output -> (N, positions, features)"""
        return (u if self._positions == 1 else u.movedim(self._axis, -1)).reshape(self.samples, self._positions, -1)

    def _from_terms(self, terms: Tensor) -> Tensor:
        f = self._output
        if self._positions == 1:
            return terms.reshape(f.shape)
        shape = [n for i, n in enumerate(f.shape) if i != self._axis]
        return terms.reshape(*shape, -1).movedim(-1, self._axis).contiguous()  # see CrossEntropy.hessian

    def _known_apart(self) -> bool:
        """`_are_apart`, asked once for a model, its layers' calls and the output's extents."""
        known = _apart.setdefault(self._sweep.problem.model, {})
        key = (pattern_of(self.tape, self.samples), self._axis, self._output.shape[1:])
        if key not in known:
            known[key] = self._are_apart()
        return known[key]

    def _are_apart(self) -> bool:
        """Whether every position of the output depends on one position of every layer: does a gradient put on the last
        position alone, or on the first, reach other positions anywhere? (Under causal attention the first never does.)"""
        n, t = self.samples, self._positions
        calls = self.tape.calls
        if not calls or any(c.samples * c.kronecker.positions != n * t for c in calls):
            return False
        return not any(self._spills(position) for position in (t - 1, 0))

    def _spills(self, position: int) -> bool:
        n, t = self.samples, self._positions
        u = self._as_terms(torch.zeros_like(self._output))
        u[:, position] = torch.randn(u[:, 0].shape, generator=torch.Generator().manual_seed(0)).to(u)
        others = torch.arange(t, device=u.device) != position
        spilt: list[bool] = []

        def look(number: int, grad: Tensor) -> None:
            g = self.tape.calls[number].kronecker.grads(grad)
            spilt.append(bool(g.reshape(g.shape[0], n, t, -1)[:, :, others].any()))

        self._backward(self._from_terms(u), look, retain=True)
        return any(spilt)

    # Backward passes ----------------------------------------------------------------------------------------------------

    def _backward(self, u: Tensor, arrived: Receive, retain: bool) -> None:
        with self._refusing_changes():
            pull_back(self.tape, self._output, u, self._last, arrived, retain)

    @contextlib.contextmanager
    def _refusing_changes(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                raise StateError(
                    f"{self._sweep.problem.who}: batch {self.batch.index}: an activation that the derivative needs was changed "
                    f"in place after it was used; replace the in-place operation in the model's forward. ({error})"
                ) from error
            raise

    def _by_rule(self, unit: Unit, grads: dict[int, Tensor]) -> list[Site]:
        """Of a norm layer, or a table that is also a Linear's weight."""
        params, sites = self._sweep.problem.params, []
        for name in unit.names:
            p = params[name]
            uses = [(self.tape.calls[i], grads[i]) for i in unit.calls if i in grads]
            as_weight = [(c.normal, g) for c, g in uses if c.weight is p]
            as_bias = [(c.normal, g) for c, g in uses if c.bias is p]
            sites.append(site_of(tuple(p.shape), as_weight, as_bias, self.samples))
        return sites

    def _by_autograd(self, units: Sequence[Unit], u: Tensor) -> dict[tuple[str, ...], list[Site]]:
        params, n = self._sweep.problem.params, self.samples
        rest = {name: params[name] for unit in units for name in unit.names}
        split = u.reshape(n, -1)

        def own(output: object, its: Tensor) -> Tensor:
            return (output.reshape(-1) * its).sum()

        each = (self._output.reshape(n, -1) * split).sum(1)
        what = "their blocks come from autograd, row by row, which is exact and slower"
        rows = autograd_rows(self._sweep.problem, self.batch, each, rest, own, split, what)
        sites = {
            name: DenseSite(tuple(p.shape), some.flatten(1)) for (name, p), some in zip(rest.items(), rows, strict=True)
        }
        return {unit.names: [sites[name] for name in unit.names] for unit in units}


class Sweep:
    """Passes over a problem's data.

    Args:
        fisher_type, mc_samples, seed: which columns. by_sample: whether rows must be told apart by sample, so that layers
            whose first axis is not the batch are left to autograd.
    """

    def __init__(self, problem: Problem, fisher_type: str, mc_samples: int, seed: int, by_sample: bool):
        self.problem, self.fisher_type, self.mc_samples, self.seed = problem, fisher_type, mc_samples, seed
        self.by_sample = by_sample
        self.units: list[Unit] = []
        self.covered: list[bool] = []  # for each parameter, whether rules have had it in every batch so far

    def __iter__(self) -> Iterator[Run]:
        """Batch by batch, within which the model's state is preserved."""
        problem, units, self.covered = self.problem, None, []
        problem.check_state()
        with preserved(problem.model):
            for batch in problem.data:
                drawn = self.fisher_type in _DRAWN
                with (
                    recording(problem.model, list(problem.params.values())) as tape,
                    statistics_precision(problem.model, drawn),
                ):
                    evaluated = problem.evaluate(batch)
                if evaluated.weight == 0:
                    continue  # every target ignored: the batch is no part of the mean
                run = Run(self, tape, evaluated)
                del evaluated, tape
                if units is not None and not (
                    len(units) == len(run.units) and all(a.same(b) for a, b in zip(units, run.units, strict=True))
                ):
                    raise StateError(
                        f"{problem.who}: batch {batch.index} uses the model's parameters in other layers than the first batch "
                        f"did, so its factors cannot be added; is the forward pass different from batch to batch?"
                    )
                units = self.units = run.units
                yield run
                del run
        if units is None:
            raise NonFiniteError(f"{problem.who}: every target of every batch is ignored: the mean loss is 0 / 0")
