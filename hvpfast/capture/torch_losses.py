"""torch's own losses in closed form, with every option that they have; and which one the user's callable is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpfast import ops
from hvpfast.arguments import accumulate_dtype
from hvpfast.capture.losses import Loss


class CrossEntropy(Loss):
    """`torch.nn.functional.cross_entropy` with every option: class indices or probabilities, any positions.

    Row by row its Hessian is `w (diag p - p p')`, where w is the total weight on the row's (smoothed) target over D.
    """

    joint = False

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
        if self.weight is None and not target.dtype.is_floating_point:
            return (target != self.ignore_index).reshape(output.shape[0], -1).sum(1, dtype=torch.float64)
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
        return self._own(terms, output, target)

    def _own(self, terms: Tensor, output: Tensor, target: Tensor) -> Tensor:
        """l_n (N,) from the loss of every row (N, d...)."""
        sums = terms if terms.dim() == 1 else terms.reshape(output.shape[0], -1).sum(1)
        if self.reduction == "sum" or (terms.dim() == 1 and self.weight is None):
            return sums  # a sample has one row, which counts for one, or is ignored and zero
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
            result = ops.softmax_hvp(logits, v.movedim(2, -1), weight=rows).movedim(-1, 2).to(v.dtype)
            return result.contiguous()  # torch's InstanceNorm misreads a gradient of one image whose channels are last

        return product

    def terms(self, output: Tensor, target: Tensor, axis: int) -> Tensor:
        self._fits(output, target)
        return self._row_weights(output, target)[1].double().reshape(output.shape[0], -1)

    def root(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        self._fits(output, target)
        logits = output.detach().movedim(1, -1)
        rows = self._scaled_rows(output.detach(), target)
        return lambda z: ops.softmax_root(logits, z.movedim(1, -1), weight=rows).movedim(-1, 1).to(z.dtype).contiguous()

    def rank(self, features: int) -> int:
        return max(1, features - 1)  # the logits' mean has no curvature

    def columns(self, output: Tensor, target: Tensor, axis: int) -> Iterator[Tensor]:
        """The root turned such that its last column is zero: R q = 0 for q = p^1/2, and the reflection
        I - (q + e_C)(q + e_C)' / (1 + q_C) takes e_C to -q. What it makes of e_k is orthogonal to q, so R is diag(q) there."""
        self._fits(output, target)
        wide = output.detach().to(accumulate_dtype(output.dtype))
        rows = self._scaled_rows(wide, target).sqrt().unsqueeze(1)
        q = torch.softmax(wide / 2, 1)
        q = q / torch.linalg.vector_norm(q, dim=1, keepdim=True)
        last = q.square()
        last[:, -1:] += q[:, -1:]
        last.div_(-1 - q[:, -1:])  # -(p + q_C e_C) / (1 + q_C)
        for k in range(self.rank(output.shape[1])):
            u = last * q[:, k : k + 1]
            u[:, k] += q[:, k]
            yield u.mul_(rows).to(output.dtype)

    def draw(self, output: Tensor, target: Tensor, k: int, generator: torch.Generator) -> Tensor:
        self._fits(output, target)
        n, _, *places = output.shape
        uniform = torch.rand(k, n, *places, generator=generator, dtype=torch.float64).to(output.device)
        logits, rows = output.detach().movedim(1, -1), self._scaled_rows(output.detach(), target)
        return ops.softmax_sample(logits, uniform, weight=rows).movedim(-1, 2).to(output.dtype).contiguous()

    @staticmethod
    def _fits(output: Tensor, target: Tensor) -> None:
        if output.dim() < 2:
            raise ValueError(
                f"cross_entropy: the model's output has shape {tuple(output.shape)}; it must be (N, C) or (N, C, ...), with a "
                f"batch axis"
            )


class MeanSquaredError(Loss):
    """`torch.nn.functional.mse_loss`: Hessian 2 / D in every output; a mean is over all elements."""

    joint = False

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

    def root(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        _same_shape("mse_loss", output, target)
        return lambda z: z * self._scale(output) ** 0.5

    def draw(self, output: Tensor, target: Tensor, k: int, generator: torch.Generator) -> Tensor:
        _same_shape("mse_loss", output, target)
        normal = torch.randn(k, *output.shape, generator=generator, dtype=torch.float64)
        return (normal * self._scale(output) ** 0.5).to(output)


class BinaryCrossEntropy(Loss):
    """`torch.nn.functional.binary_cross_entropy_with_logits`: Hessian `w s (1 - s)` in every output, s the sigmoid."""

    joint = False

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

    def _curvature(self, output: Tensor, target: Tensor) -> Tensor:
        """The Hessian's diagonal, shaped like the output."""
        s = torch.sigmoid(output.detach())
        return self._terms(output.detach(), target) * s * (1 - s)

    def hessian(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        diagonal = self._curvature(output, target)
        return lambda v: v * diagonal

    def root(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        half = self._curvature(output, target).sqrt()
        return lambda z: z * half

    def draw(self, output: Tensor, target: Tensor, k: int, generator: torch.Generator) -> Tensor:
        s = torch.sigmoid(output.detach().double())
        uniform = torch.rand(k, *output.shape, generator=generator, dtype=torch.float64).to(output.device)
        return ((s - (uniform < s).double()) * self._terms(output.detach().double(), target).sqrt()).to(output.dtype)


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
        return self._own(terms, output, target)

    def hessian(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        raise ValueError(
            "NLLLoss is linear in the model's output, so its GGN in that output is zero: let the model return logits and use "
            "CrossEntropyLoss, which is the same loss"
        )

    def root(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        return self.hessian(output, target)

    def columns(self, output: Tensor, target: Tensor, axis: int) -> Iterator[Tensor]:
        return self.hessian(output, target)

    def draw(self, output: Tensor, target: Tensor, k: int, generator: torch.Generator) -> Tensor:
        return self.hessian(output, target)


def _same_shape(name: str, output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise ValueError(
            f"{name}: the model's output has shape {tuple(output.shape)} and the target {tuple(target.shape)}; torch would "
            f"broadcast them into a loss over pairs of samples: reshape one to the other's shape"
        )


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
