"""Kronecker factors of one call of a layer: Gram matrices of its inputs and of the gradients at its outputs.

Everything here adds to a running total of B groups, so that calls, columns and batches follow each other without a
temporary. `weight` and `ones` say whether a layer's features, and a last one that is 1 (its bias), are wanted; `beta`
multiplies the total first: 1, or 0 where it holds nothing yet and is not read. Without `mirror`, a layer that is no convolution
adds to the lower triangle only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hvpfast import ops
from hvpfast.capture.layers import Image, Normal
from hvpfast.capture.lookups import LookupSite
from hvpfast.ops.rotation import rotated
from hvpfast.ops.shared import add_rows
from hvpfast.patches import geometry, patches

_CHUNK = 1 << 20  # elements of the patches of one chunk, as in `sites.PatchSite`
_MANY = 1 << 23  # numbers of rotated rows from which they are made a few samples at a time


def _chunks(normals: Sequence[Normal], samples: int, least: int = 0) -> Iterator[slice]:
    """Ranges of samples whose inputs are made together: `_CHUNK` of their elements, or `least` where that is more."""
    size = sum(normal.patches for normal in normals)
    step = max(1, max(_CHUNK, least) // size) if size else max(1, samples)
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))


def _features(normal: Normal, weight: bool, part: slice) -> Tensor:
    """(B, n, T, I) of a range of samples, in the dtype of the sums; without the weight, I = 0."""
    a = normal.inputs(part) if normal.patches else normal.inputs()[:, part]
    return (a if weight else a[..., :0]).to(ops.accumulate_dtype(a.dtype))


def input_rows(
    normal: Normal,
    approx: str,
    weight: bool,
    ones: bool,
    weights: Tensor | None,
    part: slice = slice(None),
    scale: float = 1.0,
) -> Tensor:
    """The rows whose Gram matrix is the input factor, (B, R, I): one a position, or for "reduce" one a sample.

    `weights`: (N,) or (N, T), what each row counts, or None for one each. `scale` multiplies the rows.
    """
    image = normal.image
    if (
        image is not None
        and normal.patches
        and not image.flipped
        and weight
        and approx == "expand"
        and part == slice(None)
    ):
        if weights is None or weights.dim() == 1:
            return _image_rows(image, normal.groups, ones, weights, scale)
    rows: Tensor | None = None
    pieces = _chunks([normal], len(normal.image.x)) if normal.patches and part == slice(None) else (part,)
    for piece in pieces:  # few samples at a time: the patches stay in the cache on their way into the rows
        a = normal.inputs(piece) if normal.patches else normal.inputs()[:, piece]
        (b, n, t, i), dtype = a.shape, ops.accumulate_dtype(a.dtype)
        if approx == "reduce":
            a, t = a.to(dtype).mean(2, keepdim=True), 1
        i = i if weight else 0
        if rows is None:
            many = n if piece is part else len(normal.image.x)
            rows = torch.empty(b, many, t, i + ones, dtype=dtype, device=a.device)
        out = rows if piece is part else rows[:, piece]
        factor: float | Tensor = scale
        if weights is not None:
            w = weights[piece].to(dtype).sqrt() * scale
            factor = w.reshape(1, w.shape[0], -1, 1)
        if i:
            torch.mul(a, factor, out=out[..., :i]) if a.dtype is dtype else out[..., :i].copy_(a).mul_(factor)
        if ones:
            out[..., i:] = factor
    return rows.flatten(1, 2)


def _image_rows(image: Image, groups: int, ones: bool, weights: Tensor | None, scale: float) -> Tensor:
    """(B, R, I), the patches of an image times `scale` and the root of `weights` (N,): one look-up by a list of places, with
    a zero before the image's numbers for its border and the ones' value behind them."""
    x = image.x
    (n, c), (dtype, device) = x.shape[:2], (ops.accumulate_dtype(x.dtype), x.device)
    factor = torch.full((1, 1), scale, dtype=dtype, device=device)
    if weights is not None:
        factor = weights.to(dtype).sqrt().reshape(-1, 1) * scale
    numbers = torch.empty(n, x[0].numel() + 2, dtype=dtype, device=device)
    numbers[:, 0] = 0
    torch.mul(x.to(dtype).flatten(1), factor, out=numbers[:, 1:-1])
    numbers[:, -1:] = factor
    order = torch.arange(1, numbers.shape[1] - 1, device=device).view(1, *x.shape[1:])
    shape = geometry(x.shape[2:], image.kernel, image.stride, image.padding, image.dilation)
    places = patches(order, shape).unflatten(2, (groups, c // groups)).flatten(3)[0]  # (T, groups, I)
    if ones:
        places = torch.cat([places, places.new_full((*places.shape[:2], 1), numbers.shape[1] - 1)], 2)
    rows = torch.empty(groups, n, places.shape[0], places.shape[2], dtype=dtype, device=device)
    for own, out in zip(places.unbind(1), rows, strict=True):
        torch.index_select(numbers, 1, own.reshape(-1), out=out.view(n, -1))
    return rows.flatten(1, 2)


def add_input_gram(
    total: Tensor,
    normal: Normal,
    samples: int,
    approx: str,
    weight: bool,
    ones: bool,
    weights: Tensor | None,
    alpha: float,
    beta: float = 1.0,
    mirror: bool = True,
) -> None:
    """total (B, I, I) = beta total + alpha sum_r w_r a_r a_r' over the rows of `input_rows`; patches are not made where
    none need be."""
    if not weight:  # every row is 1
        rows = samples if approx == "reduce" else samples * normal.positions
        if weights is not None:
            rows = float(weights.sum()) * (normal.positions if weights.dim() == 1 and approx == "expand" else 1)
        total.copy_(alpha * rows) if beta == 0 else total.add_(alpha * rows)
    elif normal.image is not None and (weights is None or (weights.dim() == 1 and approx == "expand")):
        _add_patch_gram(total, normal, normal.image, approx, ones, weights, alpha, beta)
    elif weights is None and approx == "expand":
        for a, out in zip(normal.inputs(), total, strict=True):
            ops.gram(a, out=out, alpha=alpha, beta=beta, ones_column=ones, mirror=mirror)
    else:
        for part in _chunks([normal], samples):
            for rows, out in zip(input_rows(normal, approx, weight, ones, weights, part), total, strict=True):
                ops.gram(rows, out=out, alpha=alpha, beta=beta if part.start == 0 else 1.0, mirror=mirror)


def _add_patch_gram(
    total: Tensor,
    normal: Normal,
    image: Image,
    approx: str,
    ones: bool,
    weights: Tensor | None,
    alpha: float,
    beta: float,
) -> None:
    options = {
        "stride": image.stride,
        "padding": image.padding,
        "dilation": image.dilation,
        "groups": normal.groups,
        "kfac_approx": approx,
    }
    if weights is None and not image.flipped:
        out = total[0] if normal.groups == 1 else total
        ops.conv_gram(image.x, image.kernel, **options, ones_column=ones, out=out, alpha=alpha, beta=beta)
        return
    if beta == 0:
        total.zero_()
    x = image.x.to(total.dtype)
    if weights is not None:
        w = weights.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        x = x * w.sqrt()
    gram = ops.conv_gram(x, image.kernel, **options, ones_column=ones and weights is None)
    gram = gram if normal.groups > 1 else gram.unsqueeze(0)
    i = total.shape[1] - ones
    if image.flipped:
        order = _reversed(i, image.kernel, total.device)
        order = torch.cat([order, order.new_tensor([i])]) if gram.shape[1] > i else order
        gram = gram[:, order][:, :, order]
    total[:, : gram.shape[1], : gram.shape[1]].add_(gram, alpha=alpha)
    if gram.shape[1] < total.shape[1]:  # sqrt(w) would be the last feature: its products are those of the summed image
        summed = (image.x.to(total.dtype) * w).sum(0, keepdim=True)
        shape = geometry(x.shape[2:], image.kernel, image.stride, image.padding, image.dilation)
        border = patches(summed, shape)[0].sum(0).reshape(normal.groups, i)
        border = border[:, _reversed(i, image.kernel, total.device)] if image.flipped else border
        total[:, :i, i].add_(border, alpha=alpha)
        total[:, i, :i].add_(border, alpha=alpha)
        total[:, i, i].add_(weights.sum().to(total.dtype) * normal.positions, alpha=alpha)


def _reversed(features: int, kernel: Sequence[int], device: torch.device) -> Tensor:
    """The features (C, *kernel) with the kernel's axes counted from behind, as an index."""
    order = torch.arange(features, device=device).reshape(-1, *kernel)
    return order.flip(tuple(range(1, order.dim()))).reshape(-1)


