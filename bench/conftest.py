"""Options, the machine's peaks, and what every entry of a report carries."""

from __future__ import annotations

import os
import platform

import pytest
import torch

from bench.contest import QUICK, Pace, Peaks, measure_peaks
from bench.peers import versions


def pytest_addoption(parser):
    group = parser.getgroup("hvpfast")
    group.addoption("--bench-quick", action="store_true", help="tiny sizes, two rounds: do the benches run at all?")
    group.addoption(
        "--bench-seconds", type=float, default=1.0, help="seconds for each contestant of a group (default 1)"
    )
    group.addoption("--bench-rivals", help="K-FAC: only these peers, by name with commas between (default all)")


def pytest_collection_modifyitems(items):
    """A group's contestants are timed together: keep them together, whatever the order of collection."""
    order = {group: place for place, group in enumerate(dict.fromkeys(_group(item) for item in items))}
    items.sort(key=lambda item: order[_group(item)])


def _group(item) -> tuple:
    callspec = getattr(item, "callspec", None)
    values = {} if callspec is None else {k: v for k, v in callspec.params.items() if k != "contestant"}
    return (item.path, item.originalname, str(values))


@pytest.fixture(scope="session")
def quick(request) -> bool:
    return request.config.getoption("--bench-quick") or request.config.getoption("benchmark_disable")


@pytest.fixture(scope="session")
def pace(request, quick) -> Pace:
    return QUICK if quick else Pace(seconds=request.config.getoption("--bench-seconds"))


@pytest.fixture(scope="session")
def rivals(request) -> list[str] | None:
    names = request.config.getoption("--bench-rivals")
    return None if names is None else names.split(",")


@pytest.fixture(scope="session")
def peaks(quick) -> dict[str, Peaks]:
    """By device, measured in this run."""
    return {device: measure_peaks(device, quick) for device in devices()}


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def describe(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["hvpfast"] = {
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "quick": bool(config.getoption("--bench-quick")),
    }
    machine_info.pop("node", None)  # a report is about a kind of machine, not about a host


class Contests:
    """The outcome of the group that is being reported; the one before is dropped with its tensors."""

    def __init__(self):
        self.key, self.outcome = None, None

    def get(self, key, hold):
        if self.key != key:
            self.key = self.outcome = None
            self.key, self.outcome = key, hold()
        return self.outcome


@pytest.fixture(scope="session")
def contests() -> Contests:
    return Contests()
