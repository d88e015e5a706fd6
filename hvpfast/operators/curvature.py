"""What Hessian, GGN and Fisher share: sums over batches, with each batch's linearisation kept where it fits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from hvpfast.capture.data import Batch, tensors_in
from hvpfast.capture.errors import NonFiniteError, StateError
from hvpfast.capture.problem import Evaluated, Problem, finite
from hvpfast.capture.state import preserved, twice_differentiable
from hvpfast.operators.graphs import Graphs
from hvpfast.operators.linear import LinearOperator, chunks

# Memory for kept linearisations; beyond it a product reads the data and runs the model again, batch by batch.
CACHE_BYTES = int(os.environ.get("HVPFAST_CACHE_BYTES", 2 << 30))
_COLUMN_BYTES = 1 << 29  # memory that the columns pushed together through one graph may take
_MOST_COLUMNS = 64


class Piece(Protocol):
    """One batch, linearised: products of its share of the matrix, before the division by the total weight."""

    reached: list[bool]  # which parameters the batch's loss depends on

    def product(self, parts: Sequence[Tensor]) -> list[Tensor | None]:
        """One (K, *shape) a parameter -> the same form, None for zeros."""

    def bytes(self) -> int:
        """Memory that keeping the piece holds."""


class Curvature(LinearOperator):
    """A curvature matrix of a model's loss over data: `sum_b D_b C_b / sum_b D_b` for a mean, `sum_b C_b` for a sum.

    Attributes:
        graphs: the CUDA graphs of products, under `hvpfast.cuda_graphs`.
    """

    _per_sample = True

    def __init__(self, model: nn.Module, loss: object, data: object, params: object = None):
        self.problem = Problem(model, loss, data, params, type(self).__name__, self._per_sample)
        super().__init__(self.problem.space, self.problem.params)
        self._kept: list[tuple[Piece, Batch, float]] | None = None
        self._state: tuple | None = None
        self._keeps, self._verified, self._scale = True, False, 1.0
        self._recomputes = False  # whether products run parts of the model again
        self.graphs, self._graphed = Graphs(type(self).__name__, self.space), False

    def _evaluated(self, batch: Batch) -> Evaluated:
        """Run the model on one batch."""
        return self.problem.evaluate(batch)

    def _linearised(self, evaluated: Evaluated) -> Piece:
        """The piece of one batch."""
        raise NotImplementedError

    def release(self) -> None:
        """Drop what is kept between products (graphs, activations); the next product builds it anew."""
        self._kept, self._state = None, None
        self.graphs.forget()
        self.graphs.reason = None

    def _rows(self, rows: Tensor) -> Tensor:
        with torch.inference_mode(False):  # tensors made in inference mode cannot enter a graph
            rows, self._graphed = rows.clone() if rows.is_inference() else rows, self.graphs.asked()
            return self.graphs.beside(self._sum_over_batches, rows) if self._graphed else self._sum_over_batches(rows)

    def _sum_over_batches(self, rows: Tensor) -> Tensor:
        if not finite(rows):
            raise ValueError(f"{type(self).__name__} @ v: the vector holds NaN or inf")
        parts = self.space.split(rows)
        total = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        split = zip(total.split(self.space.sizes, 1), self.space.shapes, strict=True)
        views = [view.view(len(rows), *shape) for view, shape in split]
        weights, unreached, single = [], set(self.space.names), self.problem.data.single
        with contextlib.closing(self._pieces()) as pieces:  # closed, so restored, before an error leaves this call
            for piece, batch, weight in pieces:
                factor = 1.0 if single else weight
                for columns in chunks(len(rows), self._width(piece)):
                    whole = self._replayed(piece, rows[columns], batch) if self._graphed else None
                    if whole is None:
                        results = self._product(piece, [part[columns] for part in parts], batch)
                        into = [view[columns] for view in views]
                    else:
                        results, into = [whole], [total[columns]]
                    for view, result in zip(into, results, strict=True):
                        if weights:
                            if result is not None:
                                view.add_(result, alpha=factor)
                        elif result is None:
                            view.zero_()
                        else:
                            view.copy_(result if factor == 1 else result * factor)
                    if not finite(total[columns]):  # one read for all parameters; which of them it is, only then
                        shares = results if whole is None else self.space.split(whole)
                        self.problem.check_finite(shares, batch, "product")
                weights.append(weight)
                unreached -= {name for name, reached in zip(self.space.names, piece.reached, strict=True) if reached}
        if not weights:
            raise NonFiniteError(
                f"{type(self).__name__}: every target of every batch is ignored: the mean loss is 0 / 0"
            )
        if unreached:
            raise ValueError(
                f"{type(self).__name__}: no data reach parameter {sorted(unreached)[0]!r}"
                + (f" (and {len(unreached) - 1} more)" if len(unreached) > 1 else "")
                + ": the loss does not depend on it, in any batch; leave it out with params="
            )
        self._scale = self.problem.batches_total(weights)
        return total if single or self._scale == 1 else total.div_(self._scale)

    def _product(self, piece: Piece, parts: list[Tensor], batch: Batch) -> list[Tensor | None]:
        # A checkpoint runs the model again, which must take what it took the first time.
        again = twice_differentiable(self.problem.model) if self._recomputes else contextlib.nullcontext()
        try:
            with again:
                return piece.product(parts)
        except CheckpointError:
            if self._recomputes:
                raise
            self._recomputes = True
            return self._product(piece, parts, batch)
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                raise StateError(
                    f"{type(self).__name__}: batch {batch.index}: an activation that the derivative needs was changed in "
                    f"place after it was used; replace the in-place operation in the model's forward. ({error})"
                ) from error
            raise

    def _replayed(self, piece: Piece, rows: Tensor, batch: Batch) -> Tensor | None:
        """The product, all parameters in one, from a CUDA graph; None where there is none."""
        return self.graphs.product(
            piece, rows, lambda parts: self._product(piece, parts, batch), self._kept is not None
        )

    def _pieces(self) -> Iterator[tuple[Piece, Batch, float]]:
        """Every batch's piece and weight: the kept ones if they are still those of the model and the data as they are."""
        self.problem.check_state()
        if self._kept is not None and self._model_state() == self._state:
            if not self._verified:  # a loader's second pass: does it give the same batches again?
                with preserved(self.problem.model):
                    for _ in self.problem.data:
                        pass
                self._verified = True
            yield from self._kept
            return
        self._kept = None
        self.graphs.forget()
        kept: list[tuple[Piece, Batch, float]] = []
        self._keeps = self._keeps and CACHE_BYTES > 0
        room = CACHE_BYTES if self._keeps else 0
        with preserved(self.problem.model), twice_differentiable(self.problem.model):
            for batch in self.problem.data:
                evaluated = self._evaluated(batch)
                if evaluated.weight == 0:
                    continue  # every target ignored: the batch is no part of the mean
                piece = self._linearised(evaluated)
                if room > 0:
                    kept.append((piece, batch, evaluated.weight))
                    room -= piece.bytes() + sum(x.numel() * x.element_size() for x in tensors_in(batch[1:]))
                    if room <= 0:
                        self._keeps, kept = False, []
                yield piece, batch, evaluated.weight
                del piece, evaluated
        if self._graphed and not self._keeps:
            self.graphs.stop("the batches' linearisations, which would be kept, do not fit in HVPFAST_CACHE_BYTES")
        if self._keeps:
            self.graphs.room = room
            self._kept, self._state = kept, self._model_state()
            self._verified = self.problem.data.in_memory or self.problem.data.passes > 1

    def _model_state(self) -> tuple:
        """Changes whenever a parameter, a buffer, a submodule's mode, in-memory data, or the use of CUDA graphs do."""
        parameters, tensors, modes = [], [], []
        for module in self.problem.model.modules():
            modes.append(module.training)
            parameters += [p for p in module._parameters.values() if p is not None]
            tensors += [b for b in module._buffers.values() if b is not None]
        with torch.no_grad():  # the norms catch writes through `.data`, which leave the version alone
            norms = torch.stack([x.float() for x in torch._foreach_norm(parameters)]).tolist()
        marks = [(x.data_ptr(), x._version) for x in (*parameters, *tensors)]
        return norms, marks, modes, self.problem.data.versions(), self._graphed

    def _width(self, piece: Piece) -> int:
        """How many columns go through one graph together."""
        return max(1, min(_MOST_COLUMNS, _COLUMN_BYTES // max(1, piece.bytes())))
