"""The user's model, named on the command line as `module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

from torch import nn

from hvpfast.cli.errors import UserError, reported

HELP = (
    "module:function or file.py:function; the function takes no argument and returns (model, loss, data), data being one "
    "(X, y) batch, a list of batches, or a DataLoader"
)


def load(spec: str) -> tuple[nn.Module, object, object]:
    """Import and call what `spec` names.

    Raises:
        UserError: it cannot be found, it raised, or it did not return (model, loss, data).
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UserError(f"{spec!r} is no model; give it as module:function, e.g. mymodels:resnet or train.py:build")
    with reported(f"importing {place}"):
        module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    build = getattr(module, name, None)
    if not callable(build):
        known = ", ".join(sorted(n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_"))[:8])
        raise UserError(f"{place} has no function {name!r}; it has {known or 'no functions'}")
    with reported(f"{spec}()"):
        made = build()
    if (
        not isinstance(made, (tuple, list))
        or len(made) != 3
        or not isinstance(made[0], nn.Module)
        or not callable(made[1])
    ):
        raise UserError(
            f"{spec}() returned {_described(made)}; it must return (model, loss, data): a torch.nn.Module, a callable "
            f"loss(output, target), and batches"
        )
    return tuple(made)


def _from_file(path: Path):
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(found)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        found.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _from_name(name: str):
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def _described(made: object) -> str:
    if isinstance(made, (tuple, list)):
        return f"a {type(made).__name__} of ({', '.join(type(part).__name__ for part in made)})"
    return f"a {type(made).__name__}"
