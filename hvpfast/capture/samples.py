"""One batch's per-sample gradients, each parameter as a `Site`: captured by the layers' rules, the rest by autograd."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from hvpfast.autocast import as_the_user_has_it
from hvpfast.capture.data import Batch, call, tensors_in
from hvpfast.capture.problem import Problem
from hvpfast.capture.site import DenseSite, Site
from hvpfast.capture.state import preserved
from hvpfast.capture.statistics_precision import statistics_precision
from hvpfast.capture.tape import recording

_warned: set[tuple[str, ...]] = set()


Result = TypeVar("Result")


class Samples:
    """One batch's per-sample gradients, each parameter as a `Site`; what no rule covers, by autograd, as rows.

    Args:
        model, loss, params: as for `Hessian`. batch: (X, y). who: the public call, for errors. statistic: whether what is asked
            for is one, so that layers may run in its precision (see `statistics_precision`).

    Attributes:
        names: of the parameters, in order.
    """

    def __init__(
        self, model: nn.Module, loss: object, batch: object, params: object, who: str, statistic: bool = False
    ):
        self._precision = statistics_precision if statistic else contextlib.nullcontext
        self.problem = Problem(
            model, loss, [batch] if isinstance(batch, tuple) else batch, params, who, per_sample=True
        )
        self.names = self.problem.space.names

    def map(self, statistic: Callable[..., Result], *others: Sequence[object]) -> list[Result]:
        """`map(statistic, sites, *others)`, in the parameters' order. Each is taken in the backward pass, as soon as the
        gradients are there, which are then let go: no more memory than a plain gradient needs, and data still in the cache.
        """
        problem = self.problem
        tensors, results = list(problem.params.values()), {}
        with preserved(problem.model):
            (one,) = problem.data
            with recording(problem.model, tensors) as tape, self._precision(problem.model):
                output = problem.output_tensor(problem.run(one))
            with as_the_user_has_it():
                losses = problem.loss.sample_losses(output, one.target)
            problem.check_loss(losses.sum(), one, output)
            covered = tape.covered(losses, tensors)
            rest = {n: p for (n, p), own in zip(problem.params.items(), covered, strict=True) if not own}
            by_rule = [i for i, own in enumerate(covered) if own]

            def take(i: int, site: Site) -> None:
                results[i] = statistic(site, *(other[i] for other in others))

            def receive(number: int, site: Site) -> None:
                take(by_rule[number], site)

            tape.stream([tensors[i] for i in by_rule], losses, torch.ones_like(losses), receive, bool(rest))
            by_autograd = (i for i, own in enumerate(covered) if not own)
            for i, site in zip(by_autograd, self._by_autograd(one, losses, rest), strict=True):
                take(i, site)
        return [results[i] for i in range(len(tensors))]

    def _by_autograd(self, batch: Batch, losses: Tensor, rest: dict[str, Tensor]) -> list[Site]:
        def own(output: object, target: Tensor) -> Tensor:
            with as_the_user_has_it():
                return self.problem.loss.sample_losses(output, target.unsqueeze(0))[0]

        what = "their per-sample gradients come from autograd, which is exact and slower"
        rows = autograd_rows(self.problem, batch, losses, rest, own, batch.target, what)
        return [DenseSite(tuple(p.shape), row) for p, row in zip(rest.values(), rows, strict=True)]


def autograd_rows(
    problem: Problem,
    batch: Batch,
    each: Tensor,
    rest: dict[str, Tensor],
    own: Callable[[object, Tensor], Tensor],
    extra: Tensor,
    what: str,
) -> list[Tensor]:
    """Gradients (N, p) of N scalars in the parameters that no rule covers: vmapped over samples where the model allows
    it, else the rows of the Jacobian.

    Args:
        each: (N,) with the graph. own: (output of a batch of one, its entry of `extra`) -> the sample's scalar.
        extra: (N, ...). what: said once, with the parameters' names, in a warning.

    Raises:
        ValueError: a parameter that the scalars do not depend on.
    """
    if not rest:
        return []
    names = tuple(rest)
    if (what, *names) not in _warned:
        _warned.add((what, *names))
        warnings.warn(
            f"{problem.who}: no layer rule covers {', '.join(names[:6])}{' and more' if len(names) > 6 else ''}: {what}",
            stacklevel=8,
        )
    reached = torch.autograd.grad(each.sum(), list(rest.values()), retain_graph=True, allow_unused=True)
    for name, slope in zip(names, reached, strict=True):
        if slope is None:
            raise ValueError(
                f"{problem.who}: no data reach parameter {name!r}: the loss does not depend on it; leave it out with params="
            )
    n = each.shape[0]
    rows = _vmapped(problem, batch, rest, own, extra)
    whole = [slope.reshape(-1) for slope in reached]
    if rows is None or not all(_adds_up(row, sum_, n) for row, sum_ in zip(rows, whole, strict=True)):
        grads = [torch.autograd.grad(one, list(rest.values()), retain_graph=True, allow_unused=True) for one in each]
        zeros = [torch.zeros_like(p) for p in rest.values()]
        grads = [[z if g is None else g for g, z in zip(row, zeros, strict=True)] for row in grads]
        rows = [torch.stack(parts).reshape(n, -1) for parts in zip(*grads, strict=True)]
    return rows


def _vmapped(
    problem: Problem, batch: Batch, rest: dict[str, Tensor], own: Callable[[object, Tensor], Tensor], extra: Tensor
) -> list[Tensor] | None:
    """(N, p) each, by torch.func.vmap(grad); None if the model or the inputs do not go through it."""
    n = extra.shape[0]
    if not all(x.dim() and x.shape[0] == n for x in tensors_in(batch.inputs)):
        return None

    def scalar(values: dict[str, Tensor], inputs: object, its: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(problem.model, values, tie_weights=True):
            return own(problem.pick(call(problem.model, _one(inputs))), its)

    try:
        detached = {name: p.detach() for name, p in rest.items()}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            grads = torch.func.vmap(torch.func.grad(scalar), in_dims=(None, 0, 0))(detached, batch.inputs, extra)
    except Exception:  # branches on values, in-place writes, no batching rule: the caller has another way
        return None
    return [grads[name].reshape(n, -1) for name in rest]


def _one(inputs: object) -> object:
    """A batch of one from one sample's input, in the same form."""
    if isinstance(inputs, Tensor):
        return inputs.unsqueeze(0)
    if isinstance(inputs, dict):
        return {name: _one(value) for name, value in inputs.items()}
    return type(inputs)(_one(value) for value in inputs) if isinstance(inputs, (tuple, list)) else inputs


def _adds_up(rows: Tensor, whole: Tensor, n: int) -> bool:
    """Whether per-sample gradients sum to the gradient of the summed loss, up to rounding of N terms."""
    scale = rows.abs().sum(0).max() if rows.numel() else rows.new_zeros(())
    bound = 50 * n * torch.finfo(rows.dtype).eps * scale.clamp(min=torch.finfo(rows.dtype).tiny)
    return bool(torch.isfinite(rows).all()) and bool(((rows.sum(0) - whole).abs() <= bound).all())
