"""Set before anything is imported: Triton kernels run in its interpreter where there is no GPU."""

import os
import warnings

import interpreter
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


LONGEST = ("test_ops.py", "test_install.py", "test_bench.py")


@pytest.fixture
def clean_env(monkeypatch):
    """The environment for a subprocess that must see none of hvpfast's or Triton's settings of this one."""
    for name in [name for name in os.environ if name.startswith(("HVPFAST_", "TRITON_"))]:
        monkeypatch.delenv(name)
    return dict(os.environ)


@pytest.fixture
def float64():
    """Tensors are made in float64, from one seed; warnings (of layers without a rule) are no matter."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(before)


def pytest_configure(config):
    config.addinivalue_line("markers", "install: builds and installs hvpfast (minutes); -m 'not install' leaves it out")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    interpreter.quicken()


def pytest_collection_modifyitems(items):
    """The longest files first: with `--dist loadfile --no-loadscope-reorder` no process ends with one of them alone."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
