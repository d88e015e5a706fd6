"""Layers, normalised: from a module's input and output gradient to the `a` and `g` of the ops.

One registered function a layer type. It gets the module and its input with the batch first, and returns how to read
both as a grouped linear map over shared positions: `a` (G, N, T, I) and, from any gradient at the output,
`g` (G, M, T, O), such that row m of the weight's gradient is `g_m' a_m`, (G, O, I), the weight's own row-major order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpfast.arguments import accumulate_dtype


@dataclass(frozen=True)
class Image:
    """The input of a convolution, (N, C, *spatial) with any padding that is not zeros in place, and how it is read.

    `flipped`: whether the features count the kernel's places from behind.
    """

    x: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    flipped: bool = False


@dataclass(frozen=True)
class Normal:
    """How one call of one layer reads as a linear map: functions, so that nothing is computed before it is needed.

    Attributes:
        inputs: () -> a (G, N, T, I), or of a slice of the samples only. grads: (M, *output) -> g (G, M, T, O).
        patches: elements of `a` a sample where that is more than the layer's input holds (patches of a convolution),
            so that it is worth making a few samples at a time; 0 elsewhere.
        kind: "linear": the weight's gradient is g_m' a_m; "transposed": the weight is stored as (G, I, O);
            "scale": it multiplies feature by feature, sum_t g_t o a_t (I = O, one group);
            "rows": it is looked up, and `a` holds the row indices (1, N, T, 1).
        bias: (M, *output) -> (M, O), where it is not the sum of `grads` over positions.
        groups, positions: G and T.
        image: of a convolution, whose output's gradient is (M, G O, *spatial): makes the Gram matrix of patches without them.
        skips: of "rows", the index whose row gets no gradient.
        kronecker: from the output's spatial extents, the form that Kronecker factors are made from, where it is not this
            one: a position is an output pixel.
        scaled: of "scale", () -> (x (N, T, I), how `ops.norm_sample_stats` normalises it).
    """

    inputs: Callable[..., Tensor]
    grads: Callable[[Tensor], Tensor]
    kind: str = "linear"
    patches: int = 0
    bias: Callable[[Tensor], Tensor] | None = None
    groups: int = 1
    positions: int = 1
    image: Image | None = None
    skips: int | None = None
    kronecker: Callable[[Sequence[int]], Normal] | None = None
    scaled: Callable[[], tuple[Tensor, dict]] | None = None

    def of_gradients(self) -> Normal:
        """The same without the layer's input, whose memory it no longer holds: it reads gradients only."""
        image = None if self.image is None else replace(self.image, x=self.image.x.new_empty(0))
        return replace(self, inputs=_let_go, image=image, kronecker=None, scaled=None)


def _let_go(*arguments: object) -> Tensor:
    raise RuntimeError("the layer's input is no longer held")


Rule = Callable[[nn.Module, Tensor], "Normal | None"]  # None: this configuration of the module has no rule
RULES: dict[type, Rule] = {}


def layer(*kinds: type) -> Callable[[Rule], Rule]:
    """Register the rule of one or more module types (the exact types: a subclass may compute something else)."""

    def register(rule: Rule) -> Rule:
        for kind in kinds:
            RULES[kind] = rule
        return rule

    return register


