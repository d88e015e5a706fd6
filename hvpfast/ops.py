"""The op vocabulary: what hvpfast computes, as plain PyTorch. Kernels replace these bodies; the bodies define them.

`N` samples, `T` shared positions, `I` / `O` input / output features, `K` columns, `M = K N`:
`a` (N, T, I) is a layer's input and `g` (M, T, O) the gradient at its output; row m pairs with `a[m % N]`.
The gradient of sample m with respect to the layer's weight is `g_m' a_m`, (O, I).

Every op accumulates in float32 (float64 for float64) and returns that dtype: 16-bit inputs give float32 results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvpfast.arguments import accumulate_dtype, alike, floats, output, real
from hvpfast.dispatch import op
from hvpfast.patches import geometry, patches

_CHUNK = 1 << 26  # elements of the largest temporary that a reference makes where it can choose: 256 MB in float32


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _pair(name: str, a: Tensor, g: Tensor) -> None:
    """Raise unless a (N, T, I) and g (M, T, O) pair as g[m] with a[m % N]."""
    if not alike(a, g):
        floats(name, a=a, g=g)
    if a.dim() != 3 or g.dim() != 3:
        raise ValueError(
            f"{name}: a has shape {tuple(a.shape)} and g {tuple(g.shape)}; they must be (N, T, I) and (M, T, O): "
            f"give a plain Linear's tensors a T axis of size 1 with unsqueeze(1)"
        )
    (n, t, _), (m, positions, _) = a.shape, g.shape
    if (m % n if n else m) != 0:
        raise ValueError(
            f"{name}: a has {n} rows but g has {m}; g must have a multiple of a's rows (g[m] pairs with a[m % N])"
        )
    if t != positions:
        raise ValueError(f"{name}: a has T = {t} positions but g has {positions}; they must be the same")


def _columns(a: Tensor, g: Tensor) -> int:
    """K: how many gradient rows pair with each input row."""
    return g.shape[0] // a.shape[0] if a.shape[0] else 1


def _repeat(a: Tensor, g: Tensor) -> Tensor:
    """a (N, T, I) -> (M, T, I), row m being a[m % N]; a view where M = N."""
    k = _columns(a, g)
    return a if k == 1 else a.expand(k, *a.shape).reshape(g.shape[0], *a.shape[1:])


# gram ---------------------------------------------------------------------------------------------------------------


def _check_gram(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False):
    if not real(x):
        floats("gram", x=x)
    if x.dim() == 0:
        raise ValueError("gram: x is a scalar; it must be (..., I), its last axis the features")
    if out is not None:
        width = x.shape[-1] + bool(ones_column)
        output("gram", out, (width, width), x)
    elif beta != 0:
        raise ValueError(f"gram: beta is {beta} but there is no out to scale; pass out=, or leave beta at 0")


@op(check=_check_gram, backends=("cpu", "triton", "cuda"))
def gram(
    x: Tensor, *, out: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0, ones_column: bool = False
) -> Tensor:
    """Gram matrix of the features, `beta * out + alpha * x'x`, summed over every leading axis (no mean is taken).

    Args:
        x: (..., I), any floating dtype and strides.
        out: (I, I) or, with `ones_column`, (I + 1, I + 1), in the result's dtype; overwritten. Not read if beta is 0.
        alpha, beta: factors of the new sum and of what `out` holds: a running average is one call.
        ones_column: append a feature that is 1 in every row: the factor of a layer with a bias, (x 1)'(x 1).

    Returns:
        `out`, or a new tensor: (I, I) or (I + 1, I + 1), both triangles; float32, or float64 for float64.

    Raises:
        TypeError: not a real floating tensor, or `out` of another dtype than the result's.
        ValueError: `out` of another shape or device, or beta without `out`.
    """
    rows = _wide(x).reshape(x.shape[:-1].numel(), x.shape[-1])
    if ones_column:
        rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1)
    product = rows.T @ rows
    if out is None:
        return product if alpha == 1 else product * alpha
    if beta == 0:
        return out.copy_(product if alpha == 1 else product.mul_(alpha))
    return out.mul_(beta).add_(product, alpha=alpha)


# per-sample gradients of a linear map -------------------------------------------------------------------------------


def _check_sample_grads(a, g, *, out=None):
    _pair("sample_grads", a, g)
    if out is not None:
        output("sample_grads", out, (g.shape[0], g.shape[2], a.shape[2]), a)


@op(check=_check_sample_grads)
def sample_grads(a: Tensor, g: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Per-sample gradients of a linear map's weight: row m is `g_m' a_m`, summed over the T positions.

    Args:
        a: (N, T, I) inputs. g: (M, T, O) gradients at the output; row m pairs with a[m % N].
        out: (M, O, I) in the result's dtype; overwritten. Fresh memory of this size costs more than the arithmetic.

    Returns:
        (M, O, I), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    left, right = _wide(g).transpose(1, 2), _wide(_repeat(a, g))
    return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)


def _check_sample_norms_squared(a, g):
    _pair("sample_norms_squared", a, g)


@op(check=_check_sample_norms_squared, backends=("cpu", "triton"))
def sample_norms_squared(a: Tensor, g: Tensor) -> Tensor:
    """Squared Frobenius norms of the per-sample gradients, `||g_m' a_m||^2`, without an (M, O, I) array.

    For T positions, `||g_m' a_m||^2 = sum_tt' (a_t . a_t')(g_t . g_t')` (Goodfellow 2015, arXiv:1510.01799, for T = 1;
    Li et al. 2022, arXiv:2110.05679, for T > 1); taken where it costs less than the product itself, T < 2IO / (I + O).

    Args:
        a: (N, T, I). g: (M, T, O); row m pairs with a[m % N].

    Returns:
        (M,), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    t, i, o = a.shape[1], a.shape[2], g.shape[2]
    a, g = _wide(a), _wide(g)
    if t == 1:
        return _repeat(a, g).square().sum((1, 2)) * g.square().sum((1, 2))
    by_gram = t * (i + o) < 2 * i * o
    norms = []
    for rows in _row_chunks(g.shape[0], t * t if by_gram else i * o):
        left, right = _rows_of(a, rows), g[rows[0] : rows[1]]
        if by_gram:
            norms.append((left @ left.mT * (right @ right.mT)).sum((1, 2)))
        else:
            norms.append((right.mT @ left).square().sum((1, 2)))
    return torch.cat(norms) if norms else g.new_zeros(0)


