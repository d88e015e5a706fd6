"""Every op again, one sample at a time and without a clever step: what proves the references."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _matmul(x, w, *, bias=None):
    """A sum of outer products."""
    total = torch.zeros(len(x), w.shape[1], dtype=x.dtype) + (0 if bias is None else bias)
    return sum((torch.outer(column, row) for column, row in zip(x.T, w, strict=True)), total)


def _convolve(x, w, *, bias=None, stride=1, padding=0, dilation=1, size=None):
    """A sum over the kernel's places of what each sees: images moved, their channels mixed; transposed, by autograd."""
    if size is not None:
        image = torch.zeros(len(x), w.shape[1], *size, dtype=x.dtype, requires_grad=True)
        made = _convolve(image, w, stride=stride, padding=padding, dilation=dilation)
        moved = torch.autograd.grad((made * x).sum(), image)[0]
        return moved if bias is None else moved + bias.view(-1, *[1] * len(size))
    axes = x.dim() - 2
    stride, padding, dilation = ([a] * axes if isinstance(a, int) else a for a in (stride, padding, dilation))
    x = F.pad(x, [side for p in reversed(padding) for side in (p, p)])
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, w.shape[2:], strict=True)]
    total = 0
    for place in _places(*w.shape[2:]):
        rows = tuple(
            slice(d * int(at), n - r + d * int(at) + 1, s)
            for d, at, n, r, s in zip(dilation, place, x.shape[2:], reach, stride, strict=True)
        )
        total = total + torch.einsum("nc...,oc->no...", x[(..., *rows)], w[(..., *(int(at) for at in place))])
    return total if bias is None else total + bias.view(-1, *[1] * axes)


def _own_gradients(a: Tensor, g: Tensor) -> list[Tensor]:
    """(O, I) for each row of g: the gradient of <g_m, a_m W'> in W, by autograd."""
    weight = torch.zeros(g.shape[2], a.shape[2], dtype=a.dtype, requires_grad=True)
    return [
        torch.autograd.grad((F.linear(a[m % a.shape[0]], weight) * g[m]).sum(), weight)[0] for m in range(g.shape[0])
    ]


def _stack(rows: list[Tensor], *empty: int) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, *empty, dtype=torch.float64)


def _gram(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, mirror=True):
    width = x.shape[-1] + ones_column
    total = torch.zeros(width, width, dtype=x.dtype) if beta == 0 else beta * out
    for row in x.reshape(math.prod(x.shape[:-1]), x.shape[-1]):
        feature = torch.cat([row, row.new_ones(1)]) if ones_column else row
        total = total + alpha * torch.outer(feature, feature)
    return total if mirror else total.tril() + out.triu(1)


def _conv_gram(
    x, kernel_size, *, stride=1, padding=0, dilation=1, groups=1, ones_column=False, kfac_approx="expand",
    out=None, alpha=1.0, beta=0.0,
):  # fmt: skip
    """A patch is the gradient of one output element in the weight."""
    c, axes = x.shape[1] // groups, x.dim() - 2
    kernel = (kernel_size,) * axes if isinstance(kernel_size, int) else tuple(kernel_size)
    conv = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    weight = torch.zeros(groups, c, *kernel, dtype=x.dtype, requires_grad=True)
    width = c * math.prod(kernel) + ones_column
    total = torch.zeros(groups, width, width, dtype=x.dtype)
    for n in range(len(x) if c else 0):
        outputs = conv(x[n : n + 1], weight, None, stride, padding, dilation, groups)[0].flatten(1)
        grads = [torch.autograd.grad(o.sum(), weight, retain_graph=True)[0].flatten(1) for o in outputs.T]
        rows = torch.stack(grads) if kfac_approx == "expand" else torch.stack(grads).mean(0, keepdim=True)
        if ones_column:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
        total = total + torch.einsum("tgi,tgj->gij", rows, rows)
    if ones_column and not c:
        total += len(x) * (1 if kfac_approx == "reduce" else math.prod(x.shape[2:]))
    total = alpha * (total if groups > 1 else total[0])
    return total if beta == 0 else total + beta * out


