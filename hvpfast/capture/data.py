"""Data in the forms that users have them: one batch, a list of batches, or a loader that can be read again."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvpfast.autocast import as_the_user_has_it
from hvpfast.capture.errors import StateError


class Batch(NamedTuple):
    """One batch: its place in the data, the model's input in any form, and the target."""

    index: int
    inputs: object
    target: object


class Data:
    """Batches in a fixed order, read again for every pass.

    Args:
        data: one (X, y) pair, a list of such pairs, or an iterable of them that can be iterated again (a DataLoader).
            X is a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        who: named in errors.

    Raises:
        TypeError: for anything else, one-shot iterators included. ValueError: for an empty list.
    """

    def __init__(self, data: object, who: str):
        self.who = who
        self.in_memory = True
        if _is_pair(data):
            self._source: Iterable = [_usable(data)]
        elif isinstance(data, (list, tuple)):
            if not data:
                raise ValueError(f"{who}: the list of batches is empty; it must hold at least one (X, y) pair")
            for index, item in enumerate(data):
                if not _is_pair(item):
                    raise TypeError(
                        f"{who}: data[{index}] is {_described(item)}; every batch must be an (X, y) pair, X a tensor, a "
                        f"tuple or a dict"
                    )
            self._source = [_usable(item) for item in data]
        elif isinstance(data, (Tensor, Mapping, str, bytes)) or not hasattr(data, "__iter__"):
            raise TypeError(
                f"{who}: data is {_described(data)}; it must be one (X, y) pair, a list of such pairs, or a DataLoader"
            )
        elif iter(data) is data:
            raise TypeError(
                f"{who}: data is a one-shot iterator ({type(data).__name__}), which a second product would find empty; "
                f"pass list(data), or the loader itself"
            )
        else:
            self._source, self.in_memory = data, False
        self._prints: list[tuple] | None = None
        self.passes = 0

    def __iter__(self) -> Iterator[Batch]:
        """Batches in order. From the second pass over a loader on, each is compared with what the first pass saw, under
        another random state: iterate within `state.preserved`.

        Raises:
            StateError: another order or other values than in the first pass. ValueError: no batch at all.
        """
        prints: list[tuple] = []
        if not self.in_memory and self._prints is not None:
            # The caller puts the random state back after every pass, which would hide a loader that draws.
            torch.default_generator.manual_seed(self.passes)
        for index, item in enumerate(self._source):
            if not _is_pair(item):
                raise TypeError(f"{self.who}: batch {index} is {_described(item)}; it must be an (X, y) pair")
            if not self.in_memory:
                prints.append(_fingerprint(item))
                if self._prints is not None and (index >= len(self._prints) or prints[-1] != self._prints[index]):
                    raise StateError(self._changed(index))
            item = item if self.in_memory else _usable(item)
            yield Batch(index, item[0], item[1])
        if not self.in_memory:
            if not prints:
                raise ValueError(f"{self.who}: the loader is empty: it gave no batch")
            if self._prints is not None and len(prints) != len(self._prints):
                raise StateError(self._changed(len(prints)))
            self._prints = prints
        self.passes += 1

    @property
    def single(self) -> bool:
        """Whether there is one batch and no more, known without reading."""
        return self.in_memory and len(self._source) == 1

    def versions(self) -> list[int]:
        """Version counters of in-memory data: they differ after a tensor was written to."""
        return [x._version for item in self._source for x in tensors_in(item)] if self.in_memory else []

    def _changed(self, index: int) -> str:
        samplers = (getattr(self._source, "sampler", None), getattr(self._source, "batch_sampler", None))
        shuffles = any(
            isinstance(getattr(sampler, "sampler", sampler), torch.utils.data.RandomSampler) for sampler in samplers
        )
        cause = (
            "the loader shuffles (shuffle=True): every product would see other batches; use shuffle=False"
            if shuffles
            else "the loader gives other data in every pass: a sampler that shuffles or an augmentation that draws at "
            "random; fix the order and the values, or pass list(loader)"
        )
        return f"{self.who}: batch {index} is not the one that the first pass saw: {cause}"


def _is_pair(item: object) -> bool:
    """Whether `item` is (X, y). A list [X, y] of tensors is a pair too: DataLoaders collate to lists."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        return False
    if isinstance(item, list) and all(_is_pair(part) for part in item):
        return False
    return isinstance(item[0], (Tensor, Mapping, tuple, list)) and (
        isinstance(item[0], (Tensor, Mapping)) or _has_tensor(item[0])
    )


def _has_tensor(item: object) -> bool:
    return any(isinstance(part, (Tensor, Mapping)) for part in item)


def _described(item: object) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {tuple(item.shape)}"
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {len(item)}"
    return f"a {type(item).__name__}"


def tensors_in(item: object) -> list[Tensor]:
    """Every tensor inside nested tuples, lists and dicts, in order."""
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, Mapping):
        return [x for value in item.values() for x in tensors_in(value)]
    if isinstance(item, (tuple, list)):
        return [x for value in item for x in tensors_in(value)]
    return []


def _usable(item: object) -> object:
    """The batch; where tensors of it were made in inference mode, which autograd does not take, with copies of these."""
    if not any(x.is_inference() for x in tensors_in(item)):
        return item
    with torch.inference_mode(False):
        return _copied(item)


def _copied(item: object) -> object:
    if isinstance(item, Tensor):
        return item.clone() if item.is_inference() else item
    if isinstance(item, Mapping):
        return {name: _copied(value) for name, value in item.items()}
    return type(item)(_copied(value) for value in item) if isinstance(item, (tuple, list)) else item


def batch_size(inputs: object) -> int:
    """N: the first extent of the first tensor of the model's input."""
    found = [x for x in tensors_in(inputs) if x.dim()]
    return found[0].shape[0] if found else 0


@torch.no_grad()
def _fingerprint(item: object) -> tuple:
    """Shapes and two sums of every tensor, one of them weighted by position, so that a new order shows."""
    marks = []
    for x in tensors_in(item):
        flat = x.detach().reshape(-1)
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
        flat = flat.double()
        ramp = torch.arange(1, flat.numel() + 1, device=flat.device, dtype=torch.float64)
        marks.append((tuple(x.shape), repr(float(flat.sum())), repr(float(flat @ ramp)) if flat.numel() else "0"))
    return tuple(marks)


def call(model: nn.Module, inputs: object) -> object:
    """Run the model on a batch's input: a tensor as it is, a dict as keywords, a tuple or list as arguments; the
    container itself where the model's forward takes just that one argument. Autocast is the user's."""
    with as_the_user_has_it():
        if isinstance(inputs, Mapping):
            return model(**inputs) if _binds(model, (), dict(inputs)) else model(inputs)
        if isinstance(inputs, (tuple, list)):
            return model(*inputs) if _binds(model, tuple(inputs), {}) else model(inputs)
        return model(inputs)


def _binds(model: nn.Module, args: tuple, kwargs: dict) -> bool:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # no signature to be had
        return True
    return True
