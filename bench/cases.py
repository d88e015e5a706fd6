"""The rows of the op benchmarks: which op, how large, which dtype; the work each needs; and torch's own ways to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from hvpfast.patches import geometry, patches
from hvpfast.testing import make_inputs

_SIZES = {
    "norm_sample_stats": "n t i",
    "gram": "n i",
    "softmax_hvp": "n o k",
    "kron_apply": "i o k",
    "kron_solve": "i o k",
}


class Row(NamedTuple):
    """One benchmark: an op at N samples, T positions, I and O features, K columns; convolutions have I channels on
    `axes` axes of `side` pixels, a `kernel` of one size along all, and `options` of (stride, padding, dilation, groups)."""

    op: str
    n: int
    t: int = 1
    i: int = 1
    o: int = 1
    k: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    side: int = 0
    kernel: int = 0
    options: tuple[int, int, int, int] = (1, 0, 1, 1)
    layers: int = 0  # lists of so many layers; 0: single tensors
    axes: int = 2

    @property
    def name(self) -> str:
        if self.op == "conv_gram":
            stride, padding, dilation, groups = self.options
            image = "x".join([str(self.side)] * self.axes)
            label = f"N={self.n} C={self.i} {image} kernel {self.kernel} stride {stride} padding {padding}"
            label += (f" dilation {dilation}" if dilation > 1 else "") + (f" groups {groups}" if groups > 1 else "")
            return f"{self.op} {label} {str(self.dtype).removeprefix('torch.')}"
        sizes = _SIZES.get(self.op, "n t i o k").split()
        label = " ".join(f"{s.upper()}={getattr(self, s)}" for s in sizes if s != "k" or self.k > 1)
        extra = "" if self.layout == "contiguous" else f" {self.layout}"
        extra += f" {self.layers} layers" if self.layers else ""
        return f"{self.op} {label} {str(self.dtype).removeprefix('torch.')}{extra}"

    def shrunk(self) -> Row:
        """The same regime in miniature, for smoke runs."""
        if self.op == "conv_gram":
            stride, padding, dilation, groups = self.options
            few = min(groups, 4)
            channels = few if groups == self.i else min(self.i, 4 * few)
            return self._replace(n=2, i=channels, side=min(self.side, 9), options=(stride, padding, dilation, few))
        return self._replace(
            n=min(self.n, 24), t=min(self.t, 9), i=min(self.i, 24), o=min(self.o, 24), k=min(self.k, 2),
            layers=min(self.layers, 3),
        )  # fmt: skip


# (N, T, I, O): MLP layers, a transformer's linear maps, unfolded convolutions, long sequences of few features.
_PAIRS = (
    (256, 1, 784, 512),
    (512, 1, 1024, 1024),
    (64, 16, 512, 512),
    (16, 128, 256, 1024),
    (16, 128, 1024, 256),
    (128, 64, 1152, 256),
    (128, 1024, 27, 64),
    (8, 2048, 64, 64),
)
_half = torch.bfloat16
# (N, C, side, kernel, (stride, padding, dilation, groups)): what ResNets and MobileNets hold.
_IMAGES = (
    (128, 64, 32, 3, (1, 1, 1, 1)),
    (128, 128, 16, 3, (1, 1, 1, 1)),
    (128, 256, 8, 3, (1, 1, 1, 1)),
    (128, 64, 32, 3, (2, 1, 1, 1)),
    (64, 64, 16, 5, (1, 2, 1, 1)),
    (16, 3, 112, 7, (2, 3, 1, 1)),
    (8, 3, 224, 7, (2, 3, 1, 1)),
    (64, 64, 16, 3, (1, 2, 2, 1)),
    # depthwise, grouped
    (64, 128, 16, 3, (1, 1, 1, 128)),
    (16, 144, 56, 3, (1, 1, 1, 144)),
    (16, 64, 112, 3, (2, 1, 1, 64)),
    (16, 480, 14, 5, (1, 2, 1, 480)),
    (32, 960, 7, 3, (1, 1, 1, 960)),
    (64, 128, 16, 3, (1, 1, 1, 8)),
    (16, 128, 56, 3, (1, 1, 1, 32)),
    # kernel size 1
    (64, 64, 32, 1, (1, 0, 1, 1)),
    (64, 256, 14, 1, (1, 0, 1, 1)),
    (64, 1024, 7, 1, (1, 0, 1, 1)),
    (16, 24, 56, 1, (1, 0, 1, 1)),
    (64, 128, 16, 1, (2, 0, 1, 1)),
    # ResNet-18 on 32 x 32 pixels
    (64, 3, 32, 3, (1, 1, 1, 1)),
    (64, 64, 32, 3, (1, 1, 1, 1)),
    (64, 64, 32, 3, (2, 1, 1, 1)),
    (64, 128, 16, 3, (1, 1, 1, 1)),
    (64, 128, 16, 3, (2, 1, 1, 1)),
    (64, 256, 8, 3, (1, 1, 1, 1)),
    (64, 256, 8, 3, (2, 1, 1, 1)),
    (64, 512, 4, 3, (1, 1, 1, 1)),
)

ROWS: tuple[Row, ...] = (
    *(Row("gram", n, i=i) for n, i in ((8192, 1024), (8192, 2048), (4096, 4096), (1024, 256))),
    *(Row("gram", n, i=i, dtype=_half) for n, i in ((8192, 1024), (8192, 2048), (4096, 4096), (1024, 256))),
    *(Row("gram", n, i=i) for n, i in ((65536, 64), (16384, 512), (64, 2048), (256, 8), (1, 1024))),
    *(Row("gram", 8192, i=1024, layout=layout) for layout in ("strided", "transposed")),
    Row("gram", 4096, i=1024, dtype=torch.float64),
    *(Row("conv_gram", n, i=c, side=side, kernel=kernel, options=rest) for n, c, side, kernel, rest in _IMAGES),
    Row("conv_gram", 128, i=128, side=16, kernel=3, options=(1, 1, 1, 1), dtype=_half),
    Row("conv_gram", 64, i=64, side=1024, kernel=5, options=(1, 2, 1, 1), axes=1),
    Row("conv_gram", 8, i=32, side=16, kernel=3, options=(1, 1, 1, 1), axes=3),
    *(Row("sample_norms_squared", *pair) for pair in _PAIRS),
    Row("sample_norms_squared", 16, 128, 256, 1024, dtype=_half),
    Row("sample_norms_squared", 64, 64, 128, 128, 4),
    *(Row("second_moment", *pair) for pair in _PAIRS),
    Row("second_moment", 16, 128, 256, 1024, dtype=_half),
    *(Row("rotated_second_moment", *pair) for pair in ((512, 1, 1024, 1024), (16, 128, 768, 768))),
    *(Row("sample_statistics", *pair) for pair in ((64, 16, 512, 512), (16, 128, 256, 1024))),
    *(Row("sample_grads", *pair) for pair in ((256, 1, 784, 512), (512, 1, 1024, 1024), (16, 128, 256, 1024))),
    *(Row("sample_gram", *pair) for pair in ((512, 1, 1024, 1024), (256, 1, 784, 512), (64, 16, 256, 256))),
    *(Row(op, 1, 1, i, o, k) for op in ("kron_apply", "kron_solve") for i, o, k in ((1024, 1024, 1), (512, 512, 10))),
    *(Row(op, 1, 1, 256, 256, layers=24) for op in ("kron_apply", "kron_solve")),
    *(Row(op, 1, 1, 64, 64, layers=48) for op in ("kron_apply", "kron_solve")),
    *(Row("sample_dots", *pair) for pair in ((512, 1, 1024, 1024), (16, 128, 256, 1024), (16, 128, 256, 1024, 10))),
    *(Row("linear_rop", n, 1, i, o, k) for n, i, o, k in ((2048, 768, 768, 1), (512, 1024, 1024, 4))),
    *(Row("weighted_grad", *pair) for pair in ((512, 1, 1024, 1024), (16, 128, 256, 1024), (256, 1, 784, 512, 4))),
    *(Row("norm_sample_stats", *shape) for shape in ((16, 128, 256), (32, 256, 768), (8, 1024, 1024), (256, 1, 512))),
    *(Row("softmax_hvp", n, o=o, k=k) for n, o, k in ((1024, 10, 1), (4096, 1000, 1), (1024, 10, 16), (128, 50257, 1))),
)


def inputs(row: Row, device: str) -> tuple[tuple, dict]:
    """The op's arguments, `out` poisoned."""
    if row.op != "conv_gram":
        sizes = {key: getattr(row, key) for key in ("n", "t", "i", "o", "k")}
        made = [
            make_inputs(row.op, **sizes, dtype=row.dtype, device=device, layout=row.layout, seed=seed)
            for seed in range(row.layers or 1)
        ]
        if not row.layers:
            return made[0]
        args = zip(*(each for each, _ in made), strict=True)  # numbers (a damping) are shared
        return tuple(
            [x.reshape(x.shape[-2:]) for x in each] if isinstance(each[0], Tensor) else each[0] for each in args
        ), {}
    x = torch.randn(row.n, row.i, *[row.side] * row.axes, generator=torch.Generator().manual_seed(0)).relu()
    stride, padding, dilation, groups = row.options
    width = row.i // groups * row.kernel**row.axes
    out = torch.full((width, width) if groups == 1 else (groups, width, width), math.nan, device=device)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (x.to(device, row.dtype), row.kernel), {**options, "out": out}