def _sample_grads(a, g, *, out=None):
    return _stack(_own_gradients(a, g), g.shape[2], a.shape[2])


def _sample_norms_squared(a, g):
    return _stack([(grad**2).sum() for grad in _own_gradients(a, g)])


def _sample_dots(a, g, w):
    columns = [_stack([(grad * each).sum() for grad in _own_gradients(a, g)]) for each in (w if w.dim() == 3 else [w])]
    return torch.stack(columns, 1) if w.dim() == 3 else columns[0]


def _weighted_grad(a, g, c):
    total = torch.zeros(*c.shape[1:], g.shape[2], a.shape[2], dtype=a.dtype)
    for weight, grad in zip(c, _own_gradients(a, g), strict=True):
        total = total + (weight[:, None, None] * grad if c.dim() == 2 else weight * grad)
    return total


def _second_moment(a, g, *, out=None):
    return sum((grad**2 for grad in _own_gradients(a, g)), torch.zeros(g.shape[2], a.shape[2], dtype=a.dtype))


def _sample_statistics(a, g, c=None):
    grads = _own_gradients(a, g)
    none = torch.zeros(g.shape[2], a.shape[2], dtype=a.dtype)
    weighted = sum((weight * grad for weight, grad in zip(c, grads, strict=True)), none)
    return _stack([(grad**2).sum() for grad in grads]), weighted, sum((grad**2 for grad in grads), none)


def _rotated_second_moment(a, g, qa, qg, *, out=None):
    total = torch.zeros(g.shape[2], a.shape[2], dtype=a.dtype)
    return sum(((qg.T @ grad @ qa) ** 2 for grad in _own_gradients(a, g)), total)


def _sample_gram(a, g, a2=None, g2=None):
    left = _own_gradients(a, g)
    right = left if a2 is None else _own_gradients(a2, g2)
    return _stack([_stack([(x * y).sum() for y in right]) for x in left], len(right))


def _kron_apply(left, v, right):
    return torch.stack([(torch.kron(left, right.T.contiguous()) @ one.flatten()).reshape(one.shape) for one in v])


def _kron_solve(v, qg, qa, eigenvalues, damping):
    basis = torch.kron(qg, qa)
    damped = eigenvalues.flatten() + damping
    return torch.stack([(basis @ (basis.T @ one.flatten() / damped)).reshape(one.shape) for one in v])


def _softmax_hvp(logits, v, *, weight=None):
    classes = logits.shape[-1]
    product = torch.zeros_like(v)
    if classes == 0:
        return product
    for index in torch.cartesian_prod(*(torch.arange(s) for s in v.shape[:-1])).reshape(-1, v.dim() - 1).tolist():
        row = tuple(index[v.dim() - logits.dim() :])
        target = torch.tensor(sum(index) % classes)  # the Hessian is the same for every label
        _, one = torch.autograd.functional.vhp(
            lambda f, label=target: F.cross_entropy(f, label), logits[row], v[tuple(index)]
        )
        product[tuple(index)] = one if weight is None else weight[row] * one
    return product


def _reorthogonalize(w, basis, *, normalize=False):
    """The projection that least squares find; the basis is orthonormal."""
    rest = w - basis.T @ torch.linalg.lstsq(basis.T, w[:, None]).solution[:, 0] if len(basis) else w
    norm = torch.tensor(math.hypot(*rest.tolist()), dtype=torch.float64)
    coefficients = torch.stack([(row * w).sum() for row in basis]) if len(basis) else w.new_zeros(0)
    return (rest / norm if normalize and norm > 0 else rest), coefficients, norm


def _places(*shape):
    return torch.cartesian_prod(*(torch.arange(s) for s in shape)).reshape(-1, len(shape)).tolist()


def _slope(logits, label):
    """Gradient of one row's own loss in its logits."""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(leaf, torch.tensor(label)), leaf)[0]


