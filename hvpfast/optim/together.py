"""A step's gradients times the inverses of their blocks: on GPUs those of all layers by one launch a product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvpfast.ops import kron_apply, kron_solve
from hvpfast.optim.layers import KroneckerLayer, Layer

TOGETHER = ("cuda",)  # devices on which launches cost more than what a layer's products do


def precondition(
    layers: Sequence[Layer], grads: Sequence[Sequence[Tensor]], damping: float
) -> list[tuple[list[Tensor], Tensor]]:
    """Each layer's `precondition(grads, damping)`. Layers without an own rule for lists are taken one by one."""
    found: list[tuple[list[Tensor], Tensor] | None] = [None] * len(layers)
    listed: dict[tuple[int, torch.dtype], list[tuple[int, Tensor, tuple[Tensor, ...]]]] = {}
    for index, (layer, own) in enumerate(zip(layers, grads, strict=True)):
        together = isinstance(layer, KroneckerLayer) and own[0].device.type in TOGETHER
        operands = layer.operands(damping) if together else None
        if operands is None:
            found[index] = layer.precondition(own, damping)
        else:
            given = layer.joined(own)
            listed.setdefault((len(operands), given.dtype), []).append((index, given, operands))
    for (count, dtype), some in listed.items():
        sides = list(map(list, zip(*(operands for _, _, operands in some), strict=True)))
        vs = [given[0, 0] for _, given, _ in some]
        solved = kron_solve(vs, *sides, damping) if count == 3 else kron_apply(sides[0], vs, sides[1])
        for (index, given, _), v in zip(some, solved, strict=True):
            found[index] = layers[index].parted(given, v.to(dtype)[None, None])
    return found
