"""What one run of the model leaves behind: each layer's input, and where its output's gradient will be.

Layers with a rule are hooked; a parameter is covered if every one of its uses in the graph is such a call (counted in
the autograd graph, so that functional uses, parametrisations and checkpoints are noticed). The rest is autograd's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from hvpfast.capture.attention import projections
from hvpfast.capture.elementwise import Elementwise, elementwise
from hvpfast.capture.errors import StateError
from hvpfast.capture.layers import Normal, rule_of
from hvpfast.capture.modules import named_modules
from hvpfast.capture.pull import last_calls, pull_back
from hvpfast.capture.rows import UNKNOWN, mixes_samples, rows_of, shared_tables
from hvpfast.capture.sites import TIED, Site, site_of

# Layers whose first axis is the batch by definition.
_BATCH_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


Watch = Callable[[int, "Tensor | Node"], None]


@dataclass
class Call:
    """One call of a layer: its parameters, its normal form, and the place of its output in the graph."""

    name: str
    weight: Tensor | None
    bias: Tensor | None
    x: Tensor | None
    version: int
    edge: GradientEdge
    normal: Normal
    samples: int  # extent of the batch's axis
    row_axes: (
        int | None
    )  # of the output, from the first on, that count rows; None where the rule finds the batch itself
    extents: tuple[int, ...] = ()  # of the output, from its third axis on

    @functools.cached_property
    def kronecker(self) -> Normal:
        """The normal form that Kronecker factors are made from."""
        return self.normal if self.normal.kronecker is None else self.normal.kronecker(self.extents)

    def let_go(self) -> None:
        """Hold the input no longer, only what reads gradients: the graph frees it as the backward pass goes through."""
        self.check()
        self.normal = self.kronecker = self.kronecker.of_gradients()
        self.x = None

    def check(self) -> None:
        if self.x is not None and self.x._version != self.version:
            raise StateError(
                f"the input of layer {self.name!r} was changed in place after the layer used it; its gradient would be "
                f"wrong: replace the in-place operation in the model's forward"
            )


class Tape:
    """The calls of one forward pass, in order. Filled within `recording`; `rows`, by `covered`."""

    def __init__(self, model: nn.Module | None = None, watch: Watch | None = None) -> None:
        self.calls: list[Call] = []
        self.rows = UNKNOWN
        self.modules = [] if model is None else named_modules(model)
        self._model, self._watch = model, watch

    def covered(
        self, output: Tensor, params: Sequence[Tensor], samples: int | None = None, folded: bool = False
    ) -> list[bool]:
        """For each parameter, whether all its uses behind `output` are calls on this tape, with the batch first.

        Completes the tape with the projections of attention layers; ask once, before a backward pass frees the graph.

        Args:
            samples: N, where it is not the output's first extent. folded: take linear maps whatever their first axis is,
                if no row serves several samples: for statistics in which every row and position counts alike.
        """
        leaves = {get_gradient_edge(p).node: p for p in params}
        nodes, uses = graph_uses(output, leaves)
        n = output.shape[0] if samples is None else samples
        for one in projections(self.modules, nodes, leaves, n):
            call = Call(one.name, one.weight, one.bias, one.x, one.x._version, one.edge, one.normal, n, None)
            self._append(call, one.node)
        self._follow_views(nodes)
        mixed = mixes_samples(self.modules)
        if self._model is not None:
            for call, spread in list(shared_tables(self, self._model, nodes, n)):
                call.weight = call.bias = None
                self._append(spread, spread.edge.node)
            taken = {id(p) for call in self.calls for p in (call.weight, call.bias)}
            if not mixed and not all(id(p) in taken for p in params):
                for one in elementwise(nodes, leaves, taken, n):
                    axes = len(one.shape) - 1
                    call = Call(
                        self._name(one), one.weight, one.bias, one.x, one.x._version, one.edge, one.normal, n, axes
                    )
                    self._append(call, one.node)
        doubtful: set[int] = set()
        counts = {id(p): 0 for p in params}
        kinds: dict[int, set[str]] = {}
        for call in self.calls:
            for p, kind in zip((call.weight, call.bias), (call.normal.kind, "bias"), strict=True):
                if p is not None:
                    counts[id(p)] = counts.get(id(p), 0) + 1
                    kinds.setdefault(id(p), set()).add(kind)
        # Tied across different kinds of layers: no one rule has all of it.
        doubtful.update(p for p, mine in kinds.items() if len(mine) > 1 and mine != TIED)
        self.rows = rows_of(self, self._model, output, n, mixed)
        for number, call in enumerate(self.calls):
            mine = [id(p) for p in (call.weight, call.bias) if p is not None]
            strict = not folded or call.normal.kind == "scale" or any(kinds[p] == TIED for p in mine)
            if (call.samples != n or number in self.rows.scattered) if strict else (number in self.rows.shared):
                doubtful.update(mine)
        return [uses[id(p)] > 0 and counts[id(p)] == uses[id(p)] and id(p) not in doubtful for p in params]

    def _follow_views(self, nodes: Sequence[Node]) -> None:
        """A Linear of three axes returns a view of a product of two. Where the model changes it in place (an in-place ReLU), the
        view is no longer in the graph and the product, (N T, O), is: its gradient is the one to take."""
        views = [number for number, call in enumerate(self.calls) if call.edge.node.name() == "ViewBackward0"]
        there = set(nodes) if views else set()
        for number in views:
            call = self.calls[number]
            product = GradientEdge(*call.edge.node.next_functions[0])
            if call.edge.node in there or product.node not in there:
                continue
            shape, grads = call.edge.node._input_metadata[0].shape[1:], call.normal.grads

            def unfolded(g: Tensor, shape: Sequence[int] = shape, grads: Callable = grads) -> Tensor:
                return grads(g.reshape(-1, *shape))

            call.edge, call.row_axes = product, len(product.node._input_metadata[product.output_nr].shape) - 1
            call.normal = replace(call.normal, grads=unfolded)
            if self._watch is not None:
                self._watch(number, product.node)

    def _name(self, one: Elementwise) -> str:
        p = one.bias if one.weight is None else one.weight
        return next((name for name, q in self._model.named_parameters() if q is p), "")

    def _append(self, call: Call, node: Node) -> None:
        self.calls.append(call)
        if self._watch is not None:
            self._watch(len(self.calls) - 1, node)

    def sites(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Site]:
        """For each parameter its `Site`, from the gradients (M, *output) at every call's output (None: not reached)."""
        reached = {number: grad for number, grad in enumerate(grads) if grad is not None}
        return [self._site(p, numbers, reached) for p, numbers in zip(params, self._uses(params), strict=True)]

    def stream(
        self, params: Sequence[Tensor], output: Tensor, u: Tensor, receive: Callable[[int, Site], None], retain: bool
    ) -> None:
        """Run u, shaped like the output, back; `receive` gets each parameter's number and `Site` as soon as its last use has
        its gradient. Then neither the gradients nor, unless the graph is retained, the inputs of its uses are held.
        """
        uses = self._uses(params)
        left = [set(numbers) for numbers in uses]
        waiting: list[list[int]] = [[] for _ in self.calls]
        for i, numbers in enumerate(uses):
            for number in numbers:
                waiting[number].append(i)
        unread = [len(some) for some in waiting]
        grads: dict[int, Tensor] = {}

        def finish(done: Sequence[int]) -> None:
            # All of a call's at once: a scale and its shift share a pass.
            sites = [self._site(params[i], uses[i], grads) for i in done]
            for i in done:
                for number in uses[i]:
                    unread[number] -= 1
                    if unread[number] == 0:
                        grads.pop(number, None)
                        if not retain:
                            self.calls[number].x = self.calls[number].normal = None
            for i in done:
                receive(i, sites.pop(0))

        def arrived(number: int, grad: Tensor) -> None:
            if not waiting[number]:
                return
            grads[number] = grad
            for i in waiting[number]:
                left[i].discard(number)
            finish([i for i in waiting[number] if not left[i]])

        pull_back(self, output, u, last_calls(self, output), arrived, retain)
        finish([i for i, some in enumerate(left) if some or not uses[i]])  # uses that the output does not depend on

    def _uses(self, params: Sequence[Tensor]) -> list[list[int]]:
        """Of each parameter the numbers of the calls that use it."""
        found: dict[int, list[int]] = {id(p): [] for p in params}
        for number, call in enumerate(self.calls):
            for p in (call.weight, call.bias):
                if p is not None and id(p) in found:
                    found[id(p)].append(number)
        return [found[id(p)] for p in params]

    def _site(self, p: Tensor, numbers: Sequence[int], grads: Mapping[int, Tensor]) -> Site:
        uses = [(self.calls[number], grads[number]) for number in numbers if number in grads]
        for call, _ in uses:
            if call.weight is p:
                call.check()
        as_weight = [(c.normal, g) for c, g in uses if c.weight is p]
        as_bias = [(c.normal, g) for c, g in uses if c.bias is p]
        return site_of(tuple(p.shape), as_weight, as_bias, uses[0][0].samples if uses else 0)