def work(row: Row) -> tuple[int, int]:
    """(flops, bytes) that the op needs at the least: symmetry used, every tensor moved once."""
    n, t, i, o, k = row[1:6]
    if row.op == "conv_gram":  # as a Gram matrix of patches; the offset structure needs fewer, so 100 % can be passed
        stride, padding, dilation, groups = row.options
        positions = ((row.side + 2 * padding - dilation * (row.kernel - 1) - 1) // stride + 1) ** row.axes
        width = i // groups * row.kernel**row.axes
        moved = row.dtype.itemsize * n * i * row.side**row.axes + 4 * groups * width**2
        return groups * n * positions * width * (width + 1), moved
    size, m, wide = row.dtype.itemsize, row.n * row.k, max(row.dtype.itemsize, 4)
    pair = size * (n * t * i + m * t * o)
    product = 2 * m * t * i * o
    if row.op == "gram":
        return n * t * i * (i + 1), size * n * t * i + wide * i * i
    if row.op == "sample_norms_squared":
        grams = 2 * m * t * (i + o) if t == 1 else m * t * (t + 1) * (i + o)
        return min(grams, product + 2 * m * i * o), pair + wide * m
    if row.op == "second_moment":
        return product + (0 if t == 1 else 2 * m * i * o), pair + wide * i * o
    if row.op == "sample_statistics":
        return product + 5 * m * i * o, pair + wide * (2 * i * o + 2 * m)
    if row.op == "sample_grads":
        return product, pair + wide * m * i * o
    if row.op == "sample_dots":
        return 2 * n * t * i * o * k + 2 * m * t * o * k, pair + wide * (k * i * o + m * k)
    if row.op == "linear_rop":
        return 4 * k * n * t * i * o, size * (k + 1) * (n * t * i + o * i) + wide * k * n * t * o
    if row.op == "weighted_grad":
        return 2 * n * t * i * o * 2, pair + wide * (2 * m + 2 * i * o)  # make_inputs gives two sums
    if row.op == "rotated_second_moment":
        rotated = 2 * n * t * i * i + 2 * m * t * o * o
        return rotated + product + (0 if t == 1 else 2 * m * i * o), pair + size * (i * i + o * o) + wide * i * o
    if row.op == "sample_gram":
        return t * t * m * (m + 1) * (i + o), pair + wide * m * m
    if row.op in ("kron_apply", "kron_solve"):
        count, sides = max(row.layers, 1), 2 if row.op == "kron_solve" else 1
        values = i * o if row.op == "kron_solve" else 0
        return 2 * count * sides * k * i * o * (i + o), count * (
            size * (o * o + i * i + values + k * i * o) + wide * k * i * o
        )
    if row.op == "norm_sample_stats":
        return 9 * m * t * i, size * (n + m) * t * i
    if row.op == "softmax_hvp":
        return 8 * m * t * o, size * (n * t * o + m * t * o) + wide * m * t * o
    raise ValueError(f"work: no row for {row.op}")


# torch's own formulations: what a user would write, the result kept where the op keeps it ------------------------------


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
