"""The empirical Fisher: second moment or covariance of the per-sample gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvpfast.autocast import as_the_user_has_it
from hvpfast.capture.problem import Evaluated
from hvpfast.operators.ggn import OutputCurvature, Piece, RowsPiece


class EmpiricalFisher(OutputCurvature):
    """Second moment of the per-sample gradients at the data's own targets, `sum_n c_n g_n g_n'`.

    g_n is the gradient of sample n's own loss and c_n its share of the loss, `loss = sum_n c_n l_n`: for a mean
    c_n = D_n / D, which is 1 / N where every sample counts the same, 0 for an ignored target, and the class's weight over
    the total weight (there the weights act like counts); for a sum c_n = 1. A sample is one row of the batch: with
    several positions a row, its own loss is the mean (or sum) over them.

    Args:
        model, loss, data, params, blocks: as for `GGN`. A custom loss must be a mean or a sum of per-sample terms.
        centered: subtract the mean gradient: `sum_n c_n (g_n - m)(g_n - m)'`, with m the c-weighted mean of the g_n:
            the covariance of the per-sample gradients (over N, not N - 1). A mini-batch of B samples drawn with
            replacement has 1 / B of it as its gradient's covariance. For a sum it is the scatter matrix.

    Products, scale and errors as for `GGN`. It is not the Fisher information, whose targets are the model's own.

    Source: F. Kunstner, L. Balles, P. Hennig, arXiv:1905.12558.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: object,
        data: object,
        *,
        params: object = None,
        blocks: bool = False,
        centered: bool = False,
    ):
        super().__init__(model, loss, data, params, blocks)
        self.centered = centered
        self._last, self._sum, self._samples = -1, torch.zeros(0), 0  # of the pass that linearised the batches

    def _outer(self, evaluated: Evaluated, output: Tensor) -> tuple[Tensor, Tensor]:
        loss, target = self.problem.loss, evaluated.batch.target
        leaf = output.detach().requires_grad_(True)
        with as_the_user_has_it():
            losses = loss.sample_losses(leaf, target)
        (u,) = torch.autograd.grad(losses.sum(), leaf)
        return u.detach().unsqueeze(0), loss.shares(output.detach(), target)

    def _linearised(self, evaluated: Evaluated) -> Piece | RowsPiece:
        piece = super()._linearised(evaluated)
        if self.centered:
            index = evaluated.batch.index
            if index <= self._last:  # a new pass over the data
                self._sum, self._samples = torch.zeros(0), 0
            slope = torch.autograd.grad(
                evaluated.value, list(self._params.values()), retain_graph=True, allow_unused=True
            )
            flat = self.space.join([None if x is None else x.unsqueeze(0) for x in slope], 1, self.dtype)[0]
            self._sum = flat * evaluated.weight if self._samples == 0 else self._sum.add_(flat, alpha=evaluated.weight)
            self._samples += piece.samples
            self._last = index
        return piece

    def _sum_over_batches(self, rows: Tensor) -> Tensor:
        product = super()._sum_over_batches(rows)
        if not self.centered:
            return product
        # sum c (g - m)(g - m)' = sum c g g' - s s' / (sum c), with s = sum c g the loss's gradient; the shares c add up to
        # 1 for a mean and to N for a sum.
        slope = (self._sum / self._scale).to(rows.dtype)
        shares = self._samples if self.problem.loss.reduction == "sum" else 1
        pieces = [slope.split(self.space.sizes), rows.split(self.space.sizes, 1), product.split(self.space.sizes, 1)]
        for block in self._blocks or [range(len(self.space.sizes))]:
            dots = sum(pieces[1][i] @ pieces[0][i] for i in block) / shares
            for i in block:
                pieces[2][i].sub_(torch.outer(dots, pieces[0][i]))
        return product