def _row_chunks(rows: int, elements: int) -> list[tuple[int, int]]:
    """Ranges over M, so that (rows of one range) x (elements a row) stays under `_CHUNK`."""
    step = max(1, _CHUNK // max(1, elements))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _rows_of(a: Tensor, rows: tuple[int, int]) -> Tensor:
    """The rows of a (N, T, I) that pair with rows [start, stop) of g."""
    n = a.shape[0]
    if rows[1] <= n:
        return a[rows[0] : rows[1]]
    return a[torch.arange(rows[0], rows[1], device=a.device) % n]


def _check_sample_dots(a, g, w):
    _pair("sample_dots", a, g)
    if not alike(a, w):
        floats("sample_dots", a=a, w=w)
    if w.dim() not in (2, 3) or tuple(w.shape[-2:]) != (g.shape[2], a.shape[2]):
        raise ValueError(
            f"sample_dots: w has shape {tuple(w.shape)}; it must be (O, I) or (K, O, I) with (O, I) = "
            f"{(g.shape[2], a.shape[2])}"
        )


@op(check=_check_sample_dots)
def sample_dots(a: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """Inner products of the per-sample gradients with directions, `<g_m' a_m, w>`, without an (M, O, I) array.

    Args:
        a: (N, T, I). g: (M, T, O); row m pairs with a[m % N]. w: (O, I), or (K, O, I) for K directions at once.

    Returns:
        (M,) or (M, K), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    n, t, i = a.shape
    o = g.shape[2]
    a, w = _wide(a), _wide(w)
    directions = w if w.dim() == 3 else w[None]
    k = _columns(a, g)
    g = _wide(g).reshape(k, n * t, o)
    count = directions.shape[0]
    image = a.reshape(n * t, i) @ directions.reshape(count * o, i).T  # (N T, K O): a_t' w for each direction
    image = image.reshape(n * t, count, o)
    dots = torch.einsum("kpo,pdo->kpd", g, image).reshape(k, n, t, count).sum(2).reshape(k * n, count)
    return dots if w.dim() == 3 else dots[:, 0]


def _check_weighted_grad(a, g, c):
    _pair("weighted_grad", a, g)
    if not alike(a, c):
        floats("weighted_grad", a=a, c=c)
    if c.dim() not in (1, 2) or c.shape[0] != g.shape[0]:
        raise ValueError(
            f"weighted_grad: c has shape {tuple(c.shape)}; it must be (M,) or (M, K) with M = {g.shape[0]}"
        )


@op(check=_check_weighted_grad)
def weighted_grad(a: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """Weighted sums of the per-sample gradients, `sum_m c_m g_m' a_m`, without an (M, O, I) array.

    Args:
        a: (N, T, I). g: (M, T, O); row m pairs with a[m % N]. c: (M,) weights, or (M, K) for K sums at once.

    Returns:
        (O, I) or (K, O, I), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    n, t, i = a.shape
    o, k = g.shape[2], _columns(a, g)
    count = c.shape[1] if c.dim() == 2 else 1
    a, weights = _wide(a), _wide(c).reshape(k, n, count)
    # Rows of g that share an input are summed first, weighted: the product with `a` is then as large as for K = 1.
    mixed = torch.einsum("knto,knd->dnto", _wide(g).reshape(k, n, t, o), weights)
    sums = mixed.reshape(count, n * t, o).mT @ a.reshape(n * t, i)
    return sums if c.dim() == 2 else sums[0]


def _check_second_moment(a, g, *, out=None):
    _pair("second_moment", a, g)
    if out is not None:
        output("second_moment", out, (g.shape[2], a.shape[2]), a)


@op(check=_check_second_moment, backends=("cpu",))
def second_moment(a: Tensor, g: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Sum over samples of the squared per-sample gradients, `sum_m (g_m' a_m) o (g_m' a_m)`, elementwise squares.

    Args:
        a: (N, T, I). g: (M, T, O); row m pairs with a[m % N]. out: (O, I) in the result's dtype; overwritten.

    Returns:
        (O, I), float32 or float64: a sum, not a mean. Raises TypeError or ValueError where shapes do not fit.
    """
    i, o = a.shape[2], g.shape[2]
    a, g = _wide(a), _wide(g)
    if a.shape[1] == 1:
        total = g.reshape(g.shape[0], o).square().T @ _repeat(a, g).reshape(g.shape[0], i).square()
    else:
        total = g.new_zeros(o, i)
        for rows in _row_chunks(g.shape[0], i * o):
            total = total + (g[rows[0] : rows[1]].mT @ _rows_of(a, rows)).square().sum(0)
    return total if out is None else out.copy_(total)


# the loss ------------------------------------------------------------------------------------------------------------


def _check_softmax_hvp(logits, v, *, weight=None):
    if not alike(logits, v):
        floats("softmax_hvp", logits=logits, v=v)
    of, shape = tuple(logits.shape), tuple(v.shape)
    if not of or (shape != of and shape[len(shape) - len(of) :] != of):
        raise ValueError(
            f"softmax_hvp: logits have shape {tuple(logits.shape)} and v {tuple(v.shape)}; they must be (..., C) and "
            f"(..., C), or (K, ..., C) for K vectors at once"
        )
    if weight is not None:
        if type(weight) is not Tensor or weight.dtype is not logits.dtype or not (weight.is_cpu and logits.is_cpu):
            floats("softmax_hvp", logits=logits, weight=weight)
        if (*weight.shape, of[-1]) != of:
            raise ValueError(
                f"softmax_hvp: weight has shape {tuple(weight.shape)}; it must be {tuple(logits.shape[:-1])}, one a row"
            )


@op(check=_check_softmax_hvp)
def softmax_hvp(logits: Tensor, v: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Product of softmax cross-entropy's Hessian in the logits with a vector: `weight (diag(p) - p p') v`, row by row.

    Args:
        logits: (..., C). v: (..., C), or (K, ..., C) for K vectors at once. weight: (...,), a factor for each row.

    Returns:
        shaped like v, float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    p, v = torch.softmax(_wide(logits), -1), _wide(v)
    product = p * (v - (p * v).sum(-1, keepdim=True))
    return product if weight is None else product * _wide(weight).unsqueeze(-1)


# a convolution's patches ------------------------------------------------------------------------------------------------


def _check_conv_gram(
    x, kernel_size, *, stride=1, padding=0, dilation=1, groups=1, ones_column=False, kfac_approx="expand",
    out=None, alpha=1.0, beta=0.0,
):  # fmt: skip
    if not real(x):
        floats("conv_gram", x=x)
    shape = tuple(x.shape)
    if len(shape) not in (3, 4, 5):
        raise ValueError(f"conv_gram: x has shape {tuple(x.shape)}; it must be (N, C, *spatial) with 1 to 3 spatial axes")
    if groups < 1 or shape[1] % groups:
        raise ValueError(f"conv_gram: x has {x.shape[1]} channels and groups is {groups}; groups must divide the channels")
    if kfac_approx not in ("expand", "reduce"):
        raise ValueError(f"conv_gram: kfac_approx is {kfac_approx!r}; it must be 'expand' or 'reduce'")
    kernel = geometry(shape[2:], kernel_size, stride, padding, dilation).kernel
    if out is not None:
        width = shape[1] // groups * math.prod(kernel) + bool(ones_column)
        output("conv_gram", out, (width, width) if groups == 1 else (groups, width, width), x)
    elif beta != 0:
        raise ValueError(f"conv_gram: beta is {beta} but there is no out to scale; pass out=, or leave beta at 0")


@op(check=_check_conv_gram, backends=("cpu",))
def conv_gram(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    ones_column: bool = False,
    kfac_approx: str = "expand",
    out: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """Gram matrix of a convolution's input patches, `beta * out + alpha * P'P`: the input factor of its K-FAC block.

    A patch holds the values under the kernel at one output position, ordered as the weight is, (C / groups, *kernel).

    Args:
        x: (N, C, *spatial), 1 to 3 spatial axes, any floating dtype and strides.
        kernel_size, stride, padding, dilation, groups: as `torch.nn.functional.conv2d` takes them; padding may be
            "same" or "valid".
        ones_column: append a feature that is 1 in every patch: the factor of a layer with a bias.
        kfac_approx: "expand": P has a row per sample and position, N T of them, and the sum runs over all. "reduce":
            a row per sample, the mean of its patches over the positions (Eschenhagen 2023, arXiv:2311.00636, eq. 23).
        out: the result's shape and dtype; overwritten. Not read if beta is 0. alpha, beta: as in `gram`.

    Returns:
        `out`, or a new tensor: (I, I) with I = C prod(kernel), plus 1 with `ones_column`; for groups > 1
        (groups, I / groups, I / groups). A sum over samples (no mean); float32, or float64 for float64.

    Raises:
        TypeError, ValueError: for a dtype, shape or geometry that does not fit.
    """
    shape = geometry(x.shape[2:], kernel_size, stride, padding, dilation)
    rows = patches(_wide(x), shape).unflatten(2, (groups, x.shape[1] // groups)).flatten(3)  # (N, T, groups, I)
    rows = rows.mean(1) if kfac_approx == "reduce" else rows.flatten(0, 1)
    if ones_column:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
    product = rows.permute(1, 2, 0) @ rows.transpose(0, 1)  # (groups, I, I)
    product = product if groups > 1 else product[0]
    if out is None:
        return product if alpha == 1 else product * alpha
    if beta == 0:
        return out.copy_(product if alpha == 1 else product.mul_(alpha))
    return out.mul_(beta).add_(product, alpha=alpha)
