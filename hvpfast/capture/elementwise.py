"""Parameters that a model multiplies with or adds to its activations itself: scales of custom norm layers, learned positions.

No module of their own tells of them, so they are found in the autograd graph, as the sum or product that they enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from hvpfast.capture.layers import Normal


@dataclass
class Elementwise:
    """One use: the factor's or the summand's parameter, the node of the result (N, ..., *features), what it multiplies."""

    weight: Tensor | None
    bias: Tensor | None
    node: Node
    x: Tensor
    normal: Normal
    shape: torch.Size

    @property
    def edge(self) -> GradientEdge:
        return GradientEdge(self.node, 0)


def elementwise(nodes: Iterable[Node], leaves: dict[Node, Tensor], taken: set[int], n: int) -> Iterator[Elementwise]:
    """The uses of every parameter that no call has (`taken`: ids of those that one has) with the batch's extent N first.

    The parameter's axes are the result's last ones, over which the rest is broadcast: (D,), (T, D), (1, T, D).
    """
    for node in nodes:
        if node.name() not in ("MulBackward0", "AddBackward0"):
            continue
        for place, (following, _) in enumerate(node.next_functions):
            p = leaves.get(following)
            if p is None or id(p) in taken:
                continue
            shape, own = torch.Size(node._input_metadata[0].shape), p.shape
            while own and own[0] == 1:
                own = own[1:]
            if not own or len(shape) <= len(own) or shape[0] != n or shape[-len(own) :] != own:
                continue
            if node.name() == "AddBackward0":
                if place == 0 or node._saved_alpha == 1:
                    yield Elementwise(None, p, node, p.detach(), _normal(p.detach(), shape, own), shape)
                continue
            try:
                other = node._saved_other if place == 0 else node._saved_self
            except RuntimeError:  # changed in place since: the backward pass says so
                continue
            if isinstance(other, Tensor) and other.dtype is p.dtype:
                yield Elementwise(p, None, node, other.detach(), _normal(other.detach(), shape, own), shape)


def _normal(x: Tensor, shape: torch.Size, own: torch.Size) -> Normal:
    """x broadcast to `shape` (N, ..., *own) -> (1, N, T, F)"""
    features = own.numel()
    return Normal(
        lambda: x.expand(shape).reshape(1, shape[0], -1, features),
        lambda g: g.reshape(1, g.shape[0], -1, features),
        "scale",
        positions=shape[1 : len(shape) - len(own)].numel(),
        scaled=lambda: (x.expand(shape).reshape(shape[0], -1, features), {}),
    )
