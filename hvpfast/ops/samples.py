"""Per-sample gradients of a linear map, and what is made of them without an (M, O, I) array."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.arguments import accumulate_dtype, alike, floats, output
from hvpfast.dispatch import op
from hvpfast.ops.shared import columns, pair, repeat, wide
from hvpfast.untouchable import fits

_CHUNK = 1 << 26  # elements of the largest temporary that a reference makes where it can choose: 256 MB in float32


def _check_sample_grads(a, g, *, out=None):
    pair("sample_grads", a, g)
    if out is not None:
        output("sample_grads", out, (g.shape[0], g.shape[2], a.shape[2]), a)


@op(check=_check_sample_grads, backends=("cpu", "triton"))
def sample_grads(a: Tensor, g: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Per-sample gradients of a linear map's weight: row m is `g_m' a_m`, summed over the T positions.

    Args:
        a: (N, T, I) inputs. g: (M, T, O) gradients at the output; row m pairs with a[m % N].
        out: (M, O, I) in the result's dtype; overwritten. Fresh memory of this size costs more than the arithmetic.

    Returns:
        (M, O, I), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    left, right = wide(g).transpose(1, 2), wide(repeat(a, g))
    return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)


def _check_sample_norms_squared(a, g):
    pair("sample_norms_squared", a, g)


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
    a, g = wide(a), wide(g)
    if t == 1:
        return (a @ a.mT).flatten().repeat(columns(a, g)) * (g @ g.mT).flatten()
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
    pair("sample_dots", a, g)
    if not alike(a, w):
        floats("sample_dots", a=a, w=w)
    if w.dim() not in (2, 3) or tuple(w.shape[-2:]) != (g.shape[2], a.shape[2]):
        raise ValueError(
            f"sample_dots: w has shape {tuple(w.shape)}; it must be (O, I) or (K, O, I) with (O, I) = "
            f"{(g.shape[2], a.shape[2])}"
        )


@op(check=_check_sample_dots, backends=("triton",))
def sample_dots(a: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """Inner products of the per-sample gradients with directions, `<g_m' a_m, w>`, without an (M, O, I) array.

    Args:
        a: (N, T, I). g: (M, T, O); row m pairs with a[m % N]. w: (O, I), or (K, O, I) for K directions at once.

    Returns:
        (M,) or (M, K), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    n, t, i = a.shape
    o = g.shape[2]
    a, w = wide(a), wide(w)
    directions = w if w.dim() == 3 else w[None]
    k = columns(a, g)
    g = wide(g).reshape(k, n * t, o)
    count = directions.shape[0]
    image = a.reshape(n * t, i) @ directions.reshape(count * o, i).T  # (N T, K O): a_t' w for each direction
    image = image.reshape(n * t, count, o)
    dots = torch.einsum("kpo,pdo->kpd", g, image).reshape(k, n, t, count).sum(2).reshape(k * n, count)
    return dots if w.dim() == 3 else dots[:, 0]


def _check_weighted_grad(a, g, c):
    pair("weighted_grad", a, g)
    if not alike(a, c):
        floats("weighted_grad", a=a, c=c)
    if c.dim() not in (1, 2) or c.shape[0] != g.shape[0]:
        raise ValueError(
            f"weighted_grad: c has shape {tuple(c.shape)}; it must be (M,) or (M, K) with M = {g.shape[0]}"
        )


