"""The preconditioners' arguments: checked numbers and schedules, and those of kfac-pytorch that mean nothing here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import nn

Schedule = Callable[[int], float]

_ONE_PROCESS = "it divides work over processes, and this preconditioner runs in one"
NOT_OURS = {
    "allreduce_bucket_cap_mb": _ONE_PROCESS,
    "assignment_strategy": _ONE_PROCESS,
    "colocate_factors": _ONE_PROCESS,
    "grad_worker_fraction": _ONE_PROCESS,
    "symmetry_aware": _ONE_PROCESS,
    "update_factors_in_hook": "factors are always summed as the gradients arrive",
    "compute_eigenvalue_outer_product": "the damped eigenvalues are always kept, and computed anew when the damping changes",
    "loglevel": "nothing is logged; what matters is a warning",
}


def refuse(who: str, options: dict[str, object]) -> None:
    """Raise TypeError for arguments that are not there, with the reason for kfac-pytorch's."""
    for name in options:
        reason = f": {NOT_OURS[name]}; leave it out" if name in NOT_OURS else "; see its documentation for those it has"
        raise TypeError(f"{who}: there is no argument {name!r}{reason}")


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "factor_update_steps": (lambda x: x >= 1 and x == int(x), "a whole number >= 1"),
    "inv_update_steps": (lambda x: x >= 1 and x == int(x), "a whole number >= 1"),
    "damping": (lambda x: 0 < x < math.inf, "a finite number > 0"),
    "factor_decay": (lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "kl_clip": (lambda x: 0 < x < math.inf, "a finite number > 0, or None for no clipping"),
    "lr": (lambda x: 0 <= x < math.inf, "a finite number >= 0"),
}
SCHEDULES = tuple(_RANGES)


def value_of(who: str, name: str, given: float | Schedule | None, step: int) -> float | None:
    """A hyper-parameter at this step. Raises ValueError, or TypeError, where it is out of its range."""
    value = given(step) if callable(given) else given
    if value is None and name == "kl_clip":
        return None
    fits, needs = _RANGES[name]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{who}: {name} is {value!r}; it must be {needs}, or a function of the step") from None
    if not fits(number):
        where = f" at step {step}" if callable(given) else ""
        raise ValueError(f"{who}: {name} is {value!r}{where}; it must be {needs}")
    return number


class Scheduled:
    """The hyper-parameters that may be functions of the step: their values at this one."""

    _who: str
    _steps = 0

    def _set_schedules(self, *given: float | Schedule | None) -> None:
        """In the order of `SCHEDULES`; those that are no functions are checked now, the others at every step."""
        self._schedules = dict(zip(SCHEDULES, given, strict=True))
        for name, one in self._schedules.items():
            if not callable(one):
                value_of(self._who, name, one, 0)

    def _value(self, name: str) -> float | None:
        return value_of(self._who, name, self._schedules[name], self._steps)

    @property
    def steps(self) -> int:
        """How many steps have been made."""
        return self._steps

    damping = property(lambda self: self._value("damping"), doc="Of this step.")
    factor_decay = property(lambda self: self._value("factor_decay"), doc="Of this step.")
    kl_clip = property(lambda self: self._value("kl_clip"), doc="Of this step, or None.")
    lr = property(lambda self: self._value("lr"), doc="Of this step.")
    factor_update_steps = property(lambda self: int(self._value("factor_update_steps")), doc="Of this step.")
    inv_update_steps = property(lambda self: int(self._value("inv_update_steps")), doc="Of this step.")


def skips(patterns: Sequence[str] | None, who: str) -> Callable[[str, nn.Module], bool]:
    """Whether a module's name, or its class's, has a match of any pattern."""
    if isinstance(patterns, str):
        raise TypeError(f"{who}: skip_layers is a string; it must be a list of regular expressions: [{patterns!r}]")
    try:
        compiled = [re.compile(pattern) for pattern in patterns or ()]
    except re.error as error:
        raise ValueError(f"{who}: skip_layers holds {error.pattern!r}, no regular expression: {error}") from error
    return lambda name, module: any(p.search(name) or p.search(type(module).__name__) for p in compiled)


def float_dtype(dtype: torch.dtype | None, who: str, name: str, narrow: bool) -> torch.dtype | None:
    """A dtype to keep things in. Raises TypeError for others than float32 and float64 (16 bits too if `narrow`)."""
    fine = (torch.float32, torch.float64) + ((torch.bfloat16,) if narrow else ())
    if dtype is not None and dtype not in fine:
        shown = ", ".join(str(x) for x in fine)
        raise TypeError(
            f"{who}: {name} is {dtype}; it must be one of {shown}, or None for what the factors are summed in"
        )
    return dtype


def choice(value: object, who: str, name: str, options: Sequence[str]) -> str:
    """One of a few words; an enum's member by its name. Raises ValueError for another."""
    word = str(getattr(value, "name", value)).lower()
    if word not in options:
        raise ValueError(f"{who}: {name} is {value!r}; it must be one of {', '.join(map(repr, options))}")
    return word


def check_model(model: object, who: str) -> None:
    """Raise TypeError or ValueError for what no hook is called in, or what several processes or devices share."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model is a {type(model).__name__}; it must be a torch.nn.Module")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"{who}: the model is compiled, and compiled graphs call no hooks; give and run the module itself"
        )
    wrapped = next((m for m in model.modules() if type(m).__name__ in _DISTRIBUTED), None)
    if wrapped is not None:
        raise TypeError(
            f"{who}: the model is wrapped in {type(wrapped).__name__}: {_ONE_PROCESS}, so each process would "
            f"go its own way; train on one device, or use kfac-pytorch"
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"{who}: the parameters are on {sorted(map(str, devices))}; move the model to one device")


_DISTRIBUTED = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
