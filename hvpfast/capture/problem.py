"""The scalar whose curvature is asked for: a model, a loss, data, and the parameters to differentiate in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvpfast.autocast import as_the_user_has_it
from hvpfast.capture.data import Batch, Data, batch_size, call, tensors_in
from hvpfast.capture.errors import NonFiniteError, StateError
from hvpfast.capture.losses import Loss
from hvpfast.capture.modules import named_modules, parameters
from hvpfast.capture.state import refuse_batch_statistics, refuse_dropout
from hvpfast.capture.torch_losses import as_loss
from hvpfast.space import Space


class Evaluated(NamedTuple):
    """One batch run through the model: its output and loss, and what the batch weighs in the mean over all batches."""

    batch: Batch
    output: object
    value: Tensor
    weight: float


class Problem:
    """Model, loss, data and parameters, checked; runs batches and says what is wrong with them.

    Args:
        model: a torch.nn.Module. loss: see `torch_losses.as_loss`. data: see `data.Data`.
        params: None for every parameter that requires grad; or names, or Parameters, or a dict of them.
        who: the name of the public call, for errors.
        per_sample: whether the quantity asked for needs samples that do not interact (refuses batch statistics).
    """

    def __init__(self, model: nn.Module, loss: object, data: object, params: object, who: str, per_sample: bool):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{who}: model is a {type(model).__name__}; it must be a torch.nn.Module")
        model = uncompiled(model)
        self.model, self.who, self.per_sample = model, who, per_sample
        self.loss: Loss = as_loss(loss, who)
        self.data = Data(data, who)
        self.params = chosen_parameters(model, params, who)
        self.space = Space(self.params)
        self._deterministic = False
        self._unsettled: Exception | None = None
        self.check_state()

    def check_state(self) -> None:
        """Raise StateError if dropout, or batch statistics where samples must not interact, are active; or a parameter is frozen
        that was not before."""
        frozen = [name for name, p in self.params.items() if not p.requires_grad]
        if frozen:
            raise StateError(
                f"{self.who}: {', '.join(frozen[:4])}{' and more' if len(frozen) > 4 else ''} required grad when this was made "
                f"and no longer does; make a new one, or call requires_grad_()"
            )
        refuse_dropout(self.model, self.who)
        if self.per_sample:
            refuse_batch_statistics(self.model, self.who)

    def evaluate(self, batch: Batch) -> Evaluated:
        """Run one batch, with the graph: the output, the user's scalar, and the batch's weight.

        Raises:
            StateError: the model draws random numbers that change its output. NonFiniteError: NaN or inf in the loss.
            ValueError: the output needs no grad, tensors on other devices, no samples.
        """
        output = self.run(batch)
        with as_the_user_has_it():
            value = self.loss(output, batch.target)
        weight = self._weight(batch, output)
        if weight != 0:  # else every target is ignored: 0 / 0 on its own, and no part of the mean over all batches
            self.check_loss(value, batch, output)
        return Evaluated(batch, output, value, weight)

    def run(self, batch: Batch) -> object:
        """The model's output on one batch, with the graph.

        Raises:
            StateError: the model draws random numbers that change its output. ValueError: tensors on other devices, no samples.
        """
        self._check_devices(batch)
        if batch_size(batch.inputs) == 0:
            raise ValueError(f"{self.who}: batch {batch.index} holds no samples")
        return self._run(batch)

    def check_loss(self, value: Tensor, batch: Batch, output: object) -> None:
        """Raise NonFiniteError if a scalar of this batch is NaN or inf, ValueError if it needs no grad."""
        number = value.item()
        if not math.isfinite(number):
            raise NonFiniteError(f"{self.who}: batch {batch.index}: the loss is {number}: {self._blame(batch, output)}")
        if not value.requires_grad:
            raise ValueError(
                f"{self.who}: the loss needs no grad: the model's output does not depend on any parameter through autograd "
                f"(is its forward under torch.no_grad(), or does it detach?)"
            )

    def output_tensor(self, output: object) -> Tensor:
        """The output, which must be one tensor with a batch axis that autograd can see."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{self.who}: the model returned a {type(output).__name__}; it must return one tensor (or an object with "
                f".logits, under a torch loss): wrap it in a module that picks the tensor"
            )
        if output.dim() == 0:
            raise ValueError(f"{self.who}: the model returned a scalar; it must return one row a sample")
        if not output.requires_grad:
            raise ValueError(f"{self.who}: the model's output needs no grad: does its forward detach or use no_grad()?")
        return output

    def _run(self, batch: Batch) -> object:
        before = _random_state(self.space.device)
        output = self.pick(call(self.model, batch.inputs))
        if not self._deterministic:
            after = _random_state(self.space.device)
            if not all(torch.equal(x, y) for x, y in zip(before, after, strict=True)):
                with torch.no_grad():
                    again = self.pick(call(self.model, batch.inputs))
                for x, y in zip(tensors_in(output), tensors_in(again), strict=True):
                    if not torch.equal(x.detach().nan_to_num(), y.nan_to_num()):
                        raise StateError(
                            f"{self.who}: the model's output is random: two runs on batch {batch.index} differ. Is dropout "
                            f"active (a functional one, dropout(..., training=True), or noise)? Call model.eval(), or fix it"
                        )
            self._deterministic = True
        return output

    def pick(self, output: object) -> object:
        """A Hugging Face output gives its logits to a torch loss; a custom loss gets what the model returned."""
        if not isinstance(output, Tensor) and type(self.loss) is not Loss and hasattr(output, "logits"):
            return output.logits
        return output

    def _weight(self, batch: Batch, output: object) -> float:
        """D of the batch: 1 for a sum. A loss that is neither a mean nor a sum is fine as long as there is one batch."""
        if self._unsettled is not None and batch.index > 0:
            raise self._unsettled
        try:
            reduction = self.loss.settle(output, batch.target)
        except Exception as error:
            if batch.index > 0:
                raise
            self._unsettled = error
            return 1.0
        if reduction == "sum":
            return 1.0
        if isinstance(output, Tensor) and output.dim():
            return float(self.loss.denominators(output.detach(), batch.target).sum())
        return float(batch_size(batch.inputs))

    def check_finite(self, parts: list[Tensor | None], batch: Batch, what: str) -> None:
        """Raise NonFiniteError if a result, one tensor a parameter, holds NaN or inf; names batch, parameter, cause."""
        for name, part in zip(self.space.names, parts, strict=True):
            if part is not None and not finite(part):
                raise NonFiniteError(
                    f"{self.who}: batch {batch.index}: the {what} has NaN or inf at parameter {name!r}: "
                    f"{self._blame(batch, None)}"
                )

    def _blame(self, batch: Batch, output: object) -> str:
        for label, item in (("input", batch.inputs), ("target", batch.target)):
            for x in tensors_in(item):
                if x.dtype.is_floating_point and bool(torch.isnan(x).any()):
                    return f"the batch's {label} holds NaN"
        for name, p in self.model.named_parameters():
            if not bool(torch.isfinite(p.detach()).all()):
                return f"parameter {name!r} holds NaN or inf"
        for label, item in (("input", batch.inputs), ("target", batch.target)):
            for x in tensors_in(item):
                if x.dtype.is_floating_point and bool(torch.isinf(x).any()):
                    return f"the batch's {label} holds inf"
        if output is not None and all(bool(torch.isfinite(x.detach()).all()) for x in tensors_in(output)):
            return "the model's output is finite, so the loss itself makes it (is every target ignored?)"
        return f"input and parameters are finite, so the model overflows or divides by zero in {self.space.dtype}"

    def _check_devices(self, batch: Batch) -> None:
        for label, item in (("input", batch.inputs), ("target", batch.target)):
            for x in tensors_in(item):
                if x.device != self.space.device:
                    raise ValueError(
                        f"{self.who}: batch {batch.index}: its {label} is on {x.device} but the model is on "
                        f"{self.space.device}; move one of them"
                    )

    def batches_total(self, weights: list[float]) -> float:
        """What the batches' weighted sum is divided by: the sum of weights of a mean; 1 for a sum."""
        if self.loss.reduction == "sum":
            return 1.0
        return sum(weights) if weights else 1.0


