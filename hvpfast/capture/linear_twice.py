"""A linear map whose double backward is one op: what `J v` and `H v` push through a layer, `dx w' + x dw' + db`.

Autograd makes it of two products and two sums. Taken where a kernel for `linear_rop` is expected to be faster, which is on GPUs.
The other sums of a Hessian's product, over a node of the forward and one of the backward pass, stay autograd's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpfast import ops
from hvpfast.dispatch import BackendError

_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)


def wanted(model: nn.Module) -> bool:
    """Whether any linear map of the model could take a kernel: it is on a GPU."""
    return any(p.is_cuda for p in model.parameters())


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """`F.linear`: x (..., I), w (O, I), b (O,) -> (..., O)."""
    if isinstance(x, Tensor) and isinstance(w, Tensor) and _pays(x, w):
        return _Linear.apply(x, w, b)
    return F.linear(x, w, b)


def _pays(x: Tensor, w: Tensor) -> bool:
    """Whether an op's kernel would run. 16-bit layers keep their own sums, in 16 bits."""
    if (
        x.dtype is not torch.float32
        or w.dtype is not torch.float32
        or w.dim() != 2
        or x.dim() < 2
        or x.shape[-1] != w.shape[1]
    ):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    with torch.no_grad():
        rows, weight = _rows(x.detach()), w.detach()
        try:
            return ops.linear_rop.choose(rows, weight, rows, weight).backend != "reference"
        except BackendError:
            return False


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        ctx.set_materialize_grads(False)
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return None, None, None
        x, w = ctx.saved_tensors
        take = _Gradients.apply if torch.is_grad_enabled() else _gradients
        return take(g, x, w, ctx.needs_input_grad)


def _gradients(g: Tensor, x: Tensor, w: Tensor, needed: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """Of x, w and b, for g (..., O)."""
    rows = _rows(g)
    return (
        g @ w if needed[0] else None,
        rows.T @ _rows(x) if needed[1] else None,
        rows.sum(0) if needed[2] else None,
    )


class _Gradients(torch.autograd.Function):
    """The first derivatives, linear in g: their own derivative in g is the map's in a direction."""

    @staticmethod
    def forward(ctx, g, x, w, needed):
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        return _gradients(g, x, w, needed)

    @staticmethod
    def backward(ctx, dx, dw, db):
        g, x, w = ctx.saved_tensors
        wants_g, wants_x, wants_w, _ = ctx.needs_input_grad
        of_x = g @ dw if wants_x and dw is not None else None
        of_w = _rows(g).T @ _rows(dx) if wants_w and dx is not None else None
        return _pushed(x, w, dx, dw, db) if wants_g else None, of_x, of_w, None


def _pushed(x: Tensor, w: Tensor, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Tensor | None:
    """dx w' + x dw' + db, for what there is of them."""
    if dx is not None and dw is not None and not (_batched(dx) or _batched(dw)):
        try:
            flat = ops.linear_rop(_rows(x), w, _rows(dx), dw, db=db)
            return flat.reshape(*x.shape[:-1], len(w))
        except BackendError:  # another backend is forced, which has no kernel for it
            pass
    parts = [
        None if dx is None else dx @ w.T,
        None if dw is None else x @ dw.T,
        None if db is None else db.expand(*x.shape[:-1], len(w)),
    ]
    there = [part for part in parts if part is not None]
    return sum(there[1:], there[0]) if there else None
