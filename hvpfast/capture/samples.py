"""One batch's per-sample gradients, each parameter as a `Site`: captured by the layers' rules, the rest by autograd."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from hvpfast.capture.data import Batch, call, tensors_in
from hvpfast.capture.problem import Problem
from hvpfast.capture.sites import DenseSite, Site
from hvpfast.capture.state import preserved
from hvpfast.capture.tape import recording

_warned: set[tuple[str, ...]] = set()


class Samples:
    """One batch's per-sample gradients, each parameter as a `Site`; what no rule covers, by autograd, as rows.

    Args:
        model, loss, params: as for `Hessian`. batch: (X, y). who: the public call, for errors.

    Attributes:
        names, sites: of the parameters, in order.
    """

    def __init__(self, model: nn.Module, loss: object, batch: object, params: object, who: str):
        problem = Problem(model, loss, [batch] if isinstance(batch, tuple) else batch, params, who, per_sample=True)
        self.problem, self.names = problem, problem.space.names
        tensors = list(problem.params.values())
        with preserved(model):
            (one,) = problem.data
            with recording(model, tensors) as tape:
                evaluated = problem.evaluate(one)
            output = problem.output_tensor(evaluated.output)
            losses = problem.loss.sample_losses(output, one.target)
            covered = tape.covered(losses, tensors)
            rest = {n: p for (n, p), own in zip(problem.params.items(), covered, strict=True) if not own}
            edges = [call.edge for call in tape.calls]
            grads = (
                torch.autograd.grad(losses.sum(), edges, retain_graph=bool(rest), allow_unused=True) if edges else ()
            )
            by_rule = iter(tape.sites([p for p, own in zip(tensors, covered, strict=True) if own], list(grads)))
            by_autograd = iter(self._by_autograd(one, losses, rest))
            self.sites: list[Site] = [next(by_rule if own else by_autograd) for own in covered]
            self.shares = problem.loss.shares(output.detach(), one.target)

    def _by_autograd(self, batch: Batch, losses: Tensor, rest: dict[str, Tensor]) -> list[Site]:
        """Rows (N, p) of the parameters that no rule covers: gradients vmapped over samples where the model allows it,
        else the rows of the Jacobian of the samples' losses."""
        if not rest:
            return []
        names = tuple(rest)
        if names not in _warned:
            _warned.add(names)
            warnings.warn(
                f"{self.problem.who}: no layer rule covers {', '.join(names[:6])}{' and more' if len(names) > 6 else ''}: "
                f"their per-sample gradients come from autograd, which is exact and slower",
                stacklevel=6,
            )
        reached = torch.autograd.grad(losses.sum(), list(rest.values()), retain_graph=True, allow_unused=True)
        for name, slope in zip(names, reached, strict=True):
            if slope is None:
                raise ValueError(
                    f"{self.problem.who}: no data reach parameter {name!r}: the loss does not depend on it; leave it out with "
                    f"params="
                )
        n = losses.shape[0]
        rows = self._vmapped(batch, rest)
        whole = [slope.reshape(-1) for slope in reached]
        if rows is None or not all(_adds_up(row, sum_, n) for row, sum_ in zip(rows, whole, strict=True)):
            each = [
                torch.autograd.grad(one, list(rest.values()), retain_graph=True, allow_unused=True) for one in losses
            ]
            zeros = [torch.zeros_like(p) for p in rest.values()]
            each = [[z if g is None else g for g, z in zip(row, zeros, strict=True)] for row in each]
            rows = [torch.stack(parts).reshape(n, -1) for parts in zip(*each, strict=True)]
        return [DenseSite(tuple(p.shape), row) for p, row in zip(rest.values(), rows, strict=True)]

    def _vmapped(self, batch: Batch, rest: dict[str, Tensor]) -> list[Tensor] | None:
        """(N, p) each, by torch.func.vmap(grad); None if the model or the inputs do not go through it."""
        model, problem = self.problem.model, self.problem
        if not all(x.dim() and x.shape[0] == batch.target.shape[0] for x in tensors_in(batch.inputs)):
            return None

        def own(values: dict[str, Tensor], inputs: object, target: Tensor) -> Tensor:
            with torch.nn.utils.stateless._reparametrize_module(model, values, tie_weights=True):
                output = problem.pick(call(model, _one(inputs)))
            return problem.loss.sample_losses(output, target.unsqueeze(0))[0]

        try:
            detached = {name: p.detach() for name, p in rest.items()}
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                grads = torch.func.vmap(torch.func.grad(own), in_dims=(None, 0, 0))(
                    detached, batch.inputs, batch.target
                )
        except Exception:  # branches on values, in-place writes, no batching rule: the caller has another way
            return None
        return [grads[name].reshape(batch.target.shape[0], -1) for name in rest]


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
