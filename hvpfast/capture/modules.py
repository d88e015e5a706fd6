"""The tree of modules, read at once: torch's own generators, nested one a level, cost a small model more than its layers."""

from __future__ import annotations

from torch import Tensor, nn


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """`list(model.named_modules())`: every module once, parents first, in order of registration."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        children = module._modules
        if children:
            prefix = name + "." if name else ""
            stack.extend([(prefix + own, child) for own, child in reversed(children.items()) if child is not None])
    return found


def parameters(modules: list[tuple[str, nn.Module]]) -> list[tuple[str, Tensor]]:
    """`list(model.named_parameters(remove_duplicate=False))` of each of these modules' own, by full name, in order."""
    return [
        (f"{prefix}.{name}" if prefix else name, p)
        for prefix, module in modules
        for name, p in module._parameters.items()
        if p is not None
    ]
