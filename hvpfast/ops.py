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


@op(check=_check_sample_grads, backends=("cpu",))
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


def _square(name: str, label: str, q: Tensor, size: int, like: Tensor) -> None:
    """Raise unless q is (size, size), in the dtype of `like` or the one in which that sums."""
    if not alike(like, q) and not (isinstance(q, Tensor) and q.dtype is accumulate_dtype(like.dtype)):
        floats(name, a=like, **{label: q})
    if tuple(q.shape) != (size, size):
        raise ValueError(f"{name}: {label} has shape {tuple(q.shape)}; it must be {(size, size)}")


def _check_rotated_second_moment(a, g, qa, qg, *, out=None):
    _pair("rotated_second_moment", a, g)
    _square("rotated_second_moment", "qa", qa, a.shape[2], a)
    _square("rotated_second_moment", "qg", qg, g.shape[2], a)
    if out is not None:
        output("rotated_second_moment", out, (g.shape[2], a.shape[2]), a)


@op(check=_check_rotated_second_moment, backends=("cpu",))
def rotated_second_moment(a: Tensor, g: Tensor, qa: Tensor, qg: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Second moment of the per-sample gradients in rotated coordinates, `sum_m (qg' g_m' a_m qa)^2`, elementwise.

    With the eigenvectors of the Kronecker factors these are EKFAC's eigenvalues (George et al. 2018, arXiv:1806.03884).

    Args:
        a: (N, T, I). g: (M, T, O); row m pairs with a[m % N]. qa: (I, I), qg: (O, O), their columns the new axes; in
            the dtype of `a` or the result's. out: (O, I) in the result's dtype; overwritten.

    Returns:
        (O, I), float32 or float64: a sum, not a mean. Raises TypeError or ValueError where shapes or dtypes do not fit.
    """
    return second_moment.reference(_wide(a) @ _wide(qa), _wide(g) @ _wide(qg), out=out)


def _check_sample_gram(a, g, a2=None, g2=None):
    _pair("sample_gram", a, g)
    if (a2 is None) != (g2 is None):
        raise ValueError("sample_gram: only one of a2 and g2 is given; give both, or neither for the samples of a and g")
    if a2 is not None:
        _pair("sample_gram", a2, g2)
        if not alike(a, a2):
            floats("sample_gram", a=a, a2=a2)
        if a2.shape[2] != a.shape[2] or g2.shape[2] != g.shape[2]:
            raise ValueError(
                f"sample_gram: a and g have {a.shape[2]} and {g.shape[2]} features but a2 and g2 {a2.shape[2]} and "
                f"{g2.shape[2]}; both pairs must belong to one layer"
            )


@op(check=_check_sample_gram, backends=("cpu",))
def sample_gram(a: Tensor, g: Tensor, a2: Tensor | None = None, g2: Tensor | None = None) -> Tensor:
    """Inner products of per-sample gradients, `<g_m' a_m, g2_l' a2_l>`: a layer's part of the tangent kernel.

    For few positions `sum_tt' (a_t . a2_t')(g_t . g2_t')`, without an (M, O, I) array; else the gradients are formed, a
    range of output features at a time.

    Args:
        a: (N, T, I). g: (M, T, O); row m pairs with a[m % N]. a2: (N2, T2, I). g2: (M2, T2, O); without them a and g.

    Returns:
        (M, M2), float32 or float64. Raises TypeError or ValueError where shapes, dtypes or devices do not fit.
    """
    a, g = _wide(a), _wide(g)
    a2, g2 = (a, g) if a2 is None else (_wide(a2), _wide(g2))
    (m, t, o), (m2, t2, _), i = g.shape, g2.shape, a.shape[2]
    if t == t2 == 1:
        return (g[:, 0] @ g2[:, 0].T) * (a[:, 0] @ a2[:, 0].T).repeat(_columns(a, g), _columns(a2, g2))
    if t * t2 * (i + o) < i * o:
        inputs, slopes = _repeat(a2, g2).flatten(0, 1).T, g2.flatten(0, 1).T
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


# Kronecker products ---------------------------------------------------------------------------------------------------


def _each_layer(name: str, **given) -> list[dict]:
    """The arguments layer by layer; raises unless all are tensors, or all lists of one length."""
    counts = {label: len(x) for label, x in given.items() if isinstance(x, (list, tuple))}
    if not counts:
        return [given]
    if len(counts) < len(given) or len(set(counts.values())) > 1:
        got = ", ".join(f"{label} {counts.get(label, 'one tensor')}" for label in given)
        raise ValueError(f"{name}: got {got}; give one tensor each, or lists with one entry a layer each")
    if not counts["v"]:
        raise ValueError(f"{name}: the lists are empty; give at least one layer")
    return [dict(zip(given, layer, strict=True)) for layer in zip(*given.values(), strict=True)]


def _check_kron(name: str, v: Tensor, left: tuple[str, Tensor], right: tuple[str, Tensor]) -> None:
    floats(name, v=v, **dict((left, right)))
    if v.dim() not in (2, 3):
        raise ValueError(f"{name}: v has shape {tuple(v.shape)}; it must be (O, I) or (K, O, I)")
    for (label, factor), size in ((left, v.shape[-2]), (right, v.shape[-1])):
        if tuple(factor.shape) != (size, size):
            raise ValueError(f"{name}: {label} has shape {tuple(factor.shape)} for v {tuple(v.shape)}; it must be {(size, size)}")


def _check_kron_apply(left, v, right):
    for layer in _each_layer("kron_apply", left=left, v=v, right=right):
        _check_kron("kron_apply", layer["v"], ("left", layer["left"]), ("right", layer["right"]))


@op(check=_check_kron_apply)
def kron_apply(
    left: Tensor | Sequence[Tensor], v: Tensor | Sequence[Tensor], right: Tensor | Sequence[Tensor]
) -> Tensor | list[Tensor]:
    """`left v right`: the product of `left (x) right'` with a weight-shaped v; for all layers of a model in one call.

    Args:
        left: (O, O). v: (O, I), or (K, O, I) for K at once. right: (I, I). Or lists of these, one entry a layer.

    Returns:
        shaped like v, float32 or float64; a list for lists. Raises TypeError or ValueError where they do not fit.
    """
    if isinstance(v, Tensor):
        return _wide(left) @ _wide(v) @ _wide(right)
    return [_wide(one) @ _wide(x) @ _wide(other) for one, x, other in zip(left, v, right, strict=True)]


def _check_kron_solve(v, qg, qa, eigenvalues, damping):
    for layer in _each_layer("kron_solve", v=v, qg=qg, qa=qa, eigenvalues=eigenvalues):
        x, values = layer["v"], layer["eigenvalues"]
        _check_kron("kron_solve", x, ("qg", layer["qg"]), ("qa", layer["qa"]))
        floats("kron_solve", v=x, eigenvalues=values)
        if values.shape != x.shape[-2:]:
            raise ValueError(f"kron_solve: eigenvalues has shape {tuple(values.shape)}; it must be {tuple(x.shape[-2:])}")
    if isinstance(damping, (list, tuple)) and (isinstance(v, Tensor) or len(damping) != len(v)):
        raise ValueError(f"kron_solve: damping has {len(damping)} entries; give one number, or one a layer")


@op(check=_check_kron_solve)
def kron_solve(
    v: Tensor | Sequence[Tensor],
    qg: Tensor | Sequence[Tensor],
    qa: Tensor | Sequence[Tensor],
    eigenvalues: Tensor | Sequence[Tensor],
    damping: float | Sequence[float],
) -> Tensor | list[Tensor]:
    """`qg ((qg' v qa) / (eigenvalues + damping)) qa'`: solves with a damped (E)K-FAC block in its eigenbasis.

    Args:
        v: (O, I), or (K, O, I) for K at once. qg: (O, O), qa: (I, I), eigenvectors in columns. eigenvalues: (O, I): for
            K-FAC the products of the factors' eigenvalues. damping: added to each. Or lists, one entry a layer.

    Returns:
        shaped like v, float32 or float64; a list for lists. Raises TypeError or ValueError where they do not fit.
    """
    if not isinstance(v, Tensor):
        shares = damping if isinstance(damping, (list, tuple)) else [damping] * len(v)
        layers = zip(v, qg, qa, eigenvalues, shares, strict=True)
        return [kron_solve.reference(*layer) for layer in layers]
    qg, qa = _wide(qg), _wide(qa)
    return qg @ ((qg.mT @ _wide(v) @ qa) / (_wide(eigenvalues) + damping)) @ qa.mT


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


@op(check=_check_softmax_hvp, backends=("cpu",))
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