def add_input_squares(
    total: Tensor,
    normal: Normal,
    samples: int,
    approx: str,
    weight: bool,
    ones: bool,
    weights: Tensor | None,
    alpha: float,
) -> None:
    """total (B, I) += the diagonal of what `add_input_gram` adds; for an embedding, how often each row is looked up."""
    if normal.kind == "rows":
        indices = normal.inputs()[0, :, :, 0]  # (N, T)
        w = torch.ones_like(indices, dtype=total.dtype) if weights is None else weights.to(total.dtype)
        w = (w.unsqueeze(1) if w.dim() == 1 else w).expand(indices.shape)
        w = w if normal.skips is None else w * (indices != normal.skips)
        if approx == "reduce":  # a sample's row is the mean of its one-hot rows
            v = total.shape[1]
            keys = indices + v * torch.arange(indices.shape[0], device=indices.device).unsqueeze(1)
            distinct, place = keys.reshape(-1).unique(return_inverse=True)
            shares = w.sqrt().reshape(-1) / indices.shape[1]
            w = add_rows(w.new_zeros(distinct.numel()), place, shares).square()
            indices = distinct % v
        add_rows(total[0], indices.reshape(-1), w.reshape(-1) * alpha)
        return
    for part in _chunks([normal], samples):
        total.add_(input_rows(normal, approx, weight, ones, weights, part).square().sum(1), alpha=alpha)


