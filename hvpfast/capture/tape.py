"""What one run of the model leaves behind: each layer's input, and where its output's gradient will be.

Layers with a rule are hooked; a parameter is covered if every one of its uses in the graph is such a call (counted in
the autograd graph, so that functional uses, parametrisations and checkpoints are noticed). The rest is autograd's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hvpfast import ops
from hvpfast.capture.errors import StateError
from hvpfast.capture.layers import Normal, rule_of


@dataclass
class Call:
    """One call of a layer: its parameters, its normal form, and the place of its output in the graph."""

    name: str
    weight: Tensor | None
    bias: Tensor | None
    x: Tensor
    version: int
    edge: GradientEdge
    normal: Normal

    def check(self) -> None:
        if self.x._version != self.version:
            raise StateError(
                f"the input of layer {self.name!r} was changed in place after the layer used it; its gradient would be "
                f"wrong: replace the in-place operation in the model's forward"
            )


class Tape:
    """The calls of one forward pass, in order. Filled within `recording`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def covered(self, output: Tensor, params: Sequence[Tensor]) -> list[bool]:
        """For each parameter, whether all its uses behind `output` are calls on this tape, with the batch first."""
        uses = graph_uses(output, params)
        n = output.shape[0]
        doubtful: set[int] = set()
        counts = {id(p): 0 for p in params}
        for call in self.calls:
            mine = [id(p) for p in (call.weight, call.bias) if p is not None]
            for p in mine:
                counts[p] = counts.get(p, 0) + 1
            if call.x.shape[0] != n or (
                call.x.dim() > 2 and call.x.shape[1] == n > 1 and not self._batch_first(call, output)
            ):
                doubtful.update(mine)
        return [uses[i] > 0 and counts[id(p)] == uses[i] and id(p) not in doubtful for i, p in enumerate(params)]

    @staticmethod
    def _batch_first(call: Call, output: Tensor) -> bool:
        """Where a second axis has the batch's extent too: does the first sample's output depend on row 0 alone?"""
        (g,) = torch.autograd.grad(output[0].sum(), [call.edge], retain_graph=True, allow_unused=True)
        return g is None or not bool(g[1:].any())

    def sites(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Site]:
        """For each parameter its `Site`, from the gradients (M, *output) at every call's output (None: not reached)."""
        built = []
        for p in params:
            weight_uses = [(c, g) for c, g in zip(self.calls, grads, strict=True) if c.weight is p and g is not None]
            bias_uses = [(c, g) for c, g in zip(self.calls, grads, strict=True) if c.bias is p and g is not None]
            built.append(Site.of(p, weight_uses, bias_uses))
        return built


