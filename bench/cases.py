"""The rows of the op benchmarks: which op, how large, which dtype, and the work each needs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hvpfast import ops
from hvpfast.testing import make_inputs

_SIZES = {
    "norm_sample_stats": "n t i",
    "gram": "n i",
    "softmax_hvp": "n o k",
    "activation_rop": "n i",
    "norm_rop": "n i",
    "kron_apply": "i o k",
    "kron_solve": "i o k",
}


_OF_IMAGES = ("conv_gram", "convolve")


class Row(NamedTuple):
    """One benchmark: an op at N samples, T positions, I and O features, K columns; convolutions have I channels on
    `axes` axes of `side` pixels, a `kernel` of one size along all, and `options` of (stride, padding, dilation, groups);
    with layout "transposed" it is the gradient of their input."""

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
        if self.op in _OF_IMAGES:
            stride, padding, dilation, groups = self.options
            image = "x".join([str(self.side)] * self.axes)
            features = f" O={self.o}" if self.op == "convolve" else ""
            label = f"N={self.n} C={self.i}{features} {image} kernel {self.kernel} stride {stride} padding {padding}"
            label += (f" dilation {dilation}" if dilation > 1 else "") + (f" groups {groups}" if groups > 1 else "")
            label += "" if self.layout == "contiguous" else f" {self.layout}"
            return f"{self.op} {label} {str(self.dtype).removeprefix('torch.')}"
        sizes = _SIZES.get(self.op, "n t i o k").split()
        label = " ".join(f"{s.upper()}={getattr(self, s)}" for s in sizes if s != "k" or self.k > 1)
        extra = "" if self.layout == "contiguous" else f" {self.layout}"
        extra += f" {self.layers} layers" if self.layers else ""
        return f"{self.op} {label} {str(self.dtype).removeprefix('torch.')}{extra}"

    def shrunk(self) -> Row:
        """The same regime in miniature, for smoke runs."""
        if self.op in _OF_IMAGES:
            stride, padding, dilation, groups = self.options
            few = min(groups, 4)
            channels = few if groups == self.i else min(self.i, 4 * few)
            channels, features = (32, 32) if self.op == "convolve" else (channels, self.o)
            return self._replace(
                n=2, i=channels, o=features, side=min(self.side, 9), options=(stride, padding, dilation, few)
            )
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

# (N, C, O, side, kernel, stride) of layers: ResNet-18 on 32 x 32 pixels, ResNet-50's
_LAYERS = (
    (64, 64, 64, 32, 3, 1),
    (64, 128, 128, 16, 3, 1),
    (64, 256, 256, 8, 3, 1),
    (64, 512, 512, 4, 3, 1),
    (64, 64, 128, 32, 3, 2),
    (64, 256, 512, 8, 3, 2),
    (64, 64, 128, 32, 1, 2),
    (16, 128, 128, 28, 3, 1),
    (16, 256, 64, 56, 1, 1),
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
    *(
        Row("matmul", n, 1, i, o)
        for n, i, o in ((8192, 1024, 1024), (2048, 256, 1024), (2048, 768, 3072), (256, 784, 512))
    ),
    *(
        Row("convolve", n, i=c, o=o, side=side, kernel=kernel, options=(stride, kernel // 2, 1, 1), layout=layout)
        for layout in ("contiguous", "transposed")
        for n, c, o, side, kernel, stride in _LAYERS
    ),
    *(Row(op, n, i=i) for op in ("activation_rop", "norm_rop") for n, i in ((256, 256), (1024, 1024), (8192, 768))),
    *(Row("weighted_grad", *pair) for pair in ((512, 1, 1024, 1024), (16, 128, 256, 1024), (256, 1, 784, 512, 4))),
    *(Row("norm_sample_stats", *shape) for shape in ((16, 128, 256), (32, 256, 768), (8, 1024, 1024), (256, 1, 512))),
    *(Row("softmax_hvp", n, o=o, k=k) for n, o, k in ((1024, 10, 1), (4096, 1000, 1), (1024, 10, 16), (128, 50257, 1))),
)


def inputs(row: Row, device: str) -> tuple[tuple, dict]:
    """The op's arguments, `out` poisoned."""
    if row.op not in _OF_IMAGES:
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
    if row.op == "convolve":
        w = torch.randn(row.o, row.i, *[row.kernel] * row.axes, generator=torch.Generator().manual_seed(1)) / 16
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        if row.layout == "transposed":
            with torch.no_grad():
                g = ops.convolve.reference(x, w, **options)
            x, options = (
                torch.randn(g.shape, generator=torch.Generator().manual_seed(2)),
                {**options, "size": tuple(x.shape[2:])},
            )
        return (x.to(device, row.dtype), w.to(device, row.dtype)), options
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
    if row.op == "convolve":
        stride, padding, dilation, _ = row.options
        along = ((row.side + 2 * padding - dilation * (row.kernel - 1) - 1) // stride + 1) ** row.axes
        weights = i * o * row.kernel**row.axes
        return 2 * n * along * weights, row.dtype.itemsize * (n * (i * row.side**row.axes + o * along) + weights)
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
    if row.op == "matmul":
        return product, size * (n * t * i + i * o) + wide * n * t * o
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
    if row.op == "activation_rop":
        return 40 * n * t * i, (3 * size + 2 * wide) * n * t * i
    if row.op == "norm_rop":
        return 40 * n * t * i, (3 * size + 2 * wide) * n * t * i + wide * i
    if row.op == "softmax_hvp":
        return 8 * m * t * o, size * (n * t * o + m * t * o) + wide * m * t * o
    raise ValueError(f"work: no row for {row.op}")
