"""What the tests of Triton kernels share. Importing it skips a module where no Triton kernel can run."""

import math

import pytest
import torch

from hvpfast import testing

pytest.importorskip("triton")
from hvpfast.kernels import tiles

DEVICE = "cuda" if torch.cuda.is_available() and not tiles.INTERPRETED.value else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = [(torch.float32, "ieee"), (torch.float32, "bf16x3"), (torch.float32, "bf16"), (torch.float32, "auto")]
PRECISIONS += [(torch.bfloat16, "ieee"), (torch.float16, "auto")]

if DEVICE == "cpu" and not tiles.INTERPRETED.value:
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)


def stated(precision: str) -> str:
    return "bf16x3" if precision == "auto" else precision


def tensor(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return testing.laid_out(x.to(dtype).to(DEVICE), layout)


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, math.nan, device=DEVICE)