@layer(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
def linear(module: nn.Linear, x: Tensor) -> Normal:
    """(N, ..., I): every axis between the first and the last is a position."""

    def positions(y: Tensor) -> Tensor:
        return y.reshape(1, y.shape[0], -1, y.shape[-1]) if y.dim() > 2 else y[None, :, None]

    return Normal(lambda rows=slice(None): positions(x[rows]), positions, positions=x.shape[1:-1].numel())


@layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.modules.conv._ConvNd, x: Tensor) -> Normal:
    """(N, C, *spatial): a position is an output pixel, its features the patch of each group that it sees."""

    def outputs(g: Tensor) -> Tensor:
        groups = module.groups
        return g.reshape(g.shape[0], groups, g.shape[1] // groups, -1).permute(1, 0, 3, 2)

    spots = torch.Size(_extents(module, x)).numel()
    size = x.shape[1] * torch.Size(module.kernel_size).numel() * spots if any(k > 1 for k in module.kernel_size) else 0
    sides = module._reversed_padding_repeated_twice
    padded, margin = x, module.padding
    if module.padding_mode != "zeros":
        padded, margin = F.pad(x, sides, mode=module.padding_mode) if any(sides) else x, (0,) * (x.dim() - 2)
    return Normal(
        lambda rows=slice(None): patches(module, x[rows]),
        outputs,
        patches=size,
        groups=module.groups,
        positions=spots,
        image=Image(padded, module.kernel_size, module.stride, margin, module.dilation),
    )


def patches(module: nn.modules.conv._ConvNd, x: Tensor) -> Tensor:
    """The input patches of a convolution, (G, N, T, C / G * kernel): any stride, dilation, groups and padding mode."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    extents = _extents(module, x)
    if any(module._reversed_padding_repeated_twice):
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    none = (0,) * len(extents)
    return windows(x, extents, module.kernel_size, module.stride, module.dilation, none, module.groups)


def _extents(module: nn.modules.conv._ConvNd, x: Tensor) -> list[int]:
    """The output's spatial extents for an input (N, C, *spatial)."""
    pads = module._reversed_padding_repeated_twice[::-1]  # two an axis, first axis first
    return [
        (size + pads[2 * i] + pads[2 * i + 1] - d * (k - 1) - 1) // s + 1
        for i, (size, d, k, s) in enumerate(
            zip(x.shape[2:], module.dilation, module.kernel_size, module.stride, strict=True)
        )
    ]


def windows(
    x: Tensor,
    extents: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Sliding windows of x (N, C, *spatial) at `extents` places an axis: (G, N, T, C / G * kernel), T = prod(extents).

    `padding` zeros stand before the image, and as many behind it as the last window needs.
    """
    behind = [
        max(0, (e - 1) * s + d * (k - 1) + 1 - size - p)
        for e, s, d, k, size, p in zip(extents, stride, dilation, kernel, x.shape[2:], padding, strict=True)
    ]
    if any(padding) or any(behind):
        x = F.pad(x, [side for pair in reversed(list(zip(padding, behind, strict=True))) for side in pair])
    x = x.contiguous()
    n, c = x.shape[:2]
    steps = x.stride()[2:]
    view = x.as_strided(  # (N, G, C / G, *kernel, *out): copied below along whole rows of the image, positions last
        (n, groups, c // groups, *kernel, *extents),
        (
            x.stride(0),
            x.stride(1) * (c // groups),
            x.stride(1),
            *(step * d for step, d in zip(steps, dilation, strict=True)),
            *(step * s for step, s in zip(steps, stride, strict=True)),
        ),
    )
    features, positions = c // groups * torch.Size(kernel).numel(), torch.Size(extents).numel()
    return view.reshape(n, groups, features, positions).permute(1, 0, 3, 2)


@layer(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(module: nn.modules.conv._ConvTransposeNd, x: Tensor) -> Normal:
    """(N, C, *spatial): a position is an input pixel; what it writes is the patch of the output that it reaches.

    The weight (C, O / G, *kernel) is stored input first: its gradient is a' g with a the pixels and g the patches of the
    output's gradient, as read by the convolution that this layer transposes.
    """
    groups = module.groups

    def outputs(g: Tensor) -> Tensor:
        return windows(g, x.shape[2:], module.kernel_size, module.stride, module.dilation, module.padding, groups)

    def pixels() -> Tensor:
        return x.reshape(x.shape[0], groups, x.shape[1] // groups, -1).permute(1, 0, 3, 2)

    return Normal(
        pixels,
        outputs,
        "transposed",
        bias=lambda g: g.flatten(2).sum(2),
        groups=groups,
        positions=x.shape[2:].numel(),
        kronecker=lambda extents: _upsampled(module, x, extents),
    )


def _upsampled(module: nn.modules.conv._ConvTransposeNd, x: Tensor, extents: Sequence[int]) -> Normal:
    """A transposed convolution as a convolution of stride 1 over its input with zeros put between the pixels.

    The features of an output pixel are in the weight's own order (C / G, *kernel): the patch, kernel axes reversed.
    """
    axes = x.dim() - 2
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(..., *(slice(None, None, s) for s in module.stride))] = x
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    sides = [
        (r - p, e + p - size) for r, p, e, size in zip(reach, module.padding, extents, sizes, strict=True)
    ]  # together e + r - size: as many as give `extents` windows
    spread = F.pad(spread, [side for pair in reversed(sides) for side in pair])
    ones, groups = (1,) * axes, module.groups
    kernel, spots = torch.Size(module.kernel_size), torch.Size(extents).numel()

    def inputs(rows: slice = slice(None)) -> Tensor:
        a = windows(spread[rows], extents, kernel, ones, module.dilation, (0,) * axes, groups)
        return a.unflatten(3, (-1, *kernel)).flip(tuple(range(4, 4 + axes))).flatten(3)

    def outputs(g: Tensor) -> Tensor:
        return g.reshape(g.shape[0], groups, g.shape[1] // groups, -1).permute(1, 0, 3, 2)

    image = Image(spread, tuple(kernel), ones, (0,) * axes, module.dilation, flipped=True)
    size = x.shape[1] * kernel.numel() * spots
    return Normal(inputs, outputs, "upsampled", size, groups=groups, positions=spots, image=image)


def _features_last(x: Tensor, features: int) -> Tensor:
    """(N, ..., *features) -> (1, N, T, features)"""
    return x.reshape(1, x.shape[0], -1, features)


def _channels(x: Tensor) -> Tensor:
    """(N, C, *spatial) -> (1, N, T, C)"""
    return x.reshape(x.shape[0], x.shape[1], -1).movedim(1, 2)[None]


@layer(nn.LayerNorm)
def layer_norm(module: nn.LayerNorm, x: Tensor) -> Normal:
    """(N, ..., *features): scale and shift of the normalised features."""
    features = torch.Size(module.normalized_shape).numel()
    return Normal(
        lambda: _features_last(F.layer_norm(x, module.normalized_shape, eps=module.eps), features),
        lambda g: _features_last(g, features),
        "scale",
        scaled=lambda: (_features_last(x, features)[0], {"kind": "layer", "eps": module.eps}),
    )


@layer(nn.RMSNorm)
def rms_norm(module: nn.RMSNorm, x: Tensor) -> Normal:
    """(N, ..., *features): scale of the features over their root mean square."""
    features = torch.Size(module.normalized_shape).numel()
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    return Normal(
        lambda: _features_last(F.rms_norm(x, module.normalized_shape, eps=module.eps), features),
        lambda g: _features_last(g, features),
        "scale",
        scaled=lambda: (_features_last(x, features)[0], {"kind": "rms", "eps": eps}),
    )


@layer(nn.GroupNorm)
def group_norm(module: nn.GroupNorm, x: Tensor) -> Normal:
    """(N, C, *spatial): scale and shift of each channel, normalised within its group."""

    def scaled() -> tuple[Tensor, dict]:
        each = x.reshape(x.shape[0], module.num_groups, -1)
        variance, mean = torch.var_mean(each.to(accumulate_dtype(x.dtype)), 2, correction=0)  # (N, groups)
        per = x.shape[1] // module.num_groups
        mean, rstd = (y.repeat_interleave(per, 1).unsqueeze(1) for y in (mean, (variance + module.eps).rsqrt()))
        return _channels(x)[0], {"mean": mean, "rstd": rstd}

    return Normal(
        lambda: _channels(F.group_norm(x, module.num_groups, eps=module.eps)), _channels, "scale", scaled=scaled
    )


@layer(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(module: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Normal:
    """(N, C, *spatial) in eval mode: scale and shift of each channel, normalised by the running statistics."""

    def normalised() -> Tensor:
        return _channels(F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps))

    def scaled() -> tuple[Tensor, dict]:
        mean, variance = (y.to(accumulate_dtype(y.dtype)) for y in (module.running_mean, module.running_var))
        wide = accumulate_dtype(x.dtype)
        mean, rstd = (y.to(wide)[None, None] for y in (mean, (variance + module.eps).rsqrt()))
        return _channels(x)[0], {"mean": mean, "rstd": rstd}

    return Normal(normalised, _channels, "scale", scaled=scaled)


@layer(nn.Embedding)
def embedding(module: nn.Embedding, x: Tensor) -> Normal | None:
    """(N, ...) indices: every position adds its gradient to the row that it looked up."""
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None  # these change the gradient, or the weight itself, as a function of the whole batch
    rows = x.reshape(1, x.shape[0], -1, 1)

    def grads(g: Tensor) -> Tensor:
        g = g.reshape(1, g.shape[0], -1, g.shape[-1])
        if module.padding_idx is None:
            return g
        seen = (rows != module.padding_idx).expand(-1, -1, -1, 1)
        return g * seen.repeat(1, g.shape[1] // max(1, x.shape[0]), 1, 1)

    return Normal(lambda: rows, grads, "rows", positions=x.shape[1:].numel(), skips=module.padding_idx)


def _hugging_face_conv1d(module: nn.Module, x: Tensor) -> Normal:
    """(N, ..., I) and a weight stored (I, O), as in GPT-2: a Linear with its weight transposed."""
    normal = linear(module, x)
    return Normal(normal.inputs, normal.grads, "transposed", positions=normal.positions)


_BY_NAME: dict[str, Rule] = {"transformers.pytorch_utils.Conv1D": _hugging_face_conv1d}


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a module's exact type, or None. Weights that are computed (parametrisations) have none."""
    if torch.nn.utils.parametrize.is_parametrized(module):
        return None
    kind = type(module)
    return RULES.get(kind) or _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
