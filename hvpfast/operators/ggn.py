"""Matrices of the form `J' S J`: generalised Gauss-Newton, Fisher, and the second moment of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hvpfast.capture.problem import Evaluated
from hvpfast.operators.curvature import Curvature
from hvpfast.operators.linearize import Jacobian, vmaps_well


class Piece:
    """`J' S J v` of one batch, whole or block by block: J the output's Jacobian, S a matrix on outputs."""

    def __init__(self, jacobian: Jacobian, middle: Callable[[Tensor], Tensor], blocks: list[list[int]] | None):
        self._jacobian, self._middle, self._blocks = jacobian, middle, blocks
        self.reached, self.samples = jacobian.reached, jacobian.f.shape[0]
        self._bytes: int | None = None

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
        if self._bytes is None:
            self._bytes = self._jacobian.bytes()
        return self._bytes


def layer_blocks(model: nn.Module, names: Sequence[str]) -> list[list[int]]:
    """Indices of the parameters of each block: those that one module owns, a weight with its bias."""
    blocks: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        blocks.setdefault(name.rpartition(".")[0], []).append(index)
    return list(blocks.values())


class OutputCurvature(Curvature):
    """`sum over batches of J' S J`, full or block-diagonal; a subclass gives S of a batch."""

    def __init__(self, model: nn.Module, loss: object, data: object, params: object, blocks: bool):
        super().__init__(model, loss, data, params)
        self._blocks = layer_blocks(model, self.space.names) if blocks else None

    @property
    def blocks(self) -> list[list[str]] | None:
        """Names of each diagonal block's parameters, or None for the full matrix."""
        if self._blocks is None:
            return None
        return [[self.space.names[i] for i in block] for block in self._blocks]

    def _middle(self, evaluated: Evaluated, output: Tensor) -> Callable[[Tensor], Tensor]:
        """v -> S v on (K, *output.shape)."""
        raise NotImplementedError

    def _linearised(self, evaluated: Evaluated) -> Piece:
        output = self.problem.output_tensor(evaluated.output)
        jacobian = Jacobian(output, list(self._params.values()), vmaps_well(self.problem.model))
        return Piece(jacobian, self._middle(evaluated, output), self._blocks)


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

    def _middle(self, evaluated: Evaluated, output: Tensor) -> Callable[[Tensor], Tensor]:
        loss, target = self.problem.loss, evaluated.batch.target
        if self.mc_samples == 0:
            return loss.hessian(output, target)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + evaluated.batch.index) % (1 << 63))
        u = loss.draw(output, target, self.mc_samples, generator).detach()
        return outer_products(u, u.new_full((u.shape[1],), 1 / self.mc_samples))


def outer_products(u: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> sum_m w_n u_mn <u_mn, v_n> for every sample n: u (M, N, ...), weights (N,), v (K, N, ...)."""
    flat = u.reshape(u.shape[0], u.shape[1], -1)

    def product(v: Tensor) -> Tensor:
        dots = torch.einsum("mnc,knc->kmn", flat, v.reshape(v.shape[0], v.shape[1], -1)) * weights
        return torch.einsum("kmn,mnc->knc", dots, flat).reshape(v.shape)

    return product
