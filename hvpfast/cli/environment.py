"""What the results depend on besides the code: versions, machine, device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import hvpfast

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "matplotlib", "tqdm", "triton")


def versions() -> dict[str, str | None]:
    """Version of Python, hvpfast and of every package that it can use; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "hvpfast": hvpfast.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = str(torch.__version__)  # with what it is built for, which its metadata leave out
    return found


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for row in info.read_text(errors="replace").splitlines():
            if row.startswith("model name"):
                return row.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """ "cpu" and the CPU's name, or the CUDA device's."""
    if device.startswith("cuda"):
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"cpu: {cpu_model()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
