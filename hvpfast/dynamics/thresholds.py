"""How sharp a minimum an optimiser can sit in: the largest curvature for which its own update is stable.

On a quadratic of curvature h, each optimiser below is a linear recurrence whose roots leave the unit circle through -1
at the threshold (Cohen et al., arXiv:2103.00065 and arXiv:2207.14484). These are values for full batches. With
mini-batches the largest eigenvalue stays below them: what settles at the threshold of plain SGD is the sharpness that
a batch sees along its own gradient (`batch_sharpness`, arXiv:2412.20553), and with momentum the plateau lies between
2(1 - b)/lr for small and 2(1 + b)/lr for large batches (arXiv:2604.14108).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

_SUPPORTED = "SGD (plain, momentum, Nesterov), Adam, AdamW and RMSprop"


@dataclass(frozen=True)
class Threshold:
    """The curvature above which full-batch training with one optimiser is unstable.

    Attributes:
        value: the threshold. formula: how it comes about, with its numbers. symbol: the formula as mathtext.
        matrix: the matrix whose largest eigenvalue it bounds: "H", or "P^-1 H" with the optimiser's `preconditioner` P.
        optimiser: the update rule by name. note: what else to know (mini-batches, weight decay).
    """

    value: float
    formula: str
    symbol: str
    matrix: str
    optimiser: str
    note: str = ""

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.optimiser}: stable while lambda_max({self.matrix}) < {self.formula}. {self.note}".rstrip()


def stability_threshold(optimizer: Optimizer) -> Threshold:
    """Say how large the largest eigenvalue may be before full-batch training with this optimiser diverges.

    With learning rate `lr`, momentum `b` and dampening `d`: gradient descent 2/lr; heavy ball (2 + 2b)/(lr (1 - d));
    Nesterov (2 + 2b)/(lr (1 + 2b)); RMSprop (2 + 2b)/lr, Adam and AdamW (2 + 2 b1)/(lr (1 - b1)), these three for the
    preconditioned Hessian. Weight decay inside the gradient adds to every eigenvalue and is taken off.

    Args:
        optimizer: a torch.optim SGD, Adam, AdamW or RMSprop, as it is now: a schedule moves the threshold.

    Raises:
        TypeError: for another optimiser. ValueError: for `maximize=True`, or parameter groups that differ in more than
            weight decay: one number then belongs to no Hessian.
    """
    kind = next((each for each in (SGD, AdamW, Adam, RMSprop) if isinstance(optimizer, each)), None)
    if kind is None:
        raise TypeError(
            f"stability_threshold: got a {type(optimizer).__name__}; the thresholds of {_SUPPORTED} are known. "
            f"For another optimiser, find the curvature at which its update on a quadratic has the root -1"
        )
    group = _one_group(optimizer)
    if group.get("maximize", False):
        raise ValueError(
            "stability_threshold: maximize=True climbs, so its limit is on -lambda_min of this loss; negate the loss "
            "and leave maximize at False"
        )
    lr = float(group["lr"])
    if lr < 0:
        raise ValueError(f"stability_threshold: the learning rate is {lr}; it must not be negative")
    if kind is SGD:
        return _sgd(group, lr)
    decay = float(group["weight_decay"])
    if kind is RMSprop:
        beta = float(group["momentum"])
        value = _over(2 + 2 * beta, lr)
        formula, symbol = f"(2 + 2b)/lr = (2 + {_n(2 * beta)})/{_n(lr)}", r"(2+2\beta)/\eta"
        if beta == 0:
            formula, symbol = f"2/lr = 2/{_n(lr)}", r"2/\eta"
        name, rho = "RMSprop", 1.0
    else:
        beta = float(group["betas"][0])
        # torch 2.7 made AdamW a subclass of Adam with this flag
        decoupled = kind is AdamW or bool(group.get("decoupled_weight_decay", False))
        rho = 1 - lr * decay if decoupled else 1.0
        value = _over((1 + rho) * (1 + beta), lr * (1 - beta))
        formula = f"(2 + 2 b1)/(lr (1 - b1)) = (2 + {_n(2 * beta)})/({_n(lr)} x {_n(1 - beta)})"
        symbol, name = r"(2+2\beta_1)/(\eta(1-\beta_1))", "AdamW" if decoupled else "Adam"
        if rho != 1.0:
            formula = f"(2 - lr w)(1 + b1)/(lr (1 - b1)) = {_n(1 + rho)} x {_n(1 + beta)}/({_n(lr)} x {_n(1 - beta)})"
            symbol = r"(2-\eta w)(1+\beta_1)/(\eta(1-\beta_1))"
    note = "It holds for full batches and for the preconditioned Hessian, P = diag(sqrt(v) + eps)."
    if decay and rho == 1.0:
        note += f" Weight decay {_n(decay)} is part of the gradient: the matrix is P^-1 (H + {_n(decay)} I)."
    return Threshold(value, f"{formula} = {_n(value)}", symbol, "P^-1 H", name, note)


def preconditioner(optimizer: Optimizer, params: Iterable[Tensor] | None = None) -> Tensor:
    """The diagonal that an adaptive optimiser divides its gradient by now: sqrt(v) + eps, v bias-corrected for Adam.

    Args:
        optimizer: Adam, AdamW or RMSprop, after at least one step. params: parameters in the wanted order (default:
            the optimiser's own).

    Returns:
        (P,) in the parameters' dtype. With it, `lambda_max(P^-1 H)` compares with `stability_threshold`.

    Raises:
        TypeError: for another optimiser. ValueError: before its first step, or for a parameter that is not its own.
    """
    if not isinstance(optimizer, (Adam, AdamW, RMSprop)):
        raise TypeError(f"preconditioner: got a {type(optimizer).__name__}; Adam, AdamW and RMSprop have one")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    params = [p for group in optimizer.param_groups for p in group["params"]] if params is None else list(params)
    pieces = []
    for p in params:
        if id(p) not in groups:
            raise ValueError(f"preconditioner: a parameter of shape {tuple(p.shape)} is not among the optimiser's")
        group, state = groups[id(p)], optimizer.state.get(p, {})
        key = "square_avg" if isinstance(optimizer, RMSprop) else "exp_avg_sq"
        if key not in state:
            raise ValueError(
                "preconditioner: the optimiser has taken no step, so it has no second moment yet; step it first"
            )
        if isinstance(optimizer, RMSprop):
            v = state[key] - state["grad_avg"].square() if group["centered"] else state[key]
        else:
            v = state["max_exp_avg_sq"] if group["amsgrad"] else state[key]
            v = v / (1 - float(group["betas"][1]) ** float(state["step"]))
        pieces.append((v.clamp_min(0).sqrt() + group["eps"]).reshape(-1).to(p.dtype))
    return torch.cat(pieces)


def _sgd(group: dict, lr: float) -> Threshold:
    beta, dampening = float(group["momentum"]), float(group["dampening"])
    if beta == 0:
        value, formula, symbol, name = _over(2, lr), f"2/lr = 2/{_n(lr)}", r"2/\eta", "gradient descent"
    elif group["nesterov"]:
        value, name = _over(2 + 2 * beta, lr * (1 + 2 * beta)), "Nesterov momentum"
        formula = f"(2 + 2b)/(lr (1 + 2b)) = (2 + {_n(2 * beta)})/({_n(lr)} x {_n(1 + 2 * beta)})"
        symbol = r"(2+2\beta)/(\eta(1+2\beta))"
    else:
        value, name = _over(2 + 2 * beta, lr * (1 - dampening)), "heavy ball"
        formula, symbol = f"(2 + 2b)/lr = (2 + {_n(2 * beta)})/{_n(lr)}", r"(2+2\beta)/\eta"
        if dampening:
            formula = f"(2 + 2b)/(lr (1 - d)) = (2 + {_n(2 * beta)})/({_n(lr)} x {_n(1 - dampening)})"
            symbol = r"(2+2\beta)/(\eta(1-d))"
    note = "It holds for full batches; under mini-batches lambda_max stays below it"
    if beta and not group["nesterov"] and not dampening:
        note += f"; a run at its edge settles between {_n(_over(2 * (1 - beta), lr))} (small batches) and {_n(value)} (large)"
    note += "."
    decay = float(group["weight_decay"])
    if decay:
        value, formula, symbol = value - decay, f"{formula} - w = {_n(value)} - {_n(decay)}", symbol + "-w"
        note += " Weight decay w adds w to every eigenvalue, so it is taken off here."
    return Threshold(value, f"{formula} = {_n(value)}", symbol, "H", name, note)


def _one_group(optimizer: Optimizer) -> dict:
    """The settings shared by all parameter groups; weight decay may differ, and the largest counts."""
    groups = [group for group in optimizer.param_groups if group["params"]]
    settings = ("lr", "momentum", "dampening", "nesterov", "betas", "eps", "alpha", "maximize", "amsgrad", "centered")
    for name in (*settings, "decoupled_weight_decay"):
        values = [group[name] for group in groups if name in group]
        if any(value != values[0] for value in values[1:]):
            shown = ", ".join(str(value) for value in values)
            raise ValueError(
                f"stability_threshold: the parameter groups differ in {name} ({shown}), so no single number bounds the "
                f"Hessian of all of them; give them one value, or make an optimiser of the group that you study"
            )
    return {**groups[0], "weight_decay": max(float(group["weight_decay"]) for group in groups)}


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("inf")


def _n(value: float) -> str:
    return f"{value:.4g}"
