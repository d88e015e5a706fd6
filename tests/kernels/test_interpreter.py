"""What tests of Triton kernels rely on in the interpreter, as `interpreter.quicken` leaves it: it checks 32-bit numbers."""

import pytest
import torch
from interpreter import VERSION
from on_triton import DEVICE

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="kernels run on the GPU, not in the interpreter")


@triton.jit
def combined(x, y, OPERATION: tl.constexpr):
    if OPERATION == "add":
        return x + y
    return x - y if OPERATION == "sub" else x * y


@triton.jit
def outer_kernel(x, y, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OPERATION: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(out + rows * COLUMNS + columns, combined(tl.load(x + rows), tl.load(y + columns), OPERATION))


@pytest.mark.skipif(
    not triton.__version__.startswith(VERSION), reason="this Triton's interpreter does not check numbers"
)
@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_integers_that_overflow_are_an_error(operation):
    most, function = 2**31 - 1, getattr(torch, operation)
    x = torch.tensor([1, 2, 3, -most if operation == "sub" else most], dtype=torch.int32)
    y = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    with pytest.raises(Exception, match="overflow"):
        outer_kernel[(1,)](x, y, torch.zeros(4, 4, dtype=torch.int32), ROWS=4, COLUMNS=4, OPERATION=operation)
    for values in (x.clamp(-7, 7), x.long()):
        out = torch.zeros(4, 4, dtype=values.dtype)
        outer_kernel[(1,)](values, y.to(values.dtype), out, ROWS=4, COLUMNS=4, OPERATION=operation)
        assert torch.equal(out, function(values[:, None], y))
