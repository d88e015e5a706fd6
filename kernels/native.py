"""Launchers of the compiled kernels (`_cpu`, `_cuda`): they check, allocate, and hand over pointers and strides."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch  # loaded first: the extensions share its OpenMP library

_modules: dict[str, ModuleType | str] = {}


def _load(device: str) -> ModuleType | str:
    """The extension for "cpu" or "cuda", or the reason why there is none."""
    if device not in _modules:
        try:
            _modules[device] = importlib.import_module(f"hvpfast.kernels._{device}")
        except ImportError as error:
            _modules[device] = f"not built: {build_report().get(device, 'no record of a build; reinstall hvpfast')}"
            if any(Path(__file__).parent.glob(f"_{device}.*")):
                _modules[device] = f"built, but it cannot be loaded: {error}"
    return _modules[device]


def build_report() -> dict[str, str]:
    """What the installation built: for "cpu" and "cuda" either "built" or the reason why not."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def missing(device: str) -> str | None:
    """Why no compiled kernel can run on "cpu" or "cuda" here, or None."""
    module = _load(device)
    if isinstance(module, str):
        return module
    if device == "cuda" and not torch.cuda.is_available():
        return "compiled, but torch sees no CUDA device"
    return None


# C++ kernels for the CPU ----------------------------------------------------------------------------------------------


def cpu_gram_supports(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, precision="auto") -> str | None:
    return "not implemented yet"


def cpu_gram(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, precision="auto"):
    raise NotImplementedError


def cpu_sample_norms_squared_supports(a, g, *, precision="auto") -> str | None:
    return "not implemented yet"


def cpu_sample_norms_squared(a, g, *, precision="auto"):
    raise NotImplementedError