@contextlib.contextmanager
def recording(model: nn.Module, params: Sequence[Tensor]) -> Iterator[Tape]:
    """Within the block, calls of layers with a rule that own any of `params` go onto the tape."""
    tape, wanted, handles = Tape(), {id(p) for p in params}, []

    def hook(name: str):
        def record(module: nn.Module, args: tuple, output: Tensor) -> None:
            rule = rule_of(module)
            if rule is None or not isinstance(output, Tensor) or not output.requires_grad:
                return
            x = args[0].detach() if args else None
            if x is None or x.dim() < 2 or output.dim() != x.dim():
                return
            weight, bias = (p if p is not None and id(p) in wanted else None for p in (module.weight, module.bias))
            tape.calls.append(Call(name, weight, bias, x, x._version, get_gradient_edge(output), rule(module, x)))

        return record

    try:
        for name, module in model.named_modules():
            if rule_of(module) is not None and any(
                id(p) in wanted for p in module._parameters.values() if p is not None
            ):
                # First of all hooks, so that the output is the layer's own.
                handles.append(module.register_forward_hook(hook(name), prepend=True))
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def graph_uses(output: Tensor, params: Sequence[Tensor]) -> list[int]:
    """How many edges of the graph behind `output` end in each parameter."""
    leaves = {get_gradient_edge(p).node: i for i, p in enumerate(params)}
    uses, stack = [0] * len(params), [output.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        for following, _ in node.next_functions:
            if following in leaves:
                uses[leaves[following]] += 1
            elif following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return uses


@dataclass
class Site:
    """One parameter as the ops see it: a weight with `a` and `g` of each group, all its uses side by side along T
    (which sums over them exactly), or a bias with its per-sample gradients, (M, O)."""

    shape: tuple[int, ...]
    groups: list[tuple[Tensor, Tensor]]  # (a, g) of each group; empty for a bias
    bias: Tensor | None

    @staticmethod
    def of(p: Tensor, weight_uses: list[tuple[Call, Tensor]], bias_uses: list[tuple[Call, Tensor]]) -> Site:
        bias = None
        for call, grad in bias_uses:
            g = call.normal.grads(grad)  # (G, M, T, O)
            rows = _wide(g).sum(2).permute(1, 0, 2).reshape(g.shape[1], -1)
            bias = rows if bias is None else bias + rows
        groups: list[tuple[Tensor, Tensor]] = []
        if weight_uses:
            pairs = []
            for call, grad in weight_uses:
                call.check()
                pairs.append((call.normal.inputs(), call.normal.grads(grad)))
            a = pairs[0][0] if len(pairs) == 1 else torch.cat([x for x, _ in pairs], 2)
            g = pairs[0][1] if len(pairs) == 1 else torch.cat([x for _, x in pairs], 2)
            groups = [(x, y.to(x.dtype)) for x, y in zip(a.unbind(0), g.unbind(0), strict=True)]
        return Site(tuple(p.shape), groups, bias)

    def __post_init__(self) -> None:
        if self.groups and self.bias is not None:
            raise StateError(f"a parameter of shape {self.shape} serves both as a weight and as a bias; it has no rule")

    @property
    def rows(self) -> int:
        """M, or 0 if no data reach the parameter."""
        return self.bias.shape[0] if self.bias is not None else self.groups[0][1].shape[0] if self.groups else 0

    def tensors(self) -> list[Tensor]:
        """What the site keeps alive."""
        return [x for pair in self.groups for x in pair] + ([] if self.bias is None else [self.bias])

    def _split(self, w: Tensor) -> list[Tensor]:
        """(K, *shape) -> (K, O, I) for each group."""
        a, g = self.groups[0]
        return list(w.reshape(w.shape[0], len(self.groups), g.shape[2], a.shape[2]).unbind(1))

    def sample_grads(self) -> Tensor:
        """(M, *shape)"""
        if self.bias is not None:
            return self.bias.reshape(-1, *self.shape)
        if len(self.groups) == 1:
            return ops.sample_grads(*self.groups[0]).reshape(-1, *self.shape)
        return torch.stack([ops.sample_grads(a, g) for a, g in self.groups], 1).reshape(-1, *self.shape)

    def norms_squared(self) -> Tensor:
        """(M,)"""
        if self.bias is not None:
            return self.bias.square().sum(1)
        return sum(ops.sample_norms_squared(a, g) for a, g in self.groups)

    def dots(self, w: Tensor) -> Tensor:
        """Inner products with K directions (K, *shape) -> (M, K)."""
        if self.bias is not None:
            return self.bias @ w.reshape(w.shape[0], -1).T.to(self.bias.dtype)
        return sum(ops.sample_dots(a, g, v.to(a.dtype)) for (a, g), v in zip(self.groups, self._split(w), strict=True))

    def weighted(self, c: Tensor) -> Tensor:
        """Weighted sums (M, K) -> (K, *shape)."""
        if self.bias is not None:
            return (c.T.to(self.bias.dtype) @ self.bias).reshape(-1, *self.shape)
        sums = [ops.weighted_grad(a, g, c.to(a.dtype)) for a, g in self.groups]
        return (sums[0] if len(sums) == 1 else torch.stack(sums, 1)).reshape(-1, *self.shape)

    def second_moment(self) -> Tensor:
        """Sum of squares, `shape`."""
        if self.bias is not None:
            return self.bias.square().sum(0).reshape(self.shape)
        return torch.stack([ops.second_moment(a, g) for a, g in self.groups]).reshape(self.shape)

    def gram(self) -> Tensor:
        """Inner products of the rows' gradients, (M, M)."""
        if self.bias is not None:
            return self.bias @ self.bias.T
        flat = self.sample_grads().reshape(self.rows, -1)
        return flat @ flat.T


def _wide(x: Tensor) -> Tensor:
    return x.to(ops.accumulate_dtype(x.dtype))