def output_rows(normal: Normal, grad: Tensor, approx: str) -> Tensor:
    """The rows whose Gram matrix is the output factor, (B, R, O): one a position, or for "reduce" their sum."""
    g = normal.grads(grad)
    g = g.to(ops.accumulate_dtype(g.dtype))
    return g.sum(2) if approx == "reduce" else g.flatten(1, 2)


def add_output_gram(
    total: Tensor, normal: Normal, grad: Tensor, approx: str, alpha: float, beta: float = 1.0, mirror: bool = True
) -> None:
    """total (B, O, O) = beta total + alpha sum_r g_r g_r' over the rows of `output_rows`."""
    if normal.image is not None and approx == "expand":  # (M, B O, *spatial): no transposed copy
        out = total[0] if normal.groups == 1 else total
        ops.conv_gram(grad, 1, groups=normal.groups, out=out, alpha=alpha, beta=beta)
        return
    g = normal.grads(grad)
    for rows, out in zip(g.sum(2) if approx == "reduce" else g, total, strict=True):
        ops.gram(rows, out=out, alpha=alpha, beta=beta, mirror=mirror)


def add_output_squares(total: Tensor, normal: Normal, grad: Tensor, approx: str, alpha: float) -> None:
    """total (B, O) += the diagonal of what `add_output_gram` adds."""
    total.add_(output_rows(normal, grad, approx).square().sum(1), alpha=alpha)


