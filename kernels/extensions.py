"""The compiled extensions `_cpu` and `_cuda`: loaded once, or the reason why they are not."""

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
            if device == "cpu":
                _modules[device].allow_threads(_openmp_reason() is None)
        except ImportError as error:
            _modules[device] = f"not built: {build_report().get(device, 'no record of a build; reinstall hvpfast')}"
            if any(Path(__file__).parent.glob(f"_{device}.*")):
                _modules[device] = f"built, but it cannot be loaded: {error}"
    return _modules[device]


def _openmp_reason() -> str | None:
    """Why the CPU kernels run on one thread, or None: a second OpenMP library would mean a second pool of threads."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    files = {
        line.split(maxsplit=5)[5].strip()
        for line in maps.read_text().splitlines()
        if line.count(" ") > 4 and "/" in line
    }
    found = sorted(name for name in files if any(part in Path(name).name for part in ("libgomp", "libiomp", "libomp")))
    return None if len(found) < 2 else f"{len(found)} OpenMP libraries are loaded: {', '.join(found)}"


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
