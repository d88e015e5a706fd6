"""Per-sample gradients, norms, inner products, second moments and clipped sums: from a model or from a tape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from operator import methodcaller
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvpfast.autocast import full_precision
from hvpfast.capture.data import Data, batch_size, tensors_in
from hvpfast.capture.errors import NonFiniteError
from hvpfast.capture.problem import finite
from hvpfast.capture.record import record, scale_of
from hvpfast.capture.samples import Samples
from hvpfast.capture.site import Site, added

_ARGUMENTS = """
    Args:
        model: a `torch.nn.Module`, a row of output a sample; dropout off, BatchNorm in eval mode. Or a tape from
            `hvpfast.record`, with neither loss nor batch and `reduction` said.
        loss: as for `hvpfast.Hessian`; a custom one must be a mean or a sum of per-sample terms.
        batch: one (X, y).
        params: None for every parameter that requires grad, or names, Parameters or a dict.
        reduction: only with a tape: "mean" or "sum", what the loss of the recorded pass did over samples.
"""


class _Chunk(NamedTuple):
    """Some samples. names: of the parameters. map: `Samples.map`, in one backward pass. scale: what makes a site's rows
    gradients of the samples' own losses."""

    names: tuple[str, ...]
    map: Callable[..., list]
    scale: float


def _chunks(
    who: str,
    model: object,
    loss: object,
    batch: object,
    params: object,
    reduction: str | None,
    chunk_size: int | None,
    statistic: bool = False,
) -> Iterator[_Chunk]:
    if isinstance(model, record):
        if loss is not None or batch is not None or params is not None or chunk_size is not None:
            raise TypeError(f"{who}: a tape takes neither loss, batch, params nor chunk_size: it has its pass already")
        sites = model.sites(who)
        yield _Chunk(
            model.names,
            lambda f, *others: [f(*each) for each in zip(sites, *others, strict=True)],
            scale_of(reduction, model.samples, who),
        )
        return
    if reduction is not None:
        raise TypeError(f"{who}: reduction is for tapes; with a model the loss says it")
    if loss is None or batch is None:
        raise TypeError(
            f"{who}: got a model without {'loss' if loss is None else 'batch'}; call {who}(model, loss, batch)"
        )
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"{who}: chunk_size is {chunk_size!r}; it must be a positive number of samples")
    for part in _split(batch, chunk_size, who):
        samples = Samples(model, loss, part, params, who, statistic)
        yield _Chunk(samples.names, samples.map, 1.0)


def _split(batch: object, chunk_size: int | None, who: str) -> Iterator[object]:
    if chunk_size is None:
        yield batch
        return
    (one,) = Data(batch if isinstance(batch, tuple) else [batch], who)
    n = batch_size(one.inputs)
    for x in tensors_in((one.inputs, one.target)):
        if x.dim() == 0 or x.shape[0] != n:
            raise ValueError(
                f"{who}: chunk_size splits every tensor of the batch along its first axis, but one has shape "
                f"{tuple(x.shape)} where N = {n}"
            )
    for start in range(0, n, chunk_size):
        rows = slice(start, min(start + chunk_size, n))
        yield _taken(one.inputs, rows), _taken(one.target, rows)


def _taken(item: object, rows: slice) -> object:
    if isinstance(item, Tensor):
        return item[rows]
    if isinstance(item, dict):
        return {name: _taken(value, rows) for name, value in item.items()}
    return type(item)(_taken(value, rows) for value in item) if isinstance(item, (tuple, list)) else item


def _documented(function: Callable) -> Callable:
    function.__doc__ = function.__doc__.replace("\n    @ARGUMENTS\n", _ARGUMENTS)
    return full_precision(function)


