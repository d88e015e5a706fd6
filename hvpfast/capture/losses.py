"""Losses: how a scalar splits into samples and batches, and its derivatives in the model's output.

With `reduction="mean"` a batch's loss is `sum_n D_n l_n / sum_n D_n`: `l_n` is the loss of sample n on its own and
`D_n` its denominator, the number or total weight of the terms that the mean is over (1 for class indices; the class's
weight; 0 for an ignored target; the number of positions or outputs). The same holds over batches, with each batch's
`D = sum_n D_n`, so that unequal batches, ignored targets and class weights give the mean over the whole data set.
With `reduction="sum"` all is a plain sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_MAX_DENSE = 2048  # outputs a sample for which a custom loss's Hessian is formed, to draw from it


class Loss:
    """Any callable(output, target) -> scalar; derivatives by autograd. Subclasses have closed forms.

    Attributes:
        reduction: "mean", "sum", or None while it is unknown (found out by `settle`).
        joint: whether all outputs of a sample are one term, whose Hessian has no closed form.
    """

    joint = True

    def __init__(self, function: Callable, reduction: str | None, elementwise: bool = False):
        self.function, self.reduction, self.elementwise = function, reduction, elementwise

    def __call__(self, output: object, target: object) -> Tensor:
        """The user's own scalar. Raises TypeError or ValueError if it is not one."""
        value = self.function(output, target)
        if not isinstance(value, Tensor):
            raise TypeError(f"the loss returned a {type(value).__name__}; it must return a scalar tensor")
        if value.numel() != 1:
            raise ValueError(
                f"the loss returned a tensor of shape {tuple(value.shape)}; it must be a scalar: use reduction='mean' or "
                f"'sum', not 'none'"
            )
        return value.reshape(())

    def settle(self, output: object, target: object) -> str:
        """The reduction: where it is unknown, found by giving the loss every sample twice (a mean stays, a sum doubles)."""
        if self.reduction is None:
            with torch.no_grad():
                once, twice = self(output, target), self(_doubled(output), _doubled(target))
            ratio = float(twice / once) if float(once) != 0 else math.nan
            if abs(ratio - 1) < 1e-4:
                self.reduction = "mean"
            elif abs(ratio - 2) < 1e-4:
                self.reduction = "sum"
            else:
                raise ValueError(
                    f"the loss is neither a mean nor a sum over samples (twice the samples give {ratio:.6g} times the "
                    f"loss), so batches and samples cannot be told apart; give one batch, and for per-sample "
                    f"quantities a loss that is a mean or a sum"
                )
        return self.reduction

    def denominators(self, output: Tensor, target: object) -> Tensor:
        """D_n, (N,) float64: what each sample adds to the mean's denominator."""
        per = output[0].numel() if self.elementwise and output.shape[0] else 1
        return torch.full((output.shape[0],), float(per), dtype=torch.float64, device=output.device)

    def shares(self, output: Tensor, target: object) -> Tensor:
        """c_n, (N,) in the output's dtype, with loss = sum_n c_n l_n: D_n / D for a mean, 1 for a sum."""
        if self.settle(output, target) == "sum":
            return output.new_ones(output.shape[0])
        d = self.denominators(output, target)
        return (d / d.sum()).to(output.dtype)

    def sample_losses(self, output: Tensor, target: object) -> Tensor:
        """l_n, (N,), differentiable: the loss of every sample on its own."""
        self.settle(output, target)
        if not isinstance(output, Tensor) or not isinstance(target, Tensor) or output.shape[:1] != target.shape[:1]:
            raise TypeError(
                "per-sample losses of a custom loss need an output tensor and a target tensor with one row a sample; "
                "got " + _shapes(output, target)
            )

        def own(one: Tensor, its: Tensor) -> Tensor:
            return self(one.unsqueeze(0), its.unsqueeze(0))

        try:
            values = torch.func.vmap(own)(output, target)
        except Exception:  # the loss branches on values or makes Python numbers: one sample at a time then
            values = torch.stack([self(output[n : n + 1], target[n : n + 1]) for n in range(output.shape[0])])
        whole = self(output.detach(), target)
        split = (values.detach() * self.shares(output.detach(), target)).sum()
        if not torch.allclose(split, whole.to(split.dtype), rtol=1e-3, atol=1e-6):
            raise ValueError(
                f"the loss does not split into samples: it is {float(whole):.6g}, its samples' own losses give "
                f"{float(split):.6g}; per-sample quantities need a mean or a sum of per-sample terms"
            )
        return values

    def hessian(self, output: Tensor, target: object) -> Callable[[Tensor], Tensor]:
        """The function v -> S v, (K, *output.shape) -> the same, S being this batch's loss's Hessian in the output."""
        leaf = output.detach().requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self(leaf, target), leaf, create_graph=True, allow_unused=True)
        if slope is None or not slope.requires_grad:
            return torch.zeros_like

        def product(v: Tensor) -> Tensor:
            rows = [torch.autograd.grad(slope, leaf, row, retain_graph=True, allow_unused=True)[0] for row in v]
            return torch.stack([torch.zeros_like(output) if row is None else row for row in rows])

        return product

    def terms(self, output: Tensor, target: object, axis: int) -> Tensor:
        """What each term of the loss adds to the mean's denominator, (N, positions) float64, with sum over positions D_n.

        `axis` of the output holds the features of a term; the others, but the first, are positions. A custom loss has one
        term a sample, (N, 1).
        """
        d = self.denominators(output, target)
        if not self.elementwise or output.dim() < 3:
            return d.unsqueeze(1)
        positions = output[0].numel() // output.shape[axis]
        return (d / positions).unsqueeze(1).expand(-1, positions)

    def root(self, output: Tensor, target: object) -> Callable[[Tensor], Tensor]:
        """The function z -> R z, shaped like the output, with R R' = S within each term of the loss (see `terms`).

        Raises:
            ValueError: a custom loss with too many outputs a sample, or one that is not convex in them.
        """
        values, vectors = self._spectrum(output, target)

        def product(z: Tensor) -> Tensor:
            scaled = z.reshape(z.shape[0], -1).double() * values.sqrt()
            return torch.einsum("nij,nj->ni", vectors, scaled).reshape(z.shape).to(z.dtype)

        return product

    def rank(self, features: int) -> int:
        """How many `columns` there are where a term has this many features."""
        return features

    def columns(self, output: Tensor, target: object, axis: int) -> Iterator[Tensor]:
        """u_k, each shaped like the output, with sum_k u_k u_k' = S within each term, whose features lie along `axis`."""
        root, shape = self.root(output, target), [1] * output.dim()
        if output.dim() == 1:  # one feature, which has no axis
            yield root(torch.ones_like(output)).detach()
            return
        shape[axis] = output.shape[axis]
        for z in torch.eye(output.shape[axis], dtype=output.dtype, device=output.device):
            yield root(z.view(shape).expand_as(output)).detach()

    def draw(self, output: Tensor, target: object, k: int, generator: torch.Generator) -> Tensor:
        """u, (K, *output.shape), with E[u u'] = S within each sample: pseudo-gradients of a Monte-Carlo Fisher."""
        root = self.root(output, target)
        normal = torch.randn(k, *output.shape, generator=generator, dtype=torch.float64).to(output.device)
        return torch.stack([root(z).to(output.dtype) for z in normal]) if k else normal.to(output.dtype)

    def _spectrum(self, output: Tensor, target: object) -> tuple[Tensor, Tensor]:
        """Eigenvalues (N, p), none below zero, and vectors (N, p, p) of every sample's Hessian in its p outputs, float64."""
        n, per = output.shape[0], output[0].numel() if output.shape[0] else 0
        if per > _MAX_DENSE:
            raise ValueError(
                f"a custom loss's Fisher needs its Hessian in the output, {per} x {per} a sample; at most {_MAX_DENSE} "
                f"outputs are supported: use mc_samples=0, or cross_entropy, mse_loss or binary_cross_entropy_with_logits"
            )
        basis = torch.eye(per, dtype=output.dtype, device=output.device).view(per, 1, *output.shape[1:])
        rows = self.hessian(output, target)(basis.expand(per, *output.shape).contiguous())  # row j: S e_j, every sample
        dense = rows.reshape(per, n, per).movedim(1, 0).double()
        values, vectors = torch.linalg.eigh((dense + dense.mT) / 2)
        if n and float(values.min()) < -1e-6 * max(float(values.abs().max()), 1e-30):
            raise ValueError(
                f"the loss is not convex in the model's output (its Hessian has eigenvalue {float(values.min()):.3g}), so no "
                f"distribution has it as its Fisher; use mc_samples=0"
            )
        return values.clamp(min=0), vectors


def _doubled(item: object) -> object:
    """Every sample twice, in nested tensors whose first axis is the batch."""
    if isinstance(item, Tensor):
        return torch.cat([item, item]) if item.dim() else item
    if isinstance(item, dict):
        return {name: _doubled(value) for name, value in item.items()}
    if isinstance(item, (tuple, list)):
        return type(item)(_doubled(value) for value in item)
    return item


def _shapes(*items: object) -> str:
    return " and ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in items)
