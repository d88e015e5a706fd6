"""The user's own forward and backward passes, taken down on the steps that need them; nothing in between."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hvpfast.capture.data import batch_size, tensors_in
from hvpfast.capture.pull import last_calls, pull_back
from hvpfast.capture.state import measuring
from hvpfast.capture.tape import Tape, recording
from hvpfast.capture.units import Unit, units_of


class Pass:
    """One forward pass on a tape, read as `operators.sweep.Run` is by the sums of Kronecker factors.

    Attributes:
        units: the diagonal blocks. samples: N. terms: of the loss that the output has, its positions included.
        total: what the inputs' mean counts it. weight: the factor of every outer product of output gradients.
        apart: whether the loss has a term a position. seen: blocks that a gradient reached.
        held: gradients (call's number, gradient) of blocks that cannot be summed as they arrive. late: whether second
            moments wait for the bases that the step will bring.
    """

    columns = 1
    separate = False  # "reduce" sums the gradients of the user's own loss over positions

    def __init__(self, tape: Tape, units: list[Unit], samples: int, terms: int):
        self.tape, self.units, self.samples, self.terms = tape, units, samples, terms
        self.total, self.weight, self.apart = float(terms), 1.0, terms > samples
        self.seen: set[str] = set()
        self.held: dict[str, list[tuple[int, Tensor]]] = {}
        self.late = False
        self.by_call: dict[int, list[Unit]] = {}
        for unit in units:
            for number in unit.calls if unit.own else ():
                self.by_call.setdefault(number, []).append(unit)

    def weights(self, number: int) -> tuple[None, float]:
        """Every row of a call's input counts the same; see `Run.weights`."""
        return None, self.total

    def rows(self, unit: Unit) -> int:
        """Rows of a unit's input in all its calls: samples times positions."""
        return sum(self.tape.calls[i].samples * self.tape.calls[i].kronecker.positions for i in unit.calls)

    def release(self) -> None:
        """Let go of the layers' inputs, which the user's graph would keep alive through its hooks."""
        self.tape.calls.clear()
        self.held.clear()


class _Hook:
    """Calls a recorder's method for its own model: not for a copy of it, which has the same hooks, nor for one from a file."""

    def __init__(self, recorder: Recorder, method: str):
        self._recorder, self._method = weakref.ref(recorder), method

    def __call__(self, module: nn.Module, *given: object) -> None:
        recorder = self._recorder()
        if recorder is not None and module is recorder.model:
            getattr(recorder, self._method)(*given)

    def __reduce__(self) -> tuple:
        return functools.partial, (_nothing,)


def _nothing(*given: object) -> None:
    """The hook of a model that was copied or read from a file."""


class Recorder:
    """Hooks on the model's root: they open a tape where `due` says so, and hand over each gradient that arrives.

    Args:
        params: the parameters whose layers are looked at, by name. due: asked at each forward pass in training mode.
        arrived: called with a pass, a call's number and the gradient at its output. listening: whether gradients are
            those of the user's backward pass; else those of `pull`.

    A pass belongs to the graph of its forward pass and goes with it, unless a gradient has arrived: then it is kept in
    `passes` until `clear`; `bare` says that one had no layer to wait for. A tape refers to no node of
    the graph, since the nodes refer to it.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        due: Callable[[], bool],
        arrived: Callable[[Pass, int, Tensor], None],
        listening: bool,
    ):
        self.model, self.params, self.passes = model, dict(params), []
        self._due, self._arrived, self._listening = due, arrived, listening
        self._recording = self._latest = None
        self.bare = False
        self._handles = [
            model.register_forward_pre_hook(_Hook(self, "_open")),
            model.register_forward_hook(_Hook(self, "_close"), with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def clear(self) -> None:
        """Forget every pass."""
        self.bare = False
        for one in self.passes:
            one.release()
        self.passes.clear()
        self._latest = None

    def _open(self, args: object) -> None:
        if self._recording is not None:  # an earlier pass did not come to its end
            self._stop()
        if measuring() or not (self.model.training and torch.is_grad_enabled() and self._due()):
            return
        place: list[Callable[[], Pass | None]] = [lambda: None]  # filled when the pass is complete
        trained = [p for p in self.params.values() if p.requires_grad]
        context = recording(self.model, trained, self._watch(place) if self._listening else None)
        self._recording = (context, context.__enter__(), place)

    def _stop(self) -> tuple[Tape, list]:
        context, tape, place = self._recording
        self._recording = None
        context.__exit__(None, None, None)
        return tape, place

    def _watch(self, place: list[Callable[[], Pass | None]]) -> Callable[[int, Tensor | Node], None]:
        def watch(number: int, at: Tensor | Node) -> None:
            def keep(grad: Tensor | tuple[Tensor | None, ...]) -> None:
                grad = grad[0] if isinstance(grad, tuple) else grad
                run = place[0]()
                if run is not None and grad is not None and number < len(run.tape.calls):
                    if run not in self.passes:
                        self.passes.append(run)
                    self._arrived(run, number, grad.detach())

            at.register_hook(keep) if isinstance(at, Tensor) else at.register_prehook(keep)

        return watch

    def _close(self, args: object, kwargs: object, output: object) -> None:
        if self._recording is None:
            return
        tape, place = self._stop()
        found = [x for x in tensors_in(getattr(output, "logits", output)) if x.requires_grad]
        if not found:
            return
        first = found[0]
        rows = first.shape[0] if first.dim() else 0
        samples = batch_size((args, kwargs)) or rows
        if rows and rows % max(1, samples):
            samples = rows
        whole = first
        for other in found[1:]:  # of several outputs, whatever either of them depends on
            if other.dim() and first.dim() and other.shape[0] == rows:
                whole = whole.reshape(rows, -1).sum(1) + other.reshape(rows, -1).sum(1)
        trained = {name: p for name, p in self.params.items() if p.requires_grad}  # some may be frozen by now
        names, tensors = list(trained), list(trained.values())
        covered = tape.covered(whole, tensors, samples, folded=True)
        tape._watch = tape._model = None
        units = units_of(tape, names, tensors, covered)
        run = Pass(tape, units, samples, _terms(first, tape, samples))
        self.bare = self.bare or not run.by_call
        if self._listening:
            for call in tape.calls:
                call.edge = None
            place[0] = lambda: run
        else:
            self._latest = run

    def pull(self, output: Tensor, columns: Callable[[Pass], list[Tensor]]) -> bool:
        """Run columns back through the latest pass, to the layers' outputs only; the graph stays. False: there is none."""
        run, self._latest = self._latest, None
        if run is None:
            return False
        last = last_calls(run.tape, output)
        self.passes.append(run)
        for u in columns(run):
            pull_back(run.tape, output, u, last, lambda number, grad: self._arrived(run, number, grad), True)
        for call in run.tape.calls:
            call.edge = None
        return True


def _terms(output: Tensor, tape: Tape, samples: int) -> int:
    """How many terms a loss over this output has: its rows, times its positions where it has more than two axes."""
    if not output.dim():
        return samples
    if output.dim() < 3:
        return output.shape[0]
    channels_first = bool(tape.calls) and tape.calls[-1].normal.image is not None
    return output.numel() // output.shape[1 if channels_first else -1]
