"""torch's own formulations of the ops: what a user would write, the result kept where the op keeps it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from hvpfast.patches import geometry, patches


def _statistics(rows: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    flat = rows.flatten(1)
    return flat.square().sum(1), (c @ flat).reshape(rows.shape[1:]), rows.square().sum(0)


def _pairs(a: Tensor, g: Tensor) -> Tensor:
    return a if len(a) == len(g) else a.repeat(len(g) // max(len(a), 1), 1, 1)


def _mm(x: Tensor, *, out: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return torch.mm(rows.T, rows, out=out) if out.dtype == rows.dtype else torch.mm(rows.T, rows)


def _einsum(x: Tensor, *, out: Tensor) -> Tensor:
    return torch.einsum("nti,ntj->ij", x, x)


def _two_grams(a: Tensor, g: Tensor) -> Tensor:
    a = _pairs(a, g)
    return (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2))


def _materialised_norms(a: Tensor, g: Tensor) -> Tensor:
    return torch.bmm(g.mT, _pairs(a, g)).square().sum((1, 2))


def _materialised_moment(a: Tensor, g: Tensor, *, out: Tensor) -> Tensor:
    return torch.sum(torch.bmm(g.mT, _pairs(a, g)).square_(), 0, out=out)


def _einsum_moment(a: Tensor, g: Tensor, *, out: Tensor) -> Tensor:
    return torch.einsum("mto,mti->moi", g, _pairs(a, g)).square().sum(0)


def _vmapped(a: Tensor, g: Tensor) -> Tensor:
    weight = a.new_zeros(g.shape[2], a.shape[2])
    return vmap(grad(lambda w, x, slope: (F.linear(x, w) * slope).sum()), (None, 0, 0))(weight, _pairs(a, g), g)


def _squared(rows: Tensor) -> Tensor:
    return rows @ rows.T


def _layerwise(product: Callable[..., Tensor]) -> Callable:
    """A call for single tensors, or a loop over the entries of lists; a number is everyone's."""

    def run(*args):
        if isinstance(args[0], Tensor):
            return product(*args)
        layers = zip(*(x if isinstance(x, list) else [x] * len(args[0]) for x in args), strict=True)
        return [product(*layer) for layer in layers]

    return run


def _stacked(product: Callable[..., Tensor]) -> Callable:
    """The same for lists of one shape in batched products, the copies into the batch included."""

    def run(*args):
        if isinstance(args[0], Tensor):
            return product(*args)
        return list(product(*(torch.stack(x) if isinstance(x, list) else x for x in args)).unbind())

    return run


def _solve(v: Tensor, qg: Tensor, qa: Tensor, eigenvalues: Tensor, damping: float) -> Tensor:
    inner = qg.mT @ v @ qa
    if inner.dim() > eigenvalues.dim():
        eigenvalues = eigenvalues.expand_as(inner)
    return qg @ (inner / (eigenvalues + damping)) @ qa.mT


def _unfold(product: Callable[[Tensor], Tensor]) -> Callable:
    def run(x, kernel, *, stride, padding, dilation, groups, out):
        if x.dim() == 4:
            rows = F.unfold(x, kernel, dilation, padding, stride)  # (N, I, T)
        elif x.dim() == 3:
            rows = F.unfold(x[..., None, :], (1, kernel), dilation, (0, padding), stride)
        else:  # torch's unfold takes images only
            rows = patches(x, geometry(x.shape[2:], kernel, stride, padding, dilation)).flatten(2).mT
        factors = [product(part) for part in rows.chunk(groups, 1)]
        return factors[0] if groups == 1 else torch.stack(factors)

    return run


def _rows_product(rows: Tensor) -> Tensor:
    flat = rows.transpose(1, 2).flatten(0, 1)
    return flat.T @ flat