def _softmax_root(logits, v, *, weight=None, transpose=False):
    """Columns from the gradients at every label, each times the root of the label's probability."""
    product = torch.zeros_like(v)
    for row in map(tuple, _places(*logits.shape[:-1]) if v.numel() else ()):
        slopes = torch.stack([_slope(logits[row], label) for label in range(logits.shape[-1])], 1)
        root = -slopes * (torch.softmax(logits[row], 0) * weight[row]).sqrt()
        at = (..., *row, slice(None))
        product[at] = v[at] @ (root if transpose else root.T)
    return product


def _softmax_sample(logits, uniform, *, weight=None):
    result = torch.zeros(*uniform.shape, logits.shape[-1], dtype=logits.dtype)
    for index in _places(*uniform.shape) if logits.shape[-1] else ():
        row, rest, label = tuple(index[uniform.dim() + 1 - logits.dim() :]), float(uniform[tuple(index)]), 0
        p = torch.softmax(logits[row], 0).tolist()
        while rest >= p[label]:
            rest, label = rest - p[label], label + 1
        result[tuple(index)] = _slope(logits[row], label) * weight[row].sqrt()
    return result


def _linear_rop(x, w, dx, dw, *, db=None):
    """The directional derivative by dual numbers, a direction at a time."""
    if dx.dim() == 3:
        each = zip(dx, dw, [None] * len(dx) if db is None else db, strict=True)
        return _stack([_linear_rop(x, w, *one, db=shift) for *one, shift in each], len(x), len(w))
    return torch.func.jvp(
        F.linear,
        (x, w, torch.zeros_like(w[:, 0] if w.numel() else x.new_zeros(len(w)))),
        (dx, dw, torch.zeros(len(w), dtype=x.dtype) if db is None else db),
    )[1]


_FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
}


def _activation_rop(x, g, c, *, activation, of="gx"):
    """torch's own double backward of its own function."""
    x, g = x.clone().requires_grad_(), g.clone().requires_grad_()
    (slope,) = torch.autograd.grad(_FUNCTIONS[activation](x), x, g, create_graph=True)
    return torch.autograd.grad(slope, [{"g": g, "x": x}[letter] for letter in of], c)


def _norm_rop(x, g, rstd, *, c=None, mean=None, weight=None, c_weight=None, c_bias=None, of="gxw"):
    """By autograd through the statistics, row by row; eps is what makes them the given ones."""
    weight = torch.ones_like(x.sum(0)) if weight is None else weight
    empty = [x.new_zeros(0, x.shape[1]), x.new_zeros(0, x.shape[1])]
    found = {"g": empty[:1], "x": empty[1:], "w": [torch.zeros_like(weight)]}
    for row, slope, inverse, *more in zip(x, g, rstd, range(len(x)), strict=True):
        row, slope, w, b = (y.clone().requires_grad_() for y in (row, slope, weight, torch.zeros_like(weight)))

        def centred(y, more=more):
            if mean is None:
                return y
            return y - y.mean() + (y.detach().mean() - mean[more[0]])

        eps = inverse**-2 - centred(row.detach()).square().mean()
        y = w * centred(row) * (centred(row).square().mean() + eps).rsqrt() + b
        grads = torch.autograd.grad(y, (row, w, b), slope, create_graph=True)
        given = (None if c is None else c[more[0]], c_weight, c_bias)
        total = sum((a * b).sum() for a, b in zip(grads, given, strict=True) if b is not None)
        each = torch.autograd.grad(total, (slope, row, w), allow_unused=True)
        for letter, y, like in zip("gxw", each, (slope, row, w), strict=True):
            found[letter].append((torch.zeros_like(like) if y is None else y.detach())[None])
    made = {
        "g": torch.cat(found["g"]),
        "x": torch.cat(found["x"]),
        "w": torch.stack([y.reshape(weight.shape) for y in found["w"]]).sum(0),
    }
    return tuple(made[letter] for letter in of)