def uncompiled(model: nn.Module) -> nn.Module:
    """The module behind `torch.compile(module)`: compiled graphs have no second derivatives and call no hooks."""
    return getattr(model, "_orig_mod", model)


def finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor inf: by its sum, one read and no temporary; element by element only if that is not."""
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())


def chosen_parameters(model: nn.Module, params: object, who: str) -> dict[str, Tensor]:
    """The parameters to differentiate in, by name, each tensor once.

    Raises:
        ValueError: none at all, unknown names, tensors that are not the model's, frozen ones asked for by name, or
            parameters on several devices. TypeError: complex or integer parameters.
    """
    # Asked for by name, a shared module's parameters have several; without names the first will do.
    every = parameters(named_modules(model)) if params is None else model.named_parameters(remove_duplicate=False)
    names = dict(every)
    first: dict[int, str] = {}
    for name, p in names.items():
        first.setdefault(id(p), name)
    if params is None:
        chosen = {name: names[name] for name in first.values() if names[name].requires_grad}
        if not chosen:
            raise ValueError(f"{who}: the model has no parameter that requires grad")
    else:
        if isinstance(params, (Tensor, str)):
            params = [params]
        items: Iterable = params.items() if isinstance(params, Mapping) else [(None, item) for item in params]
        chosen = {}
        for label, item in items:
            if isinstance(item, str):
                if item not in names:
                    raise ValueError(f"{who}: params names {item!r}, which the model does not have")
                label, item = item, names[item]
            elif not isinstance(item, Tensor):
                raise TypeError(f"{who}: params holds a {type(item).__name__}; it must hold names or Parameters")
            elif id(item) not in first:
                raise ValueError(
                    f"{who}: params holds a tensor of shape {tuple(item.shape)} that is none of the model's parameters"
                )
            label = label if label in names and names[label] is item else first[id(item)]
            if not item.requires_grad:
                raise ValueError(
                    f"{who}: params names {label!r}, which is frozen (requires_grad=False); unfreeze it first"
                )
            if any(item is other for other in chosen.values()):
                raise ValueError(f"{who}: params holds {label!r} twice (tied weights are one parameter)")
            chosen[label] = item
        if not chosen:
            raise ValueError(f"{who}: params is empty; leave it at None for every parameter that requires grad")
    for name, p in chosen.items():
        if not p.dtype.is_floating_point:
            raise TypeError(
                f"{who}: parameter {name!r} is {p.dtype}; only real floating parameters have curvature here"
            )
    devices: dict = {}
    for name, p in names.items():
        devices.setdefault(p.device, name)
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"{who}: the parameters are on {len(devices)} devices ({where}); move the model to one device")
    return chosen


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
