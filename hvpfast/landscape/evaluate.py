"""The loss over a whole data set as a function of the parameters, which stay where they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from hvpfast.capture.data import Data, batch_size, call, tensors_in
from hvpfast.capture.losses import Loss
from hvpfast.capture.state import preserved, refuse_dropout
from hvpfast.capture.torch_losses import as_loss

KEEP_BYTES = 1 << 30  # a loader's batches are kept in memory up to this size


class DataLoss:
    """The scalar that a user trains on, over all batches, for parameters given from outside.

    Means are weighted by each batch's own denominator, so unequal batches, ignored targets and class weights count as
    they do in the mean over the whole data set; sums are added. A loader is read once and kept up to 1 GiB; a larger
    one is read again for every value, and must give the same batches.

    Args:
        model, loss, data: as everywhere. who: named in errors.
    """

    def __init__(self, model: nn.Module, loss: object, data: object, who: str):
        refuse_dropout(model, who)
        self.model, self.loss, self._shell = model, as_loss(loss, who), _Shell(model)
        self._batches: Iterable = _kept(Data(data, who))

    def at(self, params: Mapping[str, Tensor]) -> float:
        """The loss with the named parameters replaced; the model's own are neither read nor written where named."""
        replaced = {f"model.{name}": value for name, value in params.items()}
        return self._total(lambda inputs: torch.func.functional_call(self._shell, replaced, (inputs,)))

    def here(self) -> float:
        """The loss with the model's own parameters."""
        return self._total(self._shell)

    @torch.no_grad()
    def _total(self, run: Callable) -> float:
        parts: list[tuple[float, float]] = []
        first = None
        for index, inputs, target in self._batches:
            output = run(inputs)
            if type(self.loss) is not Loss and hasattr(output, "logits"):  # as the operators read Hugging Face outputs
                output = output.logits
            value = float(self.loss(output, target))
            if index == 0:
                first = inputs, output, target, value
                continue
            if first is not None:  # only now do batches need a weight
                parts.append((first[3], self._weight(*first[:3])))
                first = None
            parts.append((value, self._weight(inputs, output, target)))
        if not parts:
            return first[3]
        if self.loss.reduction == "sum":
            return sum(value for value, _ in parts)
        parts = [(value, weight) for value, weight in parts if weight > 0]  # no target counts in the others
        total = sum(weight for _, weight in parts)
        return sum(value * weight for value, weight in parts) / total if total else float("nan")

    def _weight(self, inputs: object, output: object, target: object) -> float:
        if self.loss.settle(output, target) == "sum":
            return 1.0
        if isinstance(output, Tensor) and output.dim():
            return float(self.loss.denominators(output, target).sum())
        return float(batch_size(inputs))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model may be run within the block; buffers, modes, random state and `.grad` are afterwards as before."""
    with preserved(model), torch.no_grad():
        yield


class _Shell(nn.Module):
    """Takes a batch's input in any form, so that `functional_call` needs one argument."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: object) -> object:
        return call(self.model, inputs)


def _kept(data: Data) -> Iterable:
    if data.in_memory:
        return list(data)
    batches, used = [], 0
    for batch in data:
        batches.append(batch)
        used += sum(x.numel() * x.element_size() for x in tensors_in((batch.inputs, batch.target)))
        if used > KEEP_BYTES:
            return data
    return batches