def _cg_update(x, r, p, q, rz, *, damping=0.0, inplace=False):
    """Column by column: x goes where the model x'(A + damping I)x / 2 - b'x is least along p, which its slope -r'p tells."""
    columns = []
    for one in zip(*(y.T for y in (x, r, p, q)), rz, strict=True):
        x_, r_, p_, q_, before = one
        image = q_ + damping * p_
        curvature = torch.dot(p_, image)
        if curvature <= 0:
            columns.append((x_, r_, r_ + p_ * torch.dot(r_, r_) / before, curvature, torch.dot(r_, r_)))
            continue
        rest = r_ - before * image / curvature
        after = torch.dot(rest, rest)
        columns.append((x_ + before * p_ / curvature, rest, rest + after * p_ / before, curvature, after))
    vectors = zip(*columns, strict=True) if columns else [[]] * 5
    return tuple(
        torch.stack(list(one), -1) if len(one) else y
        for one, y in zip(map(list, vectors), (x, r, p, rz, rz), strict=True)
    )


def _norms_and_squares(rows, features):
    rows = _stack(rows, features)
    return (rows**2).sum(1), (rows**2).sum(0)


def _norm_sample_stats(x, g, *, kind=None, eps=0.0, mean=None, rstd=None):
    """Gradients of a scale and a shift applied to the normalised input, by autograd."""
    scales, shifts, features = [], [], x.shape[2]
    for m in range(len(g)):
        scale, shift = (torch.ones(features, dtype=x.dtype, requires_grad=True) for _ in range(2))
        rows = x[m % len(x)]
        if kind == "layer":
            rows = rows - rows.mean(1, keepdim=True)
        if kind is not None:
            rows = rows / ((rows**2).mean(1, keepdim=True) + eps).sqrt()
        both = torch.autograd.grad(((scale * rows + shift) * g[m]).sum(), (scale, shift))
        scales.append(both[0]), shifts.append(both[1])
    (one, two), (three, four) = _norms_and_squares(scales, features), _norms_and_squares(shifts, features)
    return one, three, two, four


def _bias_sample_stats(g):
    return _norms_and_squares([sum(row, torch.zeros(g.shape[2], dtype=g.dtype)) for row in g], g.shape[2])


def _tables(g, indices, rows):
    found = []
    for m in range(len(g)):
        table = torch.zeros(rows, g.shape[2], dtype=g.dtype, requires_grad=True)
        found.append(torch.autograd.grad((F.embedding(indices[m % len(indices)], table) * g[m]).sum(), table)[0])
    return found


def _embedding_sample_norms(g, indices):
    rows = int(indices.max()) + 1 if indices.numel() else 1
    return _stack([(table**2).sum() for table in _tables(g, indices, rows)])


def _embedding_second_moment(g, indices, rows):
    return sum((table**2 for table in _tables(g, indices, rows)), torch.zeros(rows, g.shape[2], dtype=g.dtype))


TRUTHS = {
    "matmul": _matmul,
    "convolve": _convolve,
    "gram": _gram,
    "conv_gram": _conv_gram,
    "sample_grads": _sample_grads,
    "sample_norms_squared": _sample_norms_squared,
    "sample_dots": _sample_dots,
    "weighted_grad": _weighted_grad,
    "second_moment": _second_moment,
    "sample_statistics": _sample_statistics,
    "rotated_second_moment": _rotated_second_moment,
    "sample_gram": _sample_gram,
    "kron_apply": _kron_apply,
    "kron_solve": _kron_solve,
    "softmax_hvp": _softmax_hvp,
    "cg_update": _cg_update,
    "linear_rop": _linear_rop,
    "activation_rop": _activation_rop,
    "norm_rop": _norm_rop,
    "reorthogonalize": _reorthogonalize,
    "norm_sample_stats": _norm_sample_stats,
    "bias_sample_stats": _bias_sample_stats,
    "embedding_sample_norms": _embedding_sample_norms,
    "embedding_second_moment": _embedding_second_moment,
    "softmax_root": _softmax_root,
    "softmax_sample": _softmax_sample,
}
