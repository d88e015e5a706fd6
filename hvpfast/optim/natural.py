"""One natural-gradient (Gauss-Newton) step: the exact matrix by conjugate gradients, K-FAC as their preconditioner."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvpfast.capture.problem import Problem
from hvpfast.capture.state import preserved
from hvpfast.operators.ggn import GGN
from hvpfast.operators.kfac import KFAC
from hvpfast.optim.options import value_of
from hvpfast.probes.linear_solve import solve
from hvpfast.probes.results import Solution


class NaturalStep(NamedTuple):
    """A natural-gradient step.

    Attributes:
        step: s with (GGN + damping) s = gradient, by parameter name: `p -= lr * step[name]`. gradient: of the loss over the
            data, likewise. solution: what `hf.solve` says of it: residual, iterations, whether it converged.
    """

    step: dict[str, Tensor]
    gradient: dict[str, Tensor]
    solution: Solution


def natural_gradient(
    model: nn.Module,
    loss: object,
    data: object,
    *,
    damping: float,
    params: object = None,
    preconditioner: object = None,
    tol: float = 1e-3,
    max_iterations: int | None = None,
    fisher_type: str = "mc",
    kfac_approx: str = "expand",
    seed: int = 0,
) -> NaturalStep:
    """The step s with (GGN + damping I) s = gradient, all of the data and the whole matrix.

    The GGN of a cross-entropy or squared error is the Fisher, so this is the natural gradient; it is taken exactly, by
    products, and conjugate gradients are given the inverse of K-FAC with the same damping.

    Args:
        model, loss, data, params: as for `hf.GGN`. damping: > 0.
        preconditioner: an `hf.KFAC` or `hf.EKFAC` of the same parameters, say of an earlier step (its factors are used as
            they are); or anything with `@` that approximates (GGN + damping)^-1. None: a K-FAC made here with
            fisher_type, kfac_approx and seed.
        tol, max_iterations: of `hf.solve`.

    Returns:
        NaturalStep. Nothing of the model is changed. Not converging warns, as `hf.solve` does.

    Raises:
        as `hf.GGN` and `hf.solve`; ValueError for a damping that is not > 0.

    Sources: J. Martens, Deep learning via Hessian-free optimization, ICML 2010; J. Martens, New insights and perspectives
    on the natural gradient method, arXiv:1412.1193.
    """
    damping = value_of("natural_gradient", "damping", damping, 0)
    matrix = GGN(model, loss, data, params=params)
    if preconditioner is None:
        preconditioner = KFAC(
            model, loss, data, params=params, fisher_type=fisher_type, kfac_approx=kfac_approx, seed=seed
        )
    if isinstance(preconditioner, KFAC):
        preconditioner = preconditioner.inverse(damping)
    slope = _gradient(matrix.problem)
    found = solve(matrix, slope, damping=damping, tol=tol, max_iterations=max_iterations, preconditioner=preconditioner)
    matrix.release()
    space = matrix.space
    step, gradient = (
        {name: part[0] for name, part in zip(space.names, space.split(x[None]), strict=True)} for x in (found.x, slope)
    )
    return NaturalStep(step, gradient, found)


def _gradient(problem: Problem) -> Tensor:
    """(P,), of the loss over all the data."""
    problem.check_state()
    total = torch.zeros(1, problem.space.size, dtype=problem.space.dtype, device=problem.space.device)
    weights: list[float] = []
    with preserved(problem.model):
        for batch in problem.data:
            found = problem.evaluate(batch)
            if found.weight == 0:
                continue  # every target ignored
            slopes = list(torch.autograd.grad(found.value, list(problem.params.values()), allow_unused=True))
            problem.check_finite(slopes, batch, "gradient")
            total += problem.space.join(slopes, 1, total.dtype) * found.weight
            weights.append(found.weight)
    return total[0] / problem.batches_total(weights)