@contextlib.contextmanager
def recording(model: nn.Module, params: Sequence[Tensor], watch: Watch | None = None) -> Iterator[Tape]:
    """Within the block, calls of layers with a rule that own any of `params` go onto the tape.

    `watch` is told each call's number and the layer's own output, or its node in the graph.
    """
    tape, wanted, handles = Tape(model, watch), {id(p) for p in params}, []

    def hook(name: str):
        def record(module: nn.Module, args: tuple, named: dict, output: Tensor) -> None:
            rule = rule_of(module)
            if rule is None or not isinstance(output, Tensor) or not output.requires_grad:
                return
            args = args or tuple(named.values())
            x = args[0].detach() if args and isinstance(args[0], Tensor) else None
            if x is None or x.dim() < 1 or output.dim() < 2:
                return
            if isinstance(module, _BATCH_FIRST) and x.dim() == len(getattr(module, "kernel_size", ())) + 1:
                return  # an image without a batch axis
            normal = rule(module, x)
            if normal is None:
                return
            mine = (module._parameters.get("weight"), module._parameters.get("bias"))
            weight, bias = (p if p is not None and id(p) in wanted else None for p in mine)
            edge, extents = get_gradient_edge(output), tuple(output.shape[2:])
            axes = 1 if isinstance(module, _BATCH_FIRST) else output.dim() - 1
            tape.calls.append(Call(name, weight, bias, x, x._version, edge, normal, x.shape[0], axes, extents))
            if watch is not None:
                watch(len(tape.calls) - 1, output)

        return record

    try:
        for name, module in tape.modules:
            if any(id(p) in wanted for p in module._parameters.values()) and rule_of(module) is not None:
                # First of all hooks, so that the output is the layer's own.
                handles.append(module.register_forward_hook(hook(name), prepend=True, with_kwargs=True))
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def graph_uses(output: Tensor, leaves: dict[Node, Tensor]) -> tuple[list[Node], dict[int, int]]:
    """The graph's nodes behind `output`, and how many of their edges end in each leaf (by the id of its tensor)."""
    uses, stack = {id(p): 0 for p in leaves.values()}, [output.grad_fn]
    seen = {output.grad_fn: None}
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions if node is not None else ():
            if following in leaves:
                uses[id(leaves[following])] += 1
            elif following is not None and following not in seen:
                seen[following] = None
                stack.append(following)
    return [node for node in seen if node is not None], uses
