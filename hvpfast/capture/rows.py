"""Whose rows they are: whether a layer's rows belong to single samples, found out by pulling back one sample at a time.

Shapes do not tell: `table(arange(T))` is (T, D), used by every sample, and T may equal N; so may a time axis that comes
first. What a sample's output depends on does tell.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from hvpfast.capture.axes import scattered_calls
from hvpfast.capture.layers import rule_of
from hvpfast.capture.pull import last_calls, pull_back

if TYPE_CHECKING:
    from hvpfast.capture.tape import Call, Tape


class Rows(NamedTuple):
    """Calls, by number. scattered: the rows, over the batch's axis and all positions, are not N equal parts in the order of
    the samples. shared: some row serves several samples."""

    scattered: frozenset[int]
    shared: frozenset[int]


UNKNOWN = Rows(frozenset(), frozenset())
_MOST_PROBES = 8
_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple, Rows]] = weakref.WeakKeyDictionary()


def shared_tables(tape: Tape, model: nn.Module, nodes: Iterable[Node], n: int) -> Iterator[tuple[Call, Call]]:
    """Tables looked up once for the whole batch, `tokens (N, T, D) + positions (T, D)`: the call, and what takes its place.

    The gradient of the sum is every sample's own gradient of the table's rows, as if each had looked them up itself.
    """
    tables = {
        c.edge.node: c
        for c in tape.calls
        if c.normal.kind == "rows" and c.row_axes is not None and c.weight is not None
    }
    if not tables:
        return
    users: dict[Node, list[Node]] = {table: [] for table in tables}
    for node in nodes:
        for following, _ in node.next_functions:
            if following in users:
                users[following].append(node)
    for table, call in tables.items():
        if len(users[table]) != 1 or users[table][0].name() != "AddBackward0" or users[table][0]._saved_alpha != 1:
            continue
        (total,) = users[table]
        shape, mine = tuple(total._input_metadata[0].shape), (*call.x.shape, call.weight.shape[-1])
        if shape[0] == n and shape != mine and (shape[1:] == mine or (shape[1:] == mine[1:] and mine[0] == 1)):
            x = call.x.expand(n, *shape[1:-1])
            normal = rule_of(module := model.get_submodule(call.name))(module, x)
            edge = GradientEdge(total, 0)
            yield call, dataclasses.replace(call, x=x, edge=edge, normal=normal, samples=n, extents=shape[2:])


def rows_of(tape: Tape, model: nn.Module | None, output: Tensor, n: int, mixed: bool) -> Rows:
    """What the calls behind `output`, N samples in order, do with their rows.

    From the graph's nodes where those tell (see `axes`). Else two backward passes, of the first and of the last sample that
    the output depends on anything for, that keep one bit a row. Once for a model and a pattern of calls (their layers, and
    which of their axes are as long as the batch).
    `mixed`: see `mixes_samples`.
    """
    if n < 2 or mixed or not output.numel():
        return UNKNOWN  # one sample shares nothing; batch statistics mix samples everywhere, by design
    pattern = pattern_of(tape, n)
    known = _known.setdefault(model, {}) if model is not None else {}
    if pattern in known:
        return known[pattern]
    scattered = scattered_calls(tape, output, n)
    rows, sure = _probe(tape, output, n) if scattered is None else (Rows(frozenset(scattered), frozenset()), True)
    if sure:
        known[pattern] = rows
    return rows


def mixes_samples(modules: Iterable[tuple[str, nn.Module]]) -> bool:
    """Whether one of these layers normalises by the batch's own statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, kind) and (module.training or module.running_mean is None) for _, module in modules)


def pattern_of(tape: Tape, n: int) -> tuple:
    """Which layers were called, and which of their inputs' axes are as long as the batch."""
    return tuple(
        (call.name, id(call.weight), id(call.bias), call.samples == n, tuple(size == n for size in call.x.shape))
        for call in tape.calls
    )


def _probe(tape: Tape, output: Tensor, n: int) -> tuple[Rows, bool]:
    """The verdict, and whether two samples told of it: those whose loss is constant (an ignored target) tell nothing."""
    last = last_calls(tape, output)
    whole = output.detach().new_zeros(output.shape).reshape(n, -1)
    weights = torch.randn(whole.shape[1], generator=torch.Generator().manual_seed(0)).to(whole)
    used: dict[int, dict[int, Tensor]] = {}  # by sample and call: the rows that the gradient reaches
    for sample in sorted(range(n), key=lambda i: min(i, n - 1 - i))[:_MOST_PROBES]:
        seen: dict[int, Tensor] = {}

        def arrived(number: int, grad: Tensor, seen: dict[int, Tensor] = seen) -> None:
            axes = tape.calls[number].row_axes
            if axes is not None:
                seen[number] = (grad != 0).flatten(axes).any(-1).reshape(-1)

        u = whole.clone()
        u[sample] = weights
        pull_back(tape, output, u.reshape(output.shape), last, arrived, retain=True)
        if any(bool(rows.any()) for rows in seen.values()):
            used[sample] = seen
        if len(used) == 2:
            break

    scattered, shared = set(), set()
    for sample, seen in used.items():
        for number, rows in seen.items():
            part = rows.numel() // n
            own = slice(sample * part, (sample + 1) * part)
            if rows.numel() % n or bool(rows.sum() > rows[own].sum()):
                scattered.add(number)
    for number in set.intersection(*(set(seen) for seen in used.values())) if len(used) == 2 else ():
        first, other = (seen[number] for seen in used.values())
        if bool((first & other).any()):
            shared.add(number)
    return Rows(frozenset(scattered), frozenset(shared)), len(used) == 2
