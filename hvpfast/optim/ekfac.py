"""EKFAC as a preconditioner: K-FAC's eigenbases, with the gradients' own second moments as eigenvalues in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hvpfast.capture import kronecker
from hvpfast.capture.units import Unit
from hvpfast.operators.spectral import Eigen
from hvpfast.optim.kfac import KFACPreconditioner
from hvpfast.optim.layers import KroneckerLayer, Layer, RowLayer, Running, nbytes, run_unit
from hvpfast.optim.passes import Pass


class EKFACLayer(KroneckerLayer):
    """A block in the eigenbases of G (x) A, with running second moments (B, O, I) of the rotated gradients."""

    def __init__(self, unit, params, factor_dtype, inv_dtype: torch.dtype | None, approx: str, drowned: float):
        super().__init__(unit, params, factor_dtype, inv_dtype, "eigen", approx, drowned)
        self.moments: Running | None = None
        self._total: Tensor | None = None

    def reset(self) -> None:
        super().reset()
        self._total = None

    def collect(self, run: Pass, number: int, grad: Tensor) -> None:
        super().collect(run, number, grad)
        uses = run.held.setdefault(self._key, [])
        uses.append((number, grad))
        if self.eigen is not None and not run.late and len(uses) == len(run_unit(run, self).calls):
            self.rotate(run)

    @property
    def _key(self) -> str:
        return f"{self.names} rotated"

    def rotate(self, run: Pass) -> None:
        """Add the second moments, in the bases as they are, of the gradients of a pass that waited."""
        uses = run.held.pop(self._key, ())
        if not uses or self.eigen is None:
            return
        a, g = self.eigen
        if self._total is None:
            self._total = a.values.new_zeros(g.groups, g.rank, a.rank)
        calls = [(run.tape.calls[number], grad) for number, grad in uses]
        one = all(call.samples == run.samples for call, _ in calls)  # else a row of a layer is a sample of its own
        for some in [calls] if one else [[use] for use in calls]:
            kronecker.add_rotated_moment(
                self._total,
                [(call.kronecker, grad) for call, grad in some],
                some[0][0].samples,
                self.layout.weight is not None,
                self.layout.bias is not None,
                a.vectors,
                g.vectors,
                run.apart,
                run.weight,
            )

    def update_moments(self, weight: float, decay: float) -> Tensor | None:
        """Take the step's moments into the running average; None where there are none, else whether they were finite."""
        if self._total is None:
            return None
        new, self._total = self._total.div_(weight), None
        if self.moments is None:
            self.moments = Running.empty([new])
        self._spectrum = None
        return self.moments.add([new], decay)

    def set_eigen(self, a: Eigen, g: Eigen) -> None:
        """New bases: the moments go over by (R_g o R_g) S (R_a o R_a)', R the turn from the old basis to the new."""
        if self.eigen is not None and self.moments is not None:
            left, right = _turn(g, self.eigen[1]), _turn(a, self.eigen[0])
            (s,) = self.moments.values
            s = s if left is None else left @ s
            self.moments.values = [s if right is None else s @ right.mT]
        super().set_eigen(a, g)

    def _eigenvalues(self) -> Tensor:
        return super()._eigenvalues() if self.moments is None else self.moments.values[0]

    def state(self) -> dict[str, object]:
        kept = super().state()
        if self.moments is not None:
            kept["moments"] = [self.moments.values[0].clone(), self.moments.started.clone()]
        return kept

    def restore(self, kept: Mapping[str, object], inverses: bool) -> None:
        if inverses and "moments" in kept:
            device = self.params[0].device
            values, started = kept["moments"]
            self.moments = Running([values.to(device, self.dtype, copy=True)], started.to(device, copy=True))
        super().restore(kept, inverses)

    def memory(self) -> dict[str, int]:
        held = 0 if self.moments is None else self.moments.nbytes
        return {**super().memory(), "moments": held + nbytes(self._total)}


def _turn(new: Eigen, old: Eigen) -> Tensor | None:
    """(new' old) squared elementwise, (B, n, n), rows and columns of which sum to 1; None where the basis is the same."""
    if new.vectors is None or new.vectors is old.vectors:
        return None
    return (new.vectors.mT @ old.vectors).square_()


class EKFACPreconditioner(KFACPreconditioner):
    """`KFACPreconditioner` with corrected eigenvalues: `nu (Q (diag(s) + damping) Q')^-1 V`, Q = Q_G (x) Q_A.

    s is the running average of the squared gradients of samples in K-FAC's eigenbasis, taken on every factor step; when
    the basis turns, by R, s goes over by (R o R) s. A row is a sample; where the loss has a term a position, or a layer's
    rows are not the samples', that row. On steps that update the bases, the gradients at the layers' outputs are kept
    until `step`.

    Arguments, methods and errors as for `KFACPreconditioner`; compute_method is "eigen".

    Source: T. George et al., arXiv:1806.03884.
    """

    _extra = ("moments",)

    def __init__(self, model: nn.Module, **options: object):
        super().__init__(model, **options)
        if self.compute_method != "eigen":
            self.close()
            raise ValueError(
                f"{self._who}: compute_method is {self.compute_method!r}; corrected eigenvalues belong to eigenbases, so it "
                f"must be 'eigen'"
            )

    def _make(self, unit: Unit) -> Layer:
        if unit.layout is None:
            return RowLayer(unit, self._params, self.factor_dtype, self.inv_dtype)
        return EKFACLayer(unit, self._params, self.factor_dtype, self.inv_dtype, self.kfac_approx, self._drowned)

    def _arrived(self, run: Pass, number: int, grad: Tensor) -> None:
        run.late = self._inverses_due()
        super()._arrived(run, number, grad)

    def _finish_batch(self) -> None:
        layers: Sequence[EKFACLayer] = [x for x in self._layers.values() if isinstance(x, EKFACLayer)]
        for run in self._recorder.passes:
            for layer in layers:
                layer.rotate(run)
        decay = self.factor_decay
        fine = [layer.update_moments(self._weight, decay) for layer in layers]
        self._count(0, [one for one in fine if one is not None])
        super()._finish_batch()
