"""The linear maps inside `nn.MultiheadAttention`, found in the autograd graph: its forward calls no module for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from hvpfast.capture.layers import Normal


@dataclass
class Projection:
    """One use of a projection: its parameters, its node in the graph, and its normal form."""

    name: str
    weight: Tensor | None
    bias: Tensor | None
    node: Node
    x: Tensor
    normal: Normal

    @property
    def edge(self) -> GradientEdge:
        return GradientEdge(self.node, 0)


def projections(
    modules: Iterable[tuple[str, nn.Module]], nodes: Iterable[Node], leaves: dict[Node, Tensor], samples: int
) -> list[Projection]:
    """Every use of an attention layer's packed input projection and output projection, as linear maps over tokens.

    Args:
        modules: named modules, attention layers among them. nodes: of the graph. leaves: a parameter of each leaf node.
        samples: N. The layer works with tokens first: rows of both projections are (T N), the sample fastest.
    """
    names: dict[int, str] = {}  # of weights and biases alike
    for name, module in modules:
        if type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim:
            for part, owned in (("in_proj", module.in_proj_weight), ("out_proj", module.out_proj.weight)):
                names[id(owned)] = f"{name}.{part}"
            for part, owned in (("in_proj", module.in_proj_bias), ("out_proj", module.out_proj.bias)):
                if owned is not None:
                    names[id(owned)] = f"{name}.{part}"
    found: list[Projection] = []
    added: list[tuple[Node, Tensor]] = []
    for node in nodes if names else ():
        kind = node.name()
        parts = [part for part, _ in node.next_functions]
        if kind == "AddBackward0" and parts[-1] in leaves and id(leaves[parts[-1]]) in names:
            added.append((node, leaves[parts[-1]]))  # a bias on its own, after a product
        if kind not in ("AddmmBackward0", "MmBackward0"):
            continue
        transpose = parts[-1]  # the weight enters transposed
        if transpose is None or transpose.name() != "TBackward0":
            continue
        weight = leaves.get(transpose.next_functions[0][0])
        if weight is None or id(weight) not in names:
            continue
        bias = leaves.get(parts[0]) if kind == "AddmmBackward0" else None
        x = (node._saved_mat1 if kind == "AddmmBackward0" else node._saved_self).detach()
        if samples and x.shape[0] % samples == 0:
            normal = _normal(x, weight.shape[0], samples)
            found.append(Projection(names[id(weight)], weight, bias, node, x, normal))
    inputs = {one.name: one.x for one in found}
    for node, bias in added:
        x = inputs.get(names[id(bias)])
        if x is not None:
            normal = _normal(x, bias.shape[0], samples)
            found.append(Projection(names[id(bias)], None, bias, node, x, normal))
    return found


def _normal(x: Tensor, width: int, n: int) -> Normal:
    return Normal(_tokens(x, n, 1), _gradient(width, x.shape[0], n), positions=x.shape[0] // n)


def _tokens(x: Tensor, n: int, k: int) -> Callable[[], Tensor]:
    """(K T N, width) -> (1, K N, T, width)"""
    return lambda: x.reshape(k, -1, n, x.shape[-1]).transpose(1, 2).reshape(1, k * n, -1, x.shape[-1])


def _gradient(width: int, rows: int, n: int) -> Callable[[Tensor], Tensor]:
    return lambda g: _tokens(g.reshape(-1, width), n, g.numel() // max(1, width * rows))()
