"""Forcing the CPU kernels' tiers in tests."""

import contextlib

import pytest
import torch
from hvpfast.kernels import native

TIERS = ("portable", "avx2", "avx512", "amx")
WHY_NONE = native.missing("cpu")


@contextlib.contextmanager
def forced(tier: str):
    """Run the CPU kernels on one tier, or skip saying why this machine lacks it."""
    if WHY_NONE is not None:
        pytest.skip(f"no CPU kernels: {WHY_NONE}")
    module = native._modules["cpu"]
    reason = module.tiers()[tier]
    if reason is not None:
        pytest.skip(f"{tier}: {reason}")
    module.force_tier(tier)
    try:
        yield module
    finally:
        module.force_tier(None)


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
