"""Matrices of the form `J' S J`: generalised Gauss-Newton, Fisher, and the second moment of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hvpfast.capture.data import Batch
from hvpfast.capture.problem import Evaluated
from hvpfast.capture.sites import Site
from hvpfast.capture.tape import Tape, recording
from hvpfast.operators.curvature import Curvature
from hvpfast.operators.linearize import Derivative, Jacobian, go_together, saved_bytes

_MOST_ROOTS = 32  # classes up to which the exact block-diagonal GGN is made of captured rows


class Piece:
    """`J' S J v` of one batch, whole or block by block: J the output's Jacobian, S a matrix on outputs."""

    def __init__(self, jacobian: Jacobian, middle: Callable[[Tensor], Tensor], blocks: list[list[int]] | None):
        self._jacobian, self._middle, self._blocks = jacobian, middle, blocks
        self.reached, self.samples = jacobian.reached, jacobian.f.shape[0]

    def product(self, parts: Sequence[Tensor]) -> list[Tensor | None]:
        if self._blocks is None:
            return self._jacobian.vjp(self._middle(self._jacobian.jvp(parts)))
        results: list[Tensor | None] = [None] * len(parts)
        for block in self._blocks:
            pulled = self._jacobian.vjp(self._middle(self._jacobian.jvp(parts, block)), block)
            for i, result in zip(block, pulled, strict=True):
                results[i] = result
        return results

    def bytes(self) -> int:
        return self._jacobian.bytes


class RowsPiece:
    """`sum_m w_m r_m r_m' v` of one batch from captured layers: row r_m is a gradient that is kept as a and g, never
    as P numbers. Two products with each weight's `a` and `g` are all that it costs."""

    def __init__(self, sites: list[Site], weights: Tensor, samples: int, blocks: list[list[int]] | None):
        self._sites, self._weights, self.samples = sites, weights.unsqueeze(1), samples
        self._blocks = blocks if blocks is not None else [list(range(len(sites)))]
        self.reached = [site.rows > 0 for site in sites]

    def product(self, parts: Sequence[Tensor]) -> list[Tensor | None]:
        results: list[Tensor | None] = [None] * len(parts)
        for block in self._blocks:
            reached = [i for i in block if self.reached[i]]
            if reached:
                dots = sum(self._sites[i].dots(parts[i]) for i in reached) * self._weights
                for i in reached:
                    results[i] = self._sites[i].weighted(dots)
        return results

    def bytes(self) -> int:
        kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for s in self._sites for x in s.tensors()}
        return sum(kept.values())


def layer_blocks(model: nn.Module, names: Sequence[str]) -> list[list[int]]:
    """Indices of the parameters of each block: those that one module owns, a weight with its bias."""
    blocks: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        blocks.setdefault(name.rpartition(".")[0], []).append(index)
    return list(blocks.values())


class OutputCurvature(Curvature):
    """`sum over batches of J' S J`, full or block-diagonal; a subclass gives S of a batch.

    Where S is a sum of few outer products within each sample (a Monte-Carlo or an empirical Fisher) and the layers with
    rules cover every parameter, the gradients' factors `a` and `g` are captured once and products are made of ops.
    """

    def __init__(self, model: nn.Module, loss: object, data: object, params: object, blocks: bool):
        super().__init__(model, loss, data, params)
        self._blocks = layer_blocks(model, self.space.names) if blocks else None
        self._tape = Tape()

    @property
    def blocks(self) -> list[list[str]] | None:
        """Names of each diagonal block's parameters, or None for the full matrix."""
        if self._blocks is None:
            return None
        return [[self.space.names[i] for i in block] for block in self._blocks]

    def _outer(self, evaluated: Evaluated, output: Tensor) -> tuple[Tensor, Tensor] | None:
        """u (K, *output.shape) and weights (N,), if S is `sum_k w_n u_kn u_kn'` within each sample n; else None."""
        return None

    def _middle(self, evaluated: Evaluated, output: Tensor) -> Callable[[Tensor], Tensor]:
        """v -> S v on (K, *output.shape), for any S."""
        return self.problem.loss.hessian(output, evaluated.batch.target)

    def _evaluated(self, batch: Batch) -> Evaluated:
        with recording(self.problem.model, list(self._params.values())) as self._tape:
            return self.problem.evaluate(batch)

    def _linearised(self, evaluated: Evaluated) -> Piece | RowsPiece:
        output = self.problem.output_tensor(evaluated.output)
        params, tape = list(self._params.values()), self._tape
        self._tape = Tape()  # nothing of a batch outlives its piece
        outer = self._outer(evaluated, output)
        if outer is not None and all(tape.covered(output, params)):
            u, weights = outer
            together = go_together(self.problem.model, saved_bytes([output]))
            pull = Derivative([output], [call.edge for call in tape.calls], together)
            grads = [None if g is None else g.reshape(-1, *g.shape[2:]) for g in pull([u])]
            sites = tape.sites(params, grads)
            return RowsPiece(sites, weights.repeat(u.shape[0]), output.shape[0], self._blocks)
        middle = self._middle(evaluated, output) if outer is None else outer_products(*outer)
        return Piece(Jacobian(output, params, self.problem.model), middle, self._blocks)


