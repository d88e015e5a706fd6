"""Forward derivatives of layers: Pearlmutter's R-operator, of which products with Hessians and GGN matrices are made."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.arguments import floats, usual
from hvpfast.dispatch import op
from hvpfast.ops.shared import wide


def _check_linear_rop(x, w, dx, dw, *, db=None):
    name = "linear_rop"
    given = (x, w, dx, dw) if db is None else (x, w, dx, dw, db)
    if usual(*given):
        rows, weight, along, across = x.shape, w.shape, dx.shape, dw.shape
        if len(rows) == len(weight) == 2 and len(along) == 3 and rows[1] == weight[1] and along[1:] == rows:
            if across == (along[0], *weight) and (db is None or db.shape == across[:2]):
                return
    else:
        floats(name, x=x, w=w, dx=dx, dw=dw, **({} if db is None else {"db": db}))
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)} and w {tuple(w.shape)}; they must be (P, I) and (O, I): flatten leading axes"
        )
    if dx.dim() not in (2, 3) or dx.shape[-2:] != x.shape:
        raise ValueError(
            f"{name}: dx has shape {tuple(dx.shape)}; it must be (P, I) or (K, P, I) with (P, I) = {tuple(x.shape)}"
        )
    if dw.shape != (*dx.shape[:-2], *w.shape):
        raise ValueError(
            f"{name}: dw has shape {tuple(dw.shape)}; it must be {(*dx.shape[:-2], *w.shape)}: w's, K of them where dx has K"
        )
    if db is not None and db.shape != dw.shape[:-1]:
        raise ValueError(f"{name}: db has shape {tuple(db.shape)}; it must be {tuple(dw.shape[:-1])}, dw's without I")


@op(check=_check_linear_rop, backends=("triton",))
def linear_rop(x: Tensor, w: Tensor, dx: Tensor, dw: Tensor, *, db: Tensor | None = None) -> Tensor:
    """Derivative of a linear map `y = x w' + b` in a direction: `dx w' + x dw' + db`, as one product over [dx x] [w dw]'.

    Its reverse pass has derivatives of the same form: of `gx = g w` give `w.T` for w, of `gw = g' x` give `g.T` and `x.T`.

    Args:
        x: (P, I) inputs. w: (O, I). dx: (P, I), dw: (O, I), db: (O,) the direction; or with an axis K in front, for K of them.

    Returns:
        (P, O) or (K, P, O), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.

    Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6, 1994.
    """
    x, w, dx, dw = wide(x), wide(w), wide(dx), wide(dw)
    if dx.dim() == 2:
        first = dx @ w.T if db is None else torch.addmm(wide(db), dx, w.T)
        return torch.addmm(first, x, dw.T)
    first = dx @ w.T if db is None else dx @ w.T + wide(db)[:, None]
    return torch.baddbmm(first, x.expand(len(dx), *x.shape), dw.mT)
