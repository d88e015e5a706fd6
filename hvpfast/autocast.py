"""Autocast is for the user's model and loss, which see it as they would in training; nothing of ours runs in 16 bits under it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

_DEVICES = ("cpu", "cuda")
_NOTHING = contextlib.nullcontext()
_users: ContextVar[tuple[tuple[str, torch.dtype, bool], ...]] = ContextVar("users", default=())


def full_precision(function: Callable) -> Callable:
    """The function with autocast switched off, but within `as_the_user_has_it`."""

    @functools.wraps(function)
    def unchanged(*args, **kwargs):
        if torch.compiler.is_compiling() or not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        cache = torch.is_autocast_cache_enabled()
        found = [(d, torch.get_autocast_dtype(d), cache) for d in _DEVICES if torch.is_autocast_enabled(d)]
        token = _users.set(tuple(found))
        try:
            with contextlib.ExitStack() as stack:
                for device, _, _ in found:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return function(*args, **kwargs)
        finally:
            _users.reset(token)

    return unchanged


def as_the_user_has_it() -> contextlib.AbstractContextManager:
    """Autocast as it was where the outermost `full_precision` function was called."""
    found = _users.get()
    return _entered(found) if found else _NOTHING


@contextlib.contextmanager
def _entered(found: tuple[tuple[str, torch.dtype, bool], ...]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device, dtype, cache in found:
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=cache))
        yield