def add_rotated_moment(
    total: Tensor,
    uses: Sequence[tuple[Normal, Tensor]],
    samples: int,
    weight: bool,
    ones: bool,
    qa: Tensor | None,
    qg: Tensor | None,
    apart: bool,
    alpha: float,
) -> None:
    """total (B, o, i) += alpha sum_m (qg' g_m' a_m qa)^2 elementwise, a row's gradient summed over positions and uses.

    Args:
        uses: normal form and gradient (N, *output) of each call. qa: (B, I, i), qg: (B, O, o), orthonormal columns, or
            None for the identity. apart: every position is a row of its own, summed over the uses at it.

    Either the two sides are rotated, position by position, or each row's (O, I) gradient: whichever is less work.
    """
    if uses[0][0].kind == "rows":
        g = _beside([normal.grads(grad).to(total.dtype) for normal, grad in uses], apart)[0]
        g = g if qg is None else g @ qg[0]
        indices = _beside([normal.inputs() for normal, _ in uses], apart)[0, :, :, 0]
        moment = LookupSite((total.shape[2], g.shape[2]), indices, g).second_moment()
        total[0].add_(moment.T, alpha=alpha)
        return
    grads = [normal.grads(grad).to(total.dtype) for normal, grad in uses]  # (B, N, T, O)
    normals = [normal for normal, _ in uses]
    enough = total.shape[2] ** 2  # as many rows as features: a product reads, or packs, the whole basis each time
    for part in _chunks(normals, samples, enough) if normals[0].patches else _few(total, grads, samples):
        a = _beside([_features(normal, weight, part) for normal, _ in uses], apart)
        g = _beside([one[:, part] for one in grads], apart)
        for b, out in enumerate(total):
            q, p = (None if qa is None else qa[b]), (None if qg is None else qg[b])
            _add_moment(out, a[b], g[b], q, p, ones, alpha, samples)


def _few(total: Tensor, grads: Sequence[Tensor], samples: int) -> Iterator[slice]:
    """Ranges of samples whose rotated rows hold several times as many numbers as the total; all of them where those are
    few enough for malloc to have room for (measured, 2026-11-21: 7% less time for 8192 rows of 1024, none saved for 2048)."""
    o, i = total.shape[1:]
    each = sum(g.shape[2] for g in grads) * (i + o)
    step = max(1, samples if samples * each <= _MANY else max(2 * _CHUNK, 4 * o * i) // each)
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))


def _beside(parts: Sequence[Tensor], apart: bool) -> Tensor:
    """(B, N, T, F) of each use, side by side along T: (B, N, uses T, F); `apart`, a row for every position, (B, N T, uses, F),
    or where the uses have different positions a row for each use of each."""
    if apart and len({x.shape[2] for x in parts}) == 1:
        return torch.cat([x.flatten(1, 2).unsqueeze(2) for x in parts], 2)
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return whole.flatten(1, 2).unsqueeze(2) if apart else whole


def _add_moment(
    out: Tensor, a: Tensor, g: Tensor, qa: Tensor | None, qg: Tensor | None, ones: bool, alpha: float, samples: int
) -> None:
    """out (o, i) += alpha sum_m (qg' g_m' (a_m 1) qa)^2: a (N, T, I), g (N, T, O); `ones`: whether the 1 is there; `samples`:
    of all that is added to out."""
    (t, i), o = (a.shape[1], a.shape[2] + ones), g.shape[2]
    left, right = (o if qg is None else qg.shape[1]), (i if qa is None else qa.shape[1])
    before = t * (i * right * (qa is not None) + o * left * (qg is not None) + left * right)
    after = t * i * o + o * i * right * (qa is not None) + o * left * right * (qg is not None)
    if (qa is None and ones) or before > after:
        a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2) if ones else a
        ones = False
    if before <= after or (qa is None and qg is None):
        if qa is not None:
            a = rotated(a, qa[:-1], qa[-1], samples=samples) if ones else rotated(a, qa, samples=samples)
        out.add_(ops.second_moment(a, g if qg is None else rotated(g, qg, samples=samples)), alpha=alpha)
        return
    step = max(1, _CHUNK // (o * i))
    for start in range(0, a.shape[0], step):
        w = ops.sample_grads(a[start : start + step].contiguous(), g[start : start + step].contiguous())
        w = w if qa is None else w @ qa
        w = w if qg is None else qg.mT @ w
        out.add_(w.square().sum(0), alpha=alpha)
