"""What every kernel of gram must do with mirror=False."""

import torch

from hvpfast import ops
from hvpfast.testing import assert_accurate

BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
POISON = {torch.float32: 0x7FA1B2C3, torch.float64: 0x7FF4A1B2C3D4E5F6}  # NaNs that arithmetic would not keep


def bits(x):
    return x.contiguous().view(BITS[x.dtype])


def poisoned_above(width, dtype, beta, device="cpu"):
    """(width, width): random on and below the diagonal where it is read, poison elsewhere."""
    x = torch.full((width, width), POISON[dtype], dtype=BITS[dtype], device=device).view(dtype)
    if beta:
        values = torch.randn(width, width, generator=torch.Generator().manual_seed(5), dtype=dtype).to(device)
        x.copy_(torch.where(torch.ones_like(x, dtype=torch.bool).tril_(), values, x))
    return x


def assert_lower(run, x, out=None, same=True, precision="ieee", **kwargs):
    """run(x, out=..., mirror=False) keeps what is above the diagonal bit for bit, and below it is accurate; `same`: and has
    the bits of mirror=True. `out`: memory to use, of any strides."""
    width = x.shape[-1] + kwargs.get("ones_column", False)
    dtype, beta = ops.accumulate_dtype(x.dtype), kwargs.get("beta", 0)
    before = poisoned_above(width, dtype, beta, x.device)
    out = torch.empty_like(before) if out is None else out
    out.view(BITS[dtype]).copy_(before.view(BITS[dtype]))
    assert run(x, out=out, mirror=False, **kwargs) is out
    above = torch.ones_like(before, dtype=torch.bool).triu_(1)
    assert torch.equal(bits(out)[above], bits(before)[above])
    readable = before.tril() + before.tril(-1).mT if beta else None
    assert_accurate(
        out.tril(), ops.gram, x, out=torch.zeros_like(before) if readable is None else readable.tril(), mirror=False,
        precision=precision, **kwargs,
    )  # fmt: skip
    if same:
        whole = run(x, out=torch.empty_like(before) if readable is None else readable, **kwargs)
        assert torch.equal(out.tril(), whole.tril())