@_documented
def per_sample_grads(
    model: nn.Module | record,
    loss: object = None,
    batch: object = None,
    *,
    params: object = None,
    reduction: str | None = None,
    chunk_size: int | None = None,
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gradients of each sample's own loss.

    A sample's own loss is the loss of a batch of that sample alone: under a mean over a batch of N the batch's gradient is
    the mean of these (weighted where the mean is: class weights, ignored targets), under a sum it is their sum.

    @ARGUMENTS
        chunk_size: samples run through the model at a time; None for all.
        out: what an earlier call returned, or tensors like that, to write to: memory that is new to the process
            costs several times what the gradients do.

    Returns:
        {name: (N, *param.shape)}, float32 (float64 for float64). Tied weights and modules called twice are summed exactly.

    Raises:
        StateError, NonFiniteError, ValueError, TypeError: as for `hvpfast.GGN` and `hvpfast.record`; `out` that does not fit.
    """
    who, start = "per_sample_grads", 0
    parts: dict[str, list[Tensor]] = {}
    for names, each, scale in _chunks(who, model, loss, batch, params, reduction, chunk_size):
        take = functools.partial(_sample_grads, out, start, who)
        for name, (grads, known) in zip(names, each(take, names), strict=True):
            if not known:
                _require_finite(grads, who, name)
            if scale != 1:  # a tape keeps some rows for the next question
                grads = grads * scale if out is None else grads.mul_(scale)
            parts.setdefault(name, []).append(grads)
        start += len(grads)
    if out is not None:
        for name in parts:
            if out[name].shape[0] != start:
                raise ValueError(f"{who}: out[{name!r}] has {out[name].shape[0]} rows; there are {start} samples")
        return {name: out[name] for name in parts}
    return {name: some[0] if len(some) == 1 else torch.cat(some) for name, some in parts.items()}


def _sample_grads(out: dict[str, Tensor] | None, start: int, who: str, site: Site, name: str) -> tuple[Tensor, bool]:
    """A site's gradients, in the rows of `out` from `start` on, and whether they are known to be finite."""
    if out is None:
        return site.sample_grads(), site.surely_finite()
    if name not in out:
        raise ValueError(f"{who}: out has no {name!r}; it must hold a tensor for every parameter asked for")
    whole, stop = out[name], start + site.rows
    shape, dtype = (whole.shape[0], *site.shape), site.dtype
    if whole.shape != shape or whole.dtype is not dtype or whole.shape[0] < stop:
        raise ValueError(
            f"{who}: out[{name!r}] is {whole.dtype} of shape {tuple(whole.shape)}; it must be {dtype} of shape "
            f"(N, *{site.shape}), N the number of samples, {stop} or more"
        )
    to = whole[start:stop]
    grads = site.sample_grads(to) if to.is_contiguous() else to.copy_(site.sample_grads())
    return grads, site.surely_finite()


def _norms(who: str, names: tuple[str, ...], squares: Sequence[Tensor], scale: float) -> Tensor:
    total = added(squares)
    if not finite(total):
        for name, square in zip(names, squares, strict=True):
            _require_finite(square, who, name)
    norms = total.clamp_(min=0).sqrt_()
    return norms if scale == 1 else norms.mul_(scale)


def _require_finite(x: Tensor, who: str, name: str) -> None:
    if not finite(x):
        raise NonFiniteError(
            f"{who}: the per-sample gradients have NaN or inf, or squares that overflow, at parameter {name!r}; look at the "
            f"data and the scale of the loss, or use a wider dtype"
        )


@_documented
def per_sample_grad_norms(
    model: nn.Module | record,
    loss: object = None,
    batch: object = None,
    *,
    params: object = None,
    reduction: str | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Euclidean norms of the per-sample gradients over all parameters together, without the gradients: (N,).

    @ARGUMENTS
        chunk_size: samples run through the model at a time; None for all.

    Samples and errors as for `per_sample_grads`.
    """
    who = "per_sample_grad_norms"
    chunks = _chunks(who, model, loss, batch, params, reduction, chunk_size, statistic=True)
    norms = [_norms(who, names, each(methodcaller("norms_squared")), scale) for names, each, scale in chunks]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


@_documented
def per_sample_gram(
    model: nn.Module | record,
    loss: object = None,
    batch: object = None,
    *,
    params: object = None,
    reduction: str | None = None,
) -> Tensor:
    """Inner products of the per-sample gradients over all parameters together: (N, N).

    @ARGUMENTS

    Samples and errors as for `per_sample_grads`.
    """
    ((names, each, scale),) = _chunks("per_sample_gram", model, loss, batch, params, reduction, None)
    total: Tensor | None = None

    def add(site: Site) -> None:
        nonlocal total
        total = site.gram() if total is None else total.add_(site.gram())

    each(add)
    total.mul_(scale**2)
    _require_finite(total, "per_sample_gram", names[0])
    return total


@_documented
def grad_second_moment(
    model: nn.Module | record,
    loss: object = None,
    batch: object = None,
    *,
    params: object = None,
    reduction: str | None = None,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Elementwise second moments of the per-sample gradients, `sum_n g_n o g_n`, a sum over samples: {name: param.shape}.

    @ARGUMENTS
        chunk_size: samples run through the model at a time; None for all.

    Samples and errors as for `per_sample_grads`.
    """
    total: dict[str, Tensor] = {}
    for names, each, scale in _chunks(
        "grad_second_moment", model, loss, batch, params, reduction, chunk_size, statistic=True
    ):
        for name, moment in zip(names, each(methodcaller("second_moment")), strict=True):
            _require_finite(moment, "grad_second_moment", name)
            moment = moment if scale == 1 else moment * scale**2
            total[name] = total[name].add_(moment) if name in total else moment
    return total


@_documented
def grad_statistics(
    model: nn.Module | record,
    loss: object = None,
    batch: object = None,
    *,
    params: object = None,
    reduction: str | None = None,
    chunk_size: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What gradient noise is made of, together: the sum of the per-sample gradients, their elementwise second moments and
    their norms. On a GPU one kernel a layer gives all three.

    @ARGUMENTS
        chunk_size: samples run through the model at a time; None for all.

    Returns:
        ({name: sum_n g_n}, {name: sum_n g_n o g_n}, (N,) norms), sums over samples: the variance of a coordinate is the
        second over N less the square of the first over N. Samples and errors as for `per_sample_grads`.
    """
    totals: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    every: list[Tensor] = []
    for names, each, scale in _chunks("grad_statistics", model, loss, batch, params, reduction, chunk_size):
        norms, *sums = zip(*each(methodcaller("statistics")), strict=True)
        every.append(_norms("grad_statistics", names, list(norms), scale))
        for total, parts, factor in zip(totals, sums, (scale, scale**2), strict=True):
            for name, part in zip(names, parts, strict=True):
                _require_finite(part, "grad_statistics", name)
                part = part if factor == 1 else part * factor
                total[name] = total[name].add_(part) if name in total else part
    return *totals, torch.cat(every)


@_documented
def clipped_grad(
    model: nn.Module | record,
    loss: object = None,
    batch: object = None,
    *,
    max_norm: float,
    params: object = None,
    reduction: str | None = None,
    chunk_size: int | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Sum of the per-sample gradients, each scaled down to at most `max_norm`, and their norms before that.

    `sum_n min(1, max_norm / |g_n|) g_n`: a sum over samples (divide by N for a mean), one pass, no (N, P) array.

    @ARGUMENTS
        max_norm: the bound C, positive.
        chunk_size: samples run through the model at a time; None for all.

    Returns:
        ({name: param.shape}, (N,) norms). Samples and errors as for `per_sample_grads`.

    Source: M. Abadi et al., arXiv:1607.00133, Algorithm 1 (without the noise).
    """
    if not max_norm > 0:
        raise ValueError(f"clipped_grad: max_norm is {max_norm}; it must be positive")
    total: dict[str, Tensor] = {}
    every: list[Tensor] = []
    for names, each, scale in _chunks("clipped_grad", model, loss, batch, params, reduction, chunk_size):
        sites, squares = zip(*each(lambda site: (site, site.norms_squared())), strict=True)
        norms = _norms("clipped_grad", names, squares, scale)
        weights = (max_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp_(max=1).mul_(scale).unsqueeze(1)
        for name, site in zip(names, sites, strict=True):
            clipped = site.weighted(weights)[0]
            total[name] = total[name].add_(clipped) if name in total else clipped
        every.append(norms)
    return total, torch.cat(every)