@op(check=_check_weighted_grad, backends=("triton",))
def weighted_grad(a: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """Weighted sums of the per-sample gradients, `sum_m c_m g_m' a_m`, without an (M, O, I) array.

    Args:
        a: (N, T, I). g: (M, T, O); row m pairs with a[m % N]. c: (M,) weights, or (M, K) for K sums at once.

    Returns:
        (O, I) or (K, O, I), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    n, t, i = a.shape
    o, k = g.shape[2], columns(a, g)
    count = c.shape[1] if c.dim() == 2 else 1
    a, weights = wide(a), wide(c).reshape(k, n, count)
    # Rows of g that share an input are summed first, weighted: the product with `a` is then as large as for K = 1.
    mixed = torch.einsum("knto,knd->dnto", wide(g).reshape(k, n, t, o), weights)
    sums = mixed.reshape(count, n * t, o).mT @ a.reshape(n * t, i)
    return sums if c.dim() == 2 else sums[0]


def _check_second_moment(a, g, *, out=None):
    pair("second_moment", a, g)
    if out is not None:
        output("second_moment", out, (g.shape[2], a.shape[2]), a)


@op(check=_check_second_moment, backends=("cpu", "triton"))
def second_moment(a: Tensor, g: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Sum over samples of the squared per-sample gradients, `sum_m (g_m' a_m) o (g_m' a_m)`, elementwise squares.

    Args:
        a: (N, T, I). g: (M, T, O); row m pairs with a[m % N]. out: (O, I) in the result's dtype; overwritten.

    Returns:
        (O, I), float32 or float64: a sum, not a mean. Raises TypeError or ValueError where shapes do not fit.
    """
    i, o = a.shape[2], g.shape[2]
    a, g = wide(a), wide(g)
    if a.shape[1] == 1:
        total = g.reshape(g.shape[0], o).square().T @ repeat(a, g).reshape(g.shape[0], i).square()
    else:
        total = g.new_zeros(o, i)
        for rows in _row_chunks(g.shape[0], i * o):
            total = total + (g[rows[0] : rows[1]].mT @ _rows_of(a, rows)).square().sum(0)
    return total if out is None else out.copy_(total)


def _check_sample_statistics(a, g, c=None):
    if c is not None and fits("nti,mto,m", a, g, c):
        return
    pair("sample_statistics", a, g)
    if c is not None:
        if not alike(a, c):
            floats("sample_statistics", a=a, c=c)
        if c.shape != g.shape[:1]:
            raise ValueError(f"sample_statistics: c has shape {tuple(c.shape)}; it must be (M,) with M = {g.shape[0]}")


@op(check=_check_sample_statistics, backends=("cpu", "triton"))
def sample_statistics(a: Tensor, g: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`sample_norms_squared`, `weighted_grad` and `second_moment` of the same per-sample gradients, together.

    Args:
        a: (N, T, I). g: (M, T, O); row m pairs with a[m % N]. c: (M,) weights of the sum; all 1 without it.

    Returns:
        (norms squared (M,), sum_m c_m g_m' a_m (O, I), sum of squares (O, I)), float32 or float64. Raises TypeError or
        ValueError where shapes, dtypes or devices do not fit.
    """
    c = g.new_ones(g.shape[0]) if c is None else c
    return sample_norms_squared.reference(a, g), weighted_grad.reference(a, g, c), second_moment.reference(a, g)


def _square(name: str, label: str, q: Tensor, size: int, like: Tensor) -> None:
    """Raise unless q is (size, size), in the dtype of `like` or the one in which that sums."""
    if not alike(like, q) and not (isinstance(q, Tensor) and q.dtype is accumulate_dtype(like.dtype)):
        floats(name, a=like, **{label: q})
    if tuple(q.shape) != (size, size):
        raise ValueError(f"{name}: {label} has shape {tuple(q.shape)}; it must be {(size, size)}")


def _check_rotated_second_moment(a, g, qa, qg, *, out=None):
    if not fits("nti,mto,ii,oo", a, g, qa, qg):
        pair("rotated_second_moment", a, g)
        _square("rotated_second_moment", "qa", qa, a.shape[2], a)
        _square("rotated_second_moment", "qg", qg, g.shape[2], a)
    if out is not None:
        output("rotated_second_moment", out, (g.shape[2], a.shape[2]), a)


@op(check=_check_rotated_second_moment, backends=("cpu", "triton"))
def rotated_second_moment(a: Tensor, g: Tensor, qa: Tensor, qg: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Second moment of the per-sample gradients in rotated coordinates, `sum_m (qg' g_m' a_m qa)^2`, elementwise.

    With the eigenvectors of the Kronecker factors these are EKFAC's eigenvalues (George et al. 2018, arXiv:1806.03884).

    Args:
        a: (N, T, I). g: (M, T, O); row m pairs with a[m % N]. qa: (I, I), qg: (O, O), their columns the new axes; in
            the dtype of `a` or the result's. out: (O, I) in the result's dtype; overwritten.

    Returns:
        (O, I), float32 or float64: a sum, not a mean. Raises TypeError or ValueError where shapes or dtypes do not fit.
    """
    return second_moment.reference(wide(a) @ wide(qa), wide(g) @ wide(qg), out=out)


def _check_sample_gram(a, g, a2=None, g2=None):
    pair("sample_gram", a, g)
    if (a2 is None) != (g2 is None):
        raise ValueError(
            "sample_gram: only one of a2 and g2 is given; give both, or neither for the samples of a and g"
        )
    if a2 is not None:
        pair("sample_gram", a2, g2)
        if not alike(a, a2):
            floats("sample_gram", a=a, a2=a2)
        if a2.shape[2] != a.shape[2] or g2.shape[2] != g.shape[2]:
            raise ValueError(
                f"sample_gram: a and g have {a.shape[2]} and {g.shape[2]} features but a2 and g2 {a2.shape[2]} and "
                f"{g2.shape[2]}; both pairs must belong to one layer"
            )


@op(check=_check_sample_gram, backends=("cpu", "triton"))
def sample_gram(a: Tensor, g: Tensor, a2: Tensor | None = None, g2: Tensor | None = None) -> Tensor:
    """Inner products of per-sample gradients, `<g_m' a_m, g2_l' a2_l>`: a layer's part of the tangent kernel.

    For few positions `sum_tt' (a_t . a2_t')(g_t . g2_t')`, without an (M, O, I) array; else the gradients are formed, a
    range of output features at a time.

    Args:
        a: (N, T, I). g: (M, T, O); row m pairs with a[m % N]. a2: (N2, T2, I). g2: (M2, T2, O); without them a and g.

    Returns:
        (M, M2), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    a, g = wide(a), wide(g)
    a2, g2 = (a, g) if a2 is None else (wide(a2), wide(g2))
    (m, t, o), (m2, t2, _), i = g.shape, g2.shape, a.shape[2]
    if t == t2 == 1:
        return (g[:, 0] @ g2[:, 0].T) * (a[:, 0] @ a2[:, 0].T).repeat(columns(a, g), columns(a2, g2))
    if t * t2 * (i + o) < i * o:
        inputs, slopes = repeat(a2, g2).flatten(0, 1).T, g2.flatten(0, 1).T
        blocks = []
        for rows in _row_chunks(m, t * t2 * m2):
            products = (_rows_of(a, rows).flatten(0, 1) @ inputs) * (g[rows[0] : rows[1]].flatten(0, 1) @ slopes)
            blocks.append(products.reshape(rows[1] - rows[0], t, m2, t2).sum((1, 3)))
        return torch.cat(blocks) if blocks else g.new_zeros(0, m2)
    total = g.new_zeros(m, m2)
    for start, stop in _row_chunks(o, max(m, m2) * i):
        left = sample_grads.reference(a, g[:, :, start:stop]).flatten(1)
        right = left if g2 is g else sample_grads.reference(a2, g2[:, :, start:stop]).flatten(1)
        total = total + left @ right.T
    return total
