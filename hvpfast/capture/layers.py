"""Layers, normalised: from a module's input and output gradient to the `a` and `g` of the ops.

One registered function a layer type. It gets the module and its input with the batch first, and returns how to read
both as a grouped linear map over shared positions: `a` (G, N, T, I) and, from any gradient at the output,
`g` (G, M, T, O), such that row m of the weight's gradient is `g_m' a_m`, (G, O, I), the weight's own row-major order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Normal:
    """How one call of one layer reads as a linear map: functions, so that nothing is computed before it is needed."""

    inputs: Callable[[], Tensor]  # () -> a (G, N, T, I)
    grads: Callable[[Tensor], Tensor]  # (M, *output) -> g (G, M, T, O)


Rule = Callable[[nn.Module, Tensor], Normal]
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

    return Normal(lambda: positions(x), positions)


@layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.modules.conv._ConvNd, x: Tensor) -> Normal:
    """(N, C, *spatial): a position is an output pixel, its features the patch of each group that it sees."""

    def outputs(g: Tensor) -> Tensor:
        groups = module.groups
        return g.reshape(g.shape[0], groups, g.shape[1] // groups, -1).permute(1, 0, 3, 2)

    return Normal(lambda: patches(module, x), outputs)


def patches(module: nn.modules.conv._ConvNd, x: Tensor) -> Tensor:
    """The input patches of a convolution, (G, N, T, C / G * kernel): any stride, dilation, groups and padding mode."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    n, c, *spatial = x.shape
    x = x.contiguous()
    steps = x.stride()[2:]
    extents = [
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(spatial, module.dilation, module.kernel_size, module.stride, strict=True)
    ]
    groups = module.groups
    windows = x.as_strided(  # (G, N, *out, C / G, *kernel), a view
        (groups, n, *extents, c // groups, *module.kernel_size),
        (
            x.stride(1) * (c // groups),
            x.stride(0),
            *(step * s for step, s in zip(steps, module.stride, strict=True)),
            x.stride(1),
            *(step * d for step, d in zip(steps, module.dilation, strict=True)),
        ),
    )
    positions, features = torch.Size(extents).numel(), c // groups * torch.Size(module.kernel_size).numel()
    return windows.reshape(groups, n, positions, features)


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a module's exact type, or None. Weights that are computed (parametrisations) have none."""
    if torch.nn.utils.parametrize.is_parametrized(module):
        return None
    return RULES.get(type(module))
