"""Diagonal blocks: which parameters form one, and how their vectors read as matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpfast.capture.sites import TIED
from hvpfast.capture.tape import Call, Tape


@dataclass(frozen=True)
class Layout:
    """Vectors of a (weight, bias) pair as B matrices (O, I) of a grouped linear map; the bias is the last column.

    Attributes:
        groups, outputs, inputs: B, O of a group, and I of a group, the bias's column included.
        kind: of the layer's normal form; "upsampled" for a transposed convolution.
        weight, bias: shapes, or None where the parameter is no part of the block.
    """

    groups: int
    outputs: int
    inputs: int
    kind: str
    weight: tuple[int, ...] | None
    bias: tuple[int, ...] | None

    def join(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """(K, *weight.shape) and (K, *bias.shape) -> (K, B, O, I)"""
        parts = []
        if weight is not None:
            k, b, o = weight.shape[0], self.groups, self.outputs
            if self.kind in ("transposed", "rows"):
                parts.append(weight.mT.unsqueeze(1))
            elif self.kind == "upsampled":  # (C, O, *kernel), C = B * I / kernel
                parts.append(weight.reshape(k, b, -1, o, weight.shape[3:].numel()).transpose(2, 3).reshape(k, b, o, -1))
            else:
                parts.append(weight.reshape(k, b, o, -1))
        if bias is not None:
            parts.append(bias.reshape(bias.shape[0], self.groups, self.outputs, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 3)

    def split(self, v: Tensor) -> list[Tensor]:
        """The inverse of `join`: the parameters that are there, weight first."""
        k, parts = v.shape[0], []
        if self.weight is not None:
            w = v[..., :-1] if self.bias is not None else v
            if self.kind in ("transposed", "rows"):
                w = w[:, 0].mT
            elif self.kind == "upsampled":
                w = w.reshape(*v.shape[:3], self.weight[0] // self.groups, -1).transpose(2, 3)
            parts.append(w.reshape(k, *self.weight))
        if self.bias is not None:
            parts.append(v[..., -1].reshape(k, *self.bias))
        return parts


@dataclass(frozen=True)
class Unit:
    """One diagonal block.

    Attributes:
        name: of the module. names: of the parameters, weight first. layout: of a Kronecker block; None for a block that is
            made of rows (norm layers, and whatever comes from autograd). calls: numbers on the tape.
        own: whether layer rules give the rows; else autograd does.
    """

    name: str
    names: tuple[str, ...]
    layout: Layout | None
    calls: tuple[int, ...]
    own: bool = True

    def same(self, other: Unit) -> bool:
        return (self.names, self.layout, self.own) == (other.names, other.layout, other.own)


def units_of(tape: Tape, names: Sequence[str], params: Sequence[Tensor], covered: Sequence[bool]) -> list[Unit]:
    """The blocks of the parameters, in their order: a layer's weight together with its bias, as one linear map (W | b).

    A weight that is used with and without a bias, or with several, is a block of its own, and so are the biases. What is
    no linear map is a block for each module: a norm layer's scale and shift, a table that is also a Linear's weight (a
    sum of two Kronecker products, and no one of them), and what no rule covers.
    """
    calls = _merged(tape.calls)
    owner = {id(p): name for name, p in zip(names, params, strict=True)}
    rules = {id(p) for p, own in zip(params, covered, strict=True) if own}
    units: list[Unit] = []
    loose: dict[str, list[tuple[Tensor, bool]]] = {}
    done: set[int] = set()
    for p, own in zip(params, covered, strict=True):
        if id(p) in done:
            continue
        uses = {i: c for i, c in calls.items() if c.weight is p or c.bias is p}
        kinds = {c.normal.kind for c in uses.values()}
        if not own or "scale" in kinds or kinds == TIED:
            loose.setdefault(owner[id(p)].rpartition(".")[0], []).append((p, own))
            continue
        partner = _partner(p, uses, calls, rules)
        weight, bias = (p, partner) if any(c.weight is p for c in uses.values()) else (partner, p)
        units.append(_linear_unit(weight, bias, uses, owner))
        done.update(id(x) for x in (weight, bias) if x is not None)
    for module, pairs in loose.items():
        mine, own = [p for p, _ in pairs], all(own for _, own in pairs)
        numbers = tuple(i for i, c in calls.items() if own and any(c.weight is p or c.bias is p for p in mine))
        units.append(Unit(module, tuple(owner[id(p)] for p in mine), None, numbers, own))
    place = {name: i for i, name in enumerate(names)}
    return sorted(units, key=lambda unit: min(place[name] for name in unit.names))


def _merged(calls: Sequence[Call]) -> dict[int, Call]:
    """Calls by number, with a weight's and a bias's share of one projection (same name, same input) made one call."""
    merged: dict[int, Call] = {}
    halves: dict[tuple, int] = {}
    for i, call in enumerate(calls):
        key = (call.name, call.x.data_ptr(), call.x.shape)
        if call.weight is None and key in halves and call.normal.kind == "linear":
            first = merged[halves.pop(key)]
            if first.bias is None and first.name.endswith("_proj"):
                first.bias = call.bias
                continue
        if call.bias is None:
            halves[key] = i
        merged[i] = call
    return merged


def _partner(p: Tensor, uses: dict[int, Call], calls: dict[int, Call], rules: set[int]) -> Tensor | None:
    """The weight of this bias, or the bias of this weight, if each is used with the other and with nothing else."""
    others = {id(c.bias if c.weight is p else c.weight): c.bias if c.weight is p else c.weight for c in uses.values()}
    if len(others) != 1:
        return None
    (other,) = others.values()
    if other is None or id(other) not in rules:
        return None
    same = all(c.weight is p or c.bias is p for c in calls.values() if c.weight is other or c.bias is other)
    return other if same else None


def _linear_unit(weight: Tensor | None, bias: Tensor | None, uses: dict[int, Call], owner: dict[int, str]) -> Unit:
    normal = next(iter(uses.values())).normal
    kind, groups = "upsampled" if normal.kronecker is not None else normal.kind, normal.groups
    inputs = int(bias is not None)
    if weight is None:
        outputs = bias.numel() // groups
    elif kind in ("transposed", "rows"):
        outputs, inputs = weight.shape[1], inputs + weight.shape[0]
    elif kind == "upsampled":
        outputs = weight.shape[1]
        inputs += weight.numel() // (outputs * groups)
    else:
        outputs = weight.shape[0] // groups
        inputs += weight[0].numel()
    layout = Layout(
        groups,
        outputs,
        inputs,
        kind,
        None if weight is None else tuple(weight.shape),
        None if bias is None else tuple(bias.shape),
    )
    names = tuple(owner[id(x)] for x in (weight, bias) if x is not None)
    return Unit(names[0].rpartition(".")[0], names, layout, tuple(uses))
