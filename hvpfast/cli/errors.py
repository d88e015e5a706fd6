"""What a user did that cannot work: one line, no traceback, exit status 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Says what was got, what is needed and what to do."""


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Turn the library's refusals of the user's model, data or options into one line about `what`."""
    try:
        yield
    except UserError:
        raise
    except (
        ValueError,
        TypeError,
        ArithmeticError,
        RuntimeError,
        OSError,
        ImportError,
        LookupError,
        AttributeError,
    ) as error:
        text = str(error).strip() or "no message"
        raise UserError(f"{what}: {type(error).__name__}: {text}") from error


def extra(module: str, name: str) -> None:
    """Raise UserError unless `module` can be imported; it comes with hvpfast's extra `name`."""
    import importlib

    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs {module} ({error}); install it with `pip install hvpfast[{name}]`") from error
