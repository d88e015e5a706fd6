"""Losses: how a scalar splits into samples and batches, and its derivatives in the model's output.

With `reduction="mean"` a batch's loss is `sum_n D_n l_n / sum_n D_n`: `l_n` is the loss of sample n on its own and
`D_n` its denominator, the number or total weight of the terms that the mean is over (1 for class indices; the class's
weight; 0 for an ignored target; the number of positions or outputs). The same holds over batches, with each batch's
`D = sum_n D_n`, so that unequal batches, ignored targets and class weights give the mean over the whole data set.
With `reduction="sum"` all is a plain sum.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpfast import ops
from hvpfast.capture.errors import NonFiniteError

_MAX_DENSE = 2048  # outputs a sample for which a custom loss's Hessian is formed, to draw from it


class Loss:
    """Any callable(output, target) -> scalar; derivatives by autograd. Subclasses have closed forms.

    Attributes:
        reduction: "mean", "sum", or None while it is unknown (found out by `settle`).
    """

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

    def draw(self, output: Tensor, target: object, k: int, generator: torch.Generator) -> Tensor:
        """u, (K, *output.shape), with E[u u'] = S within each sample: pseudo-gradients of a Monte-Carlo Fisher."""
        n, per = output.shape[0], output[0].numel() if output.shape[0] else 0
        if per > _MAX_DENSE:
            raise ValueError(
                f"drawing from a custom loss needs its Hessian in the output, {per} x {per} a sample; at most {_MAX_DENSE} "
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
        normal = torch.randn(k, n, per, generator=generator, dtype=torch.float64).to(output.device)
        scaled = normal * values.clamp(min=0).sqrt()
        return torch.einsum("nij,knj->kni", vectors, scaled).reshape(k, *output.shape).to(output.dtype)


class CrossEntropy(Loss):
    """`torch.nn.functional.cross_entropy` with every option: class indices or probabilities, any positions.

    Row by row its Hessian is `w (diag p - p p')`, where w is the total weight on the row's (smoothed) target over D.
    """

    def __init__(self, function: Callable, reduction: str, weight=None, ignore_index=-100, label_smoothing=0.0):
        super().__init__(function, reduction)
        self.weight, self.ignore_index, self.label_smoothing = weight, ignore_index, label_smoothing

    def _row_weights(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Of every row (N, d...): the sum of class weights on its smoothed target, and its share of the denominator."""
        classes = output.shape[1]
        w = output.new_ones(classes) if self.weight is None else self.weight.to(output)
        if target.dtype.is_floating_point:
            smooth = target * (1 - self.label_smoothing) + self.label_smoothing / classes
            return torch.tensordot(smooth, w, ([1], [0])), torch.ones_like(output[:, 0])
        kept = target != self.ignore_index
        own = torch.where(kept, w[torch.where(kept, target, 0)], 0)
        curved = (1 - self.label_smoothing) * own + self.label_smoothing * w.sum() / classes * kept
        return curved, own

    def denominators(self, output: Tensor, target: Tensor) -> Tensor:
        self._fits(output, target)
        return self._row_weights(output, target)[1].double().reshape(output.shape[0], -1).sum(1)

    def sample_losses(self, output: Tensor, target: Tensor) -> Tensor:
        self._fits(output, target)
        terms = F.cross_entropy(
            output,
            target,
            weight=None if self.weight is None else self.weight.to(output),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        sums = terms.reshape(output.shape[0], -1).sum(1)
        if self.reduction == "sum":
            return sums
        d = self.denominators(output, target).to(sums.dtype)
        return sums / torch.where(d == 0, torch.ones_like(d), d)

    def _scaled_rows(self, output: Tensor, target: Tensor) -> Tensor:
        curved, d = self._row_weights(output, target)
        return curved / d.sum() if self.reduction == "mean" else curved

    def hessian(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        self._fits(output, target)
        logits = output.detach().movedim(1, -1)
        rows = self._scaled_rows(output.detach(), target)

        def product(v: Tensor) -> Tensor:
            return ops.softmax_hvp(logits, v.movedim(2, -1), weight=rows).movedim(-1, 2).to(v.dtype)

        return product

    def draw(self, output: Tensor, target: Tensor, k: int, generator: torch.Generator) -> Tensor:
        self._fits(output, target)
        p = torch.softmax(output.detach().double(), 1)
        below = p.cumsum(1)
        uniform = torch.rand(k, p.shape[0], 1, *p.shape[2:], generator=generator, dtype=torch.float64).to(p.device)
        label = (below.unsqueeze(0) < uniform * below[:, -1:]).sum(2, keepdim=True).clamp_(max=p.shape[1] - 1)
        u = p.expand(k, *p.shape).clone().scatter_add_(2, label, -torch.ones_like(uniform))  # p - e_label
        rows = self._scaled_rows(output.detach().double(), target).sqrt()
        return (u * rows.unsqueeze(1)).to(output.dtype)

    @staticmethod
    def _fits(output: Tensor, target: Tensor) -> None:
        if output.dim() < 2:
            raise ValueError(
                f"cross_entropy: the model's output has shape {tuple(output.shape)}; it must be (N, C) or (N, C, ...), with a "
                f"batch axis"
            )


class MeanSquaredError(Loss):
    """`torch.nn.functional.mse_loss`: Hessian 2 / D in every output; a mean is over all elements."""

    def __init__(self, function: Callable, reduction: str):
        super().__init__(function, reduction, elementwise=True)

    def sample_losses(self, output: Tensor, target: Tensor) -> Tensor:
        _same_shape("mse_loss", output, target)
        errors = (output - target).square().reshape(output.shape[0], -1)
        return errors.mean(1) if self.reduction == "mean" else errors.sum(1)

    def _scale(self, output: Tensor) -> float:
        return 2 / max(1, output.numel()) if self.reduction == "mean" else 2.0

    def hessian(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        _same_shape("mse_loss", output, target)
        scale = self._scale(output)
        return lambda v: v * scale

    def draw(self, output: Tensor, target: Tensor, k: int, generator: torch.Generator) -> Tensor:
        _same_shape("mse_loss", output, target)
        normal = torch.randn(k, *output.shape, generator=generator, dtype=torch.float64)
        return (normal * self._scale(output) ** 0.5).to(output)


class BinaryCrossEntropy(Loss):
    """`torch.nn.functional.binary_cross_entropy_with_logits`: Hessian `w s (1 - s)` in every output, s the sigmoid."""

    def __init__(self, function: Callable, reduction: str, weight=None, pos_weight=None):
        super().__init__(function, reduction, elementwise=True)
        self.weight, self.pos_weight = weight, pos_weight

    def sample_losses(self, output: Tensor, target: Tensor) -> Tensor:
        terms = F.binary_cross_entropy_with_logits(
            output,
            target,
            weight=None if self.weight is None else self.weight.to(output),
            pos_weight=None if self.pos_weight is None else self.pos_weight.to(output),
            reduction="none",
        ).reshape(output.shape[0], -1)
        return terms.mean(1) if self.reduction == "mean" else terms.sum(1)

    def _terms(self, output: Tensor, target: Tensor) -> Tensor:
        positive = torch.ones_like(output) if self.pos_weight is None else self.pos_weight.to(output)
        scale = positive * target.to(output.dtype) + (1 - target.to(output.dtype))
        if self.weight is not None:
            scale = scale * self.weight.to(output)
        return (scale / output.numel() if self.reduction == "mean" else scale).expand_as(output)

    def hessian(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        s = torch.sigmoid(output.detach())
        diagonal = self._terms(output.detach(), target) * s * (1 - s)
        return lambda v: v * diagonal

    def draw(self, output: Tensor, target: Tensor, k: int, generator: torch.Generator) -> Tensor:
        s = torch.sigmoid(output.detach().double())
        uniform = torch.rand(k, *output.shape, generator=generator, dtype=torch.float64).to(output.device)
        return ((s - (uniform < s).double()) * self._terms(output.detach().double(), target).sqrt()).to(output.dtype)


# Reading the user's loss ---------------------------------------------------------------------------------------------

_ELEMENTWISE = (
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.poisson_nll_loss,
    F.soft_margin_loss,
)
_ELEMENTWISE_MODULES = (nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.PoissonNLLLoss, nn.SoftMarginLoss)
_ALL_MODULES = (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.NLLLoss, *_ELEMENTWISE_MODULES)


def as_loss(loss: object, who: str) -> Loss:
    """Read a torch.nn loss, a torch.nn.functional loss (also in functools.partial), or any callable.

    Raises:
        TypeError: not callable. ValueError: `reduction="none"`.
    """
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        raise TypeError(
            f"{who}: loss is a {type(loss).__name__}; it must be callable(output, target) -> scalar, e.g. "
            f"torch.nn.CrossEntropyLoss()"
        )
    options = _options(loss)
    reduction = options.get("reduction", "mean") if options is not None else getattr(loss, "reduction", None)
    if reduction == "none":
        raise ValueError(f"{who}: the loss has reduction='none', which is no scalar; use 'mean' or 'sum'")
    base = loss.func if isinstance(loss, functools.partial) else loss
    kind = type(base)
    if kind is nn.CrossEntropyLoss or base is F.cross_entropy:
        return CrossEntropy(
            loss,
            reduction,
            options.get("weight"),
            options.get("ignore_index", -100),
            options.get("label_smoothing", 0.0),
        )
    if (kind is nn.MSELoss or base is F.mse_loss) and options.get("weight") is None:
        return MeanSquaredError(loss, reduction)
    if kind is nn.BCEWithLogitsLoss or base is F.binary_cross_entropy_with_logits:
        return BinaryCrossEntropy(loss, reduction, options.get("weight"), options.get("pos_weight"))
    if kind is nn.NLLLoss or base is F.nll_loss:
        return NegativeLogLikelihood(loss, reduction, options.get("weight"), options.get("ignore_index", -100))
    if reduction == "batchmean":  # kl_div
        return Loss(loss, "mean")
    elementwise = kind in _ELEMENTWISE_MODULES or base in _ELEMENTWISE
    return Loss(loss, reduction if reduction in ("mean", "sum") else None, elementwise)


class NegativeLogLikelihood(CrossEntropy):
    """`torch.nn.functional.nll_loss` on log-probabilities: linear in the output, so it has gradients and no GGN."""

    def __init__(self, function: Callable, reduction: str, weight=None, ignore_index=-100):
        super().__init__(function, reduction, weight, ignore_index, 0.0)

    def sample_losses(self, output: Tensor, target: Tensor) -> Tensor:
        self._fits(output, target)
        terms = F.nll_loss(
            output,
            target,
            weight=None if self.weight is None else self.weight.to(output),
            ignore_index=self.ignore_index,
            reduction="none",
        )
        sums = terms.reshape(output.shape[0], -1).sum(1)
        if self.reduction == "sum":
            return sums
        d = self.denominators(output, target).to(sums.dtype)
        return sums / torch.where(d == 0, torch.ones_like(d), d)

    def hessian(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        raise ValueError(
            "NLLLoss is linear in the model's output, so its GGN in that output is zero: let the model return logits and use "
            "CrossEntropyLoss, which is the same loss"
        )

    def draw(self, output: Tensor, target: Tensor, k: int, generator: torch.Generator) -> Tensor:
        return self.hessian(output, target)


def _options(loss: object) -> dict | None:
    """The options of a known torch loss, by name, with what a partial fixed; None for any other callable."""
    keywords: dict = {}
    if isinstance(loss, functools.partial):
        if loss.args or loss.func not in (
            F.cross_entropy,
            F.mse_loss,
            F.binary_cross_entropy_with_logits,
            F.nll_loss,
        ) + (_ELEMENTWISE):
            return None
        keywords, loss = loss.keywords, loss.func
    if isinstance(loss, _ALL_MODULES):
        names = ("reduction", "weight", "ignore_index", "label_smoothing", "pos_weight")
        return {name: getattr(loss, name) for name in names if hasattr(loss, name)}
    known = (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits, F.nll_loss, *_ELEMENTWISE)
    if loss in known:
        defaults = {
            name: p.default
            for name, p in inspect.signature(loss).parameters.items()
            if p.default is not inspect.Parameter.empty
        }
        return {**defaults, **keywords}
    return None


def check_finite_loss(value: Tensor, what: str, hint: str) -> None:
    """Raise NonFiniteError if a loss is NaN or inf."""
    if not bool(torch.isfinite(value.detach())):
        raise NonFiniteError(f"{what}: the loss is {float(value)}; {hint}")


def _doubled(item: object) -> object:
    """Every sample twice, in nested tensors whose first axis is the batch."""
    if isinstance(item, Tensor):
        return torch.cat([item, item]) if item.dim() else item
    if isinstance(item, dict):
        return {name: _doubled(value) for name, value in item.items()}
    if isinstance(item, (tuple, list)):
        return type(item)(_doubled(value) for value in item)
    return item


def _same_shape(name: str, output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise ValueError(
            f"{name}: the model's output has shape {tuple(output.shape)} and the target {tuple(target.shape)}; torch would "
            f"broadcast them into a loss over pairs of samples: reshape one to the other's shape"
        )


def _shapes(*items: object) -> str:
    return " and ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in items)
