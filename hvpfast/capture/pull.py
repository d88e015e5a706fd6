"""Gradients at the outputs of a tape's calls and nowhere else: a backward pass that forms no weight's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import Node

if TYPE_CHECKING:
    from hvpfast.capture.tape import Tape

Receive = Callable[[int, Tensor], None]  # number of a call, gradient (N, *output) of one column at its output


def last_calls(tape: Tape, output: Tensor) -> set[int]:
    """Calls behind which no other call is: no backward pass goes through their nodes, so they are asked for."""
    nodes = {call.edge.node: i for i, call in enumerate(tape.calls)}
    behind: dict[Node, bool] = {}  # whether a call's output is found from the node on
    stack: list[tuple[Node, bool]] = [(output.grad_fn, False)]
    while stack:
        node, seen = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if seen:
            behind[node] = any(child in nodes or behind[child] for child in children)
        elif node not in behind:
            behind[node] = False
            stack.append((node, True))
            stack.extend((child, False) for child in children if child not in behind)
    return {i for i, call in enumerate(tape.calls) if not behind.get(call.edge.node, False)}


def pull_back(tape: Tape, output: Tensor, u: Tensor, last: set[int], arrived: Receive, retain: bool) -> None:
    """Run the column u, shaped like the output, back; `arrived` gets each call's gradient, which it may drop.

    Args:
        last: what `last_calls` found. retain: whether the graph is needed again.
    """
    calls, handles = tape.calls, []
    asked = sorted(last)

    def hook(number: int) -> Callable[[Sequence[Tensor | None]], None]:
        def pre(grads: Sequence[Tensor | None]) -> None:
            grad = grads[calls[number].edge.output_nr]
            if grad is not None:
                arrived(number, grad.detach())

        return pre

    if not asked:
        return
    try:
        for i, call in enumerate(calls):
            if i not in last:
                handles.append(call.edge.node.register_prehook(hook(i)))
        edges = [calls[i].edge for i in asked]
        grads = torch.autograd.grad([output], edges, [u], retain_graph=retain, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for i, grad in zip(asked, grads, strict=True):
        if grad is not None:
            arrived(i, grad.detach())
