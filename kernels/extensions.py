"""The compiled extensions `_cpu` and `_cuda`: loaded once, or the reason why they are not."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
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
    """Why the CPU kernels run on one thread, or None.

    They are linked to libgomp.so.1; if that is not the library that torch runs on, there would be two pools of threads.
    Copies under other names (scikit-learn brings one) are nobody's but their owner's.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    files = {
        line.split(maxsplit=5)[5].strip()
        for line in maps.read_text().splitlines()
        if line.count(" ") > 4 and "/" in line
    }
    return _two_pools(files, Path(torch.__file__).parent)


def _two_pools(files: Iterable[str], torch_folder: Path) -> str | None:
    """The reason, from the paths of the libraries that the process has loaded."""
    found = [Path(f) for f in files if any(part in Path(f).name for part in ("libgomp", "libiomp", "libomp"))]
    of_torch = [f for f in found if torch_folder in f.parents or torch_folder.with_name("torch.libs") in f.parents]
    ours = [f for f in found if f.name.startswith("libgomp.so")]
    if len(ours) > 1 or (of_torch and any(f not in of_torch for f in ours)):
        loaded = ", ".join(sorted(str(f) for f in {*ours, *of_torch}))
        return f"the kernels' OpenMP library is not torch's ({loaded})"
    return None


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