FORMULATIONS: dict[str, dict[str, Callable]] = {
    "gram": {"torch mm": _mm, "torch einsum": _einsum},
    "conv_gram": {
        "torch unfold, mm": _unfold(_rows_product),
        "torch unfold, bmm": _unfold(lambda rows: torch.bmm(rows, rows.mT).sum(0)),
    },
    "sample_norms_squared": {"torch two Grams": _two_grams, "torch materialised": _materialised_norms},
    "second_moment": {"torch materialised": _materialised_moment, "torch einsum": _einsum_moment},
    "sample_grads": {
        "torch bmm": lambda a, g, *, out: torch.bmm(g.mT, _pairs(a, g), out=out),
        "torch einsum": lambda a, g, *, out: torch.einsum("mto,mti->moi", g, _pairs(a, g)),
        "torch.func vmap(grad)": lambda a, g, *, out: _vmapped(a, g),
    },
    "rotated_second_moment": {
        "torch materialise, rotate": lambda a, g, qa, qg, *, out: torch.sum(
            (qg.mT @ torch.bmm(g.mT, _pairs(a, g)) @ qa).square_(), 0, out=out
        ),
        "torch einsum": lambda a, g, qa, qg, *, out: torch.sum(
            torch.einsum("mto,mti,op,iq->mpq", g, _pairs(a, g), qg, qa).square_(), 0, out=out
        ),
    },
    "sample_gram": {
        "torch einsum": lambda a, g: torch.einsum("mti,nsi,mto,nso->mn", _pairs(a, g), _pairs(a, g), g, g),
        "torch materialised": lambda a, g: _squared(torch.bmm(g.mT, _pairs(a, g)).flatten(1)),
    },
    "kron_apply": {
        "torch mm by mm": _layerwise(lambda left, v, right: left @ v @ right),
        "torch bmm of equal shapes": _stacked(lambda left, v, right: left @ v @ right),
    },
    "kron_solve": {
        "torch mm by mm": _layerwise(_solve),
        "torch bmm of equal shapes": _stacked(_solve),
    },
    "sample_dots": {
        "torch einsum": lambda a, g, w: torch.einsum("mto,mti,koi->mk", g, _pairs(a, g), w),
        "torch materialised": lambda a, g, w: torch.bmm(g.mT, _pairs(a, g)).flatten(1) @ w.flatten(1).T,
    },
    "sample_statistics": {
        "torch materialised": lambda a, g, c: _statistics(torch.bmm(g.mT, _pairs(a, g)), c),
    },
    "linear_rop": {
        "torch, a sum of two products": lambda x, w, dx, dw, *, db: dx @ w.T + x @ dw.mT + db[:, None],
        "torch, concatenated": lambda x, w, dx, dw, *, db: torch.baddbmm(
            db[:, None], torch.cat([dx, x.expand_as(dx)], 2), torch.cat([w.expand_as(dw), dw], 2).mT
        ),
    },
    "activation_rop": {
        "torch double backward of a kept graph": lambda x, g, c, *, activation: torch.autograd.grad(
            *_activation_graph(x, g), c, retain_graph=True
        ),
    },
    "norm_rop": {
        "torch double backward of a kept graph": lambda x, g, rstd, **given: _norm_double_backward(x, g, rstd, **given),
    },
    "weighted_grad": {
        "torch einsum": lambda a, g, c: torch.einsum("mk,mto,mti->koi", c, g, _pairs(a, g)),
        "torch weigh, then mm": lambda a, g, c: torch.stack(
            [(g * w[:, None, None]).flatten(0, 1).T @ _pairs(a, g).flatten(0, 1) for w in c.T]
        ),
    },
    "norm_sample_stats": {
        "torch einsum": lambda x, g, *, kind, eps: _norm_stats(x, g, eps),
        "torch sample by sample": lambda x, g, *, kind, eps: _norm_stats_by_autograd(x, g, eps),
    },
    "softmax_hvp": {
        "torch double backward": lambda logits, v, *, weight: _double_backward(logits, v, weight),
    },
}


@functools.lru_cache(1)
def _activation_graph(x: Tensor, g: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """GELU's first backward pass, with its graph, and what it is differentiated in."""
    x, g = x.detach().requires_grad_(), g.detach().requires_grad_()
    return torch.autograd.grad(F.gelu(x), x, g, create_graph=True)[0], (g, x)


@functools.lru_cache(1)
def _norm_graph(x: Tensor, g: Tensor, weight: Tensor, eps: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    x, g, weight = (y.detach().requires_grad_() for y in (x, g, weight))
    bias = torch.zeros_like(weight, requires_grad=True)
    y = F.layer_norm(x, x.shape[1:], weight, bias, eps)
    return torch.autograd.grad(y, (x, weight, bias), g, create_graph=True), (g, x, weight)


def _norm_double_backward(x, g, rstd, *, c, mean, weight, c_weight, c_bias) -> tuple[Tensor, ...]:
    slopes, leaves = _norm_graph(
        x, g, weight, 1.0
    )  # make_inputs has a row's own eps, of which the cost does not depend
    return torch.autograd.grad(slopes, leaves, (c, c_weight, c_bias), retain_graph=True)


def _both_sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    squares = rows.square()
    return squares.sum(1), squares.sum(0)


def _norm_stats(x: Tensor, g: Tensor, eps: float) -> tuple[Tensor, ...]:
    scale = torch.einsum("mti,mti->mi", g, _pairs(F.layer_norm(x, x.shape[2:], eps=eps), g))
    (one, three), (two, four) = _both_sums(scale), _both_sums(g.sum(1))
    return one, two, three, four


def _norm_stats_by_autograd(x: Tensor, g: Tensor, eps: float) -> tuple[Tensor, ...]:
    """A scale and a shift for each sample, and the backward pass to them."""
    scale, shift = (
        torch.ones(len(g), 1, g.shape[2], device=g.device, dtype=g.dtype, requires_grad=True) for _ in range(2)
    )
    out = _pairs(F.layer_norm(x, x.shape[2:], eps=eps), g) * scale + shift
    rows = torch.autograd.grad(out, (scale, shift), g)
    (one, three), (two, four) = (_both_sums(row[:, 0]) for row in rows)
    return one, two, three, four


def _double_backward(logits: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device).flatten()
    losses = F.cross_entropy(leaf.flatten(0, -2), target, reduction="none")
    (slope,) = torch.autograd.grad((losses * weight.flatten()).sum(), leaf, create_graph=True)
    return torch.stack([torch.autograd.grad(slope, leaf, one, retain_graph=True)[0] for one in v])
