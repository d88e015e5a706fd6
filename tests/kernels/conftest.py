"""Fresh memory holds NaN in the tests of Triton kernels: what a kernel reads and nobody wrote shows, workspaces included."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    if not request.node.path.name.startswith("test_triton"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # torch.utils.deterministic.fill_uninitialized_memory is on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