class GGN(OutputCurvature):
    """Generalised Gauss-Newton matrix `J' S J`: J the Jacobian of the model's output in the parameters, S the loss's
    Hessian in that output. For cross-entropy, squared error and binary cross-entropy it is the Fisher information.

    Args:
        model: a `torch.nn.Module` whose output is one tensor, a row a sample; dropout off, BatchNorm in eval mode.
        loss, data, params: as for `Hessian`; S is exact for every option of the loss (label smoothing, ignored
            targets, class weights, mean or sum) and for any callable, by autograd.
        mc_samples: 0 for the exact matrix; k for a Monte-Carlo Fisher: S is replaced by the mean of k outer products of
            pseudo-gradients a sample, drawn so that their expectation is S. The draw is fixed by `seed`, so that the
            operator is one matrix.
        blocks: keep only the diagonal blocks, one a module: a layer's weight together with its bias.
        seed: of the draw.

    Products, scale and errors as for `Hessian`; always positive semi-definite where the loss is convex in the output.

    Raises:
        StateError: also for BatchNorm in train mode. ValueError: also for NLLLoss, whose GGN on log-probabilities is zero.

    Source: N. N. Schraudolph, Neural Computation 14, 2002; J. Martens, arXiv:1412.1193, sections 8 and 9.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: object,
        data: object,
        *,
        params: object = None,
        mc_samples: int = 0,
        blocks: bool = False,
        seed: int = 0,
    ):
        if not isinstance(mc_samples, int) or mc_samples < 0:
            raise ValueError(f"GGN: mc_samples is {mc_samples!r}; it must be 0 (exact) or a positive number of draws")
        super().__init__(model, loss, data, params, blocks)
        self.mc_samples, self.seed = mc_samples, seed

    def _outer(self, evaluated: Evaluated, output: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.mc_samples == 0:
            # Block by block, the Jacobian's tangents would be pushed through the network once a block: S's exact root,
            # a column a class, is captured instead where it is small.
            loss = self.problem.loss
            if self._blocks is None or loss.joint or output.dim() != 2 or output.shape[1] > _MOST_ROOTS:
                return None
            root = loss.root(output, evaluated.batch.target)
            u = torch.stack([root(z.expand_as(output)) for z in torch.eye(output.shape[1]).to(output)]).detach()
            return u, u.new_ones(u.shape[1])
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + evaluated.batch.index) % (1 << 63))
        u = self.problem.loss.draw(output, evaluated.batch.target, self.mc_samples, generator).detach()
        return u, u.new_full((u.shape[1],), 1 / self.mc_samples)


def outer_products(u: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> sum_m w_n u_mn <u_mn, v_n> for every sample n: u (M, N, ...), weights (N,), v (K, N, ...)."""
    flat = u.reshape(u.shape[0], u.shape[1], -1)

    def product(v: Tensor) -> Tensor:
        dots = torch.einsum("mnc,knc->kmn", flat, v.reshape(v.shape[0], v.shape[1], -1)) * weights
        return torch.einsum("kmn,mnc->knc", dots, flat).reshape(v.shape)

    return product
