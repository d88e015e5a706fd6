"""What a preconditioner keeps of each diagonal block: running factors, their inverse, and how gradients go through it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hvpfast.arguments import accumulate_dtype
from hvpfast.capture.sites import site_of
from hvpfast.capture.units import Layout, Unit
from hvpfast.operators.accumulate import KroneckerSums, RowSums
from hvpfast.operators.blocks import joined
from hvpfast.operators.factor import Dense, Diagonal, Factor
from hvpfast.operators.spectral import Eigen, Spectrum
from hvpfast.optim.passes import Pass

MOST_KEPT = 0.9  # of a basis's directions: with more than these, leaving out the rest saves nothing


class Running:
    """A running average of tensors that starts with the first value, and takes none that is not finite: no host waits.

    Attributes:
        values: the averages, each in its own shape. started: whether there is one, a bool tensor ().
    """

    def __init__(self, values: Sequence[Tensor], started: Tensor):
        self.values, self.started = list(values), started

    @classmethod
    def empty(cls, like: Sequence[Tensor]) -> Running:
        return cls([torch.zeros_like(x) for x in like], torch.zeros((), dtype=torch.bool, device=like[0].device))

    def add(self, new: Sequence[Tensor], decay: float) -> Tensor:
        """values = decay values + (1 - decay) new; overwrites `new`. Returns whether it was taken, a bool tensor ()."""
        fine = torch.stack([x.sum() for x in new]).isfinite().all()
        if fine.is_cpu and not bool(fine):
            return fine
        weight = torch.where(self.started, 1 - decay, 1.0)
        for old, x in zip(self.values, new, strict=True):
            old.lerp_(x if fine.is_cpu else torch.where(fine, x, old, out=x), weight.to(old.dtype))
        self.started = self.started | fine
        return fine

    @property
    def nbytes(self) -> int:
        return nbytes(*self.values)


def nbytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


class Layer:
    """One diagonal block of the preconditioner; `KroneckerLayer` and `RowLayer` fill it in.

    Attributes:
        unit: its parameters and their layout. params: the parameters. names: the key of checkpoints.
    """

    def __init__(self, unit: Unit, params: Mapping[str, Tensor], factor_dtype: torch.dtype | None):
        self.unit, self.params = unit, [params[name] for name in unit.names]
        self.names = ", ".join(unit.names)
        self._begun_on = self._place()
        self.dtype = factor_dtype or accumulate_dtype(self.params[0].dtype)
        self.running: Running | None = None
        self.sums: KroneckerSums | RowSums | None = None

    def _place(self) -> list[tuple[torch.dtype, torch.device]]:
        return [(p.dtype, p.device) for p in self.params]

    def moved(self) -> str | None:
        """Why what is kept does not go with the parameters as they are now, or None."""
        now = self._place()
        if now == self._begun_on:
            return None
        shown = [", ".join(f"{dtype} on {device}" for dtype, device in dict.fromkeys(x)) for x in (now, self._begun_on)]
        return "is {}, and was {} when its factors were begun".format(*shown)

    @property
    def label(self) -> str:
        return self.unit.name or self.names

    @property
    def ready(self) -> bool:
        """Whether there is an inverse to go through."""
        raise NotImplementedError

    def collect(self, run: Pass, number: int, grad: Tensor) -> None:
        """Take a gradient at a call's output into the sums of this step."""
        raise NotImplementedError

    def end(self, run: Pass) -> None:
        """Take what waited for the pass to be complete."""

    def reset(self) -> None:
        """Forget the sums of this step."""
        self.sums = None

    def totals(self, terms: float, weight: float) -> list[Tensor]:
        """The step's own factors."""
        raise NotImplementedError

    def update(self, terms: float, weight: float, decay: float) -> Tensor | None:
        """Take the step's sums into the running average; None where there are none, else whether they were finite."""
        if self.sums is None:
            return None
        new, self.sums = self.totals(terms, weight), None
        if self.running is None:
            self.running = Running.empty(new)
        return self.running.add(new, decay)

    def precondition(self, grads: Sequence[Tensor], damping: float) -> tuple[list[Tensor], Tensor]:
        """(block + damping)^-1 of the gradients, shaped like them, and its inner product with them, float64 ()."""
        raise NotImplementedError

    def state(self) -> dict[str, object]:
        """Copies of all tensors, and what tells one block from another."""
        unit, running = self.unit, self.running
        layout = None if unit.layout is None else list(dataclasses.astuple(unit.layout))
        kept: dict[str, object] = {"name": unit.name, "names": list(unit.names), "layout": layout}
        if running is not None:
            kept["factors"], kept["started"] = [x.clone() for x in running.values], running.started.clone()
        return kept

    def restore(self, kept: Mapping[str, object], inverses: bool) -> None:
        if "factors" in kept:
            device = self.params[0].device
            values = [x.to(device, self.dtype, copy=True) for x in kept["factors"]]
            self.running = Running(values, kept["started"].to(device, copy=True))

    def memory(self) -> dict[str, int]:
        """Bytes under kfac-pytorch's names."""
        raise NotImplementedError


class KroneckerLayer(Layer):
    """A block G (x) A: eigenbases with exact damping ("eigen"), or damped inverses of both factors ("inverse")."""

    def __init__(
        self, unit, params, factor_dtype, inv_dtype: torch.dtype | None, method: str, approx: str, drowned: float
    ):
        super().__init__(unit, params, factor_dtype)
        self.layout: Layout = unit.layout
        self.inv_dtype, self.method, self.approx, self.drowned = inv_dtype or self.dtype, method, approx, drowned
        self.eigen: tuple[Eigen, Eigen] | None = None  # of A and G
        self.inverses: tuple[Tensor, Tensor] | None = None  # of A and G: (B, I, I), or (B, I) for a diagonal
        self._spectrum: Spectrum | None = None  # in inv_dtype, without the directions that the damping drowns
        self._scale: Tensor | None = None  # 1 / (eigenvalues + damping); minus 1 / damping if directions were left out
        self._prepared = self._damping = math.inf  # of `_spectrum` and of `_scale`

    @property
    def ready(self) -> bool:
        return self.inverses is not None or self.eigen is not None

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """A and G, which share their storage with the running average."""
        a, g = ((Diagonal if x.dim() == 2 else Dense)(x) for x in self.running.values)
        return a, g

    def _waits(self, run: Pass) -> bool:
        return self.approx == "reduce" and len(run_unit(run, self).calls) > 1

    def collect(self, run: Pass, number: int, grad: Tensor) -> None:
        unit = run_unit(run, self)
        if self.sums is None:
            self.sums = KroneckerSums(unit, run, self.approx, False, self.dtype, grad.device)
        self.sums.unit = unit
        if self.names not in run.seen:
            run.seen.add(self.names)
            for i in unit.calls:
                run.tape.calls[i].check()
            self.sums.add_inputs(run)
        if self._waits(run):
            run.held.setdefault(self.names, []).append((number, grad))
        else:
            self.sums.add_outputs(run, number, grad)

    def end(self, run: Pass) -> None:
        if self._waits(run):
            for number, grad in run.held.get(self.names, ()):
                self.sums.add_outputs(run, number, grad)
            self.sums.end_column(run)

    def totals(self, terms: float, weight: float) -> list[Tensor]:
        return [factor.data for factor in self.sums.finish(terms, weight)]

    # Inverses -----------------------------------------------------------------------------------------------------------

    def set_eigen(self, a: Eigen, g: Eigen) -> None:
        self.eigen, self._spectrum = (a, g), None

    def _eigenvalues(self) -> Tensor:
        """(B, O, I)"""
        a, g = self.eigen
        return g.values[:, :, None] * a.values[:, None, :]

    def _prepare(self, damping: float) -> None:
        """The spectrum without directions whose eigenvalues are all below `drowned` times the damping: they count as zero,
        which changes what the inverse does along them by that share at most, and spares their part of the products."""
        values, (a, g) = self._eigenvalues(), self.eigen
        if self.drowned and values.shape[0] == 1:
            g, rows = _without(g, values[0].amax(1) > self.drowned * damping)
            a, columns = _without(a, values[0].amax(0) > self.drowned * damping)
            values = values[:, rows][:, :, columns]
        self._spectrum = Spectrum(
            *(x if self.inv_dtype is self.dtype else x.to(self.inv_dtype) for x in (g, a)), values
        )
        self._prepared, self._scale = damping, None

    def _basis(self, damping: float) -> Spectrum:
        if self._spectrum is None or (self.drowned and damping < 0.5 * self._prepared):
            self._prepare(damping)
        return self._spectrum

    def _scaled(self, damping: float) -> Tensor:
        self._basis(damping)
        if self._scale is None or self._damping != damping:
            values = self._spectrum.values
            scale = (values + damping).reciprocal_()
            self._scale = scale if self._spectrum.complete else scale.mul_(values).div_(-damping)
            self._damping = damping
        return self._scale

    def set_inverses(self, a: Tensor, g: Tensor) -> None:
        self.inverses = a.to(self.inv_dtype), g.to(self.inv_dtype)

    def joined(self, grads: Sequence[Tensor]) -> Tensor:
        """The block's gradients as (1, B, O, I), in inv_dtype."""
        return joined(self.layout, [grad.unsqueeze(0) for grad in grads]).to(self.inv_dtype)

    def operands(self, damping: float) -> tuple[Tensor, ...] | None:
        """What `kron_apply` takes of this layer, (G^-1, A^-1), or `kron_solve`, (Q_G, Q_A, eigenvalues): of one group whose
        sides are whole matrices; else None."""
        if self.inverses is not None:
            a, g = self.inverses
            return (g[0], a[0]) if a.dim() == g.dim() == 3 and len(a) == 1 else None
        found = self._basis(damping)
        if self.inv_dtype is not found.values.dtype:  # coarse bases, exact eigenvalues: the op takes one dtype
            return None
        if found.shape[0] > 1 or not found.complete or found.a.vectors is None or found.g.vectors is None:
            return None
        return found.g.vectors[0], found.a.vectors[0], found.values[0]

    def parted(self, given: Tensor, v: Tensor) -> tuple[list[Tensor], Tensor]:
        """What `precondition` returns, of its gradients and what became of them, (1, B, O, I)."""
        return [part[0] for part in self.layout.split(v)], _dot(given, v)

    def precondition(self, grads: Sequence[Tensor], damping: float) -> tuple[list[Tensor], Tensor]:
        given = self.joined(grads)
        v = given
        if self.inverses is not None:
            v = _both_sides(*self.inverses, given)
        else:
            scale = self._scaled(damping)
            v = self._spectrum.rotate_back(self._spectrum.rotate(given) * scale.to(self.inv_dtype))
            if not self._spectrum.complete:
                v.add_(given, alpha=1 / damping)
        return self.parted(given, v)

    def state(self) -> dict[str, object]:
        kept = super().state()
        if self.eigen is not None:
            kept["eigen"] = [{name: x.clone() for name, x in eigen.state().items()} for eigen in self.eigen]
        if self.inverses is not None:
            kept["inverses"] = [x.clone() for x in self.inverses]
        return kept

    def restore(self, kept: Mapping[str, object], inverses: bool) -> None:
        super().restore(kept, inverses)
        if not inverses:
            return
        device = self.params[0].device
        if "eigen" in kept and self.method == "eigen":
            eigen = [{n: x.to(device, self.dtype, copy=True) for n, x in one.items()} for one in kept["eigen"]]
            self.set_eigen(*(Eigen.from_state(one) for one in eigen))
        if "inverses" in kept and self.method != "eigen":
            self.set_inverses(*(x.to(device, copy=True) for x in kept["inverses"]))

    def memory(self) -> dict[str, int]:
        factors = [0, 0] if self.running is None else [nbytes(x) for x in self.running.values]
        batch = [0, 0] if self.sums is None else [nbytes(x) for x in self.sums._totals]
        inverses = [0, 0] if self.inverses is None else [nbytes(x) for x in self.inverses]
        if self.eigen is not None:
            inverses = [e.nbytes for e in self.eigen]
            if self._spectrum is not None:
                used = self._spectrum.a, self._spectrum.g
                own = [0 if x is e else x.nbytes for x, e in zip(used, self.eigen, strict=True)]
                inverses = [x + y for x, y in zip(inverses, own, strict=True)]
                inverses[1] += nbytes(self._spectrum.values, self._scale)
        kinds = zip(("factors", "batch", "inverses"), (factors, batch, inverses), strict=True)
        return {f"{side}_{kind}": sizes[i] for kind, sizes in kinds for i, side in enumerate("ag")}


class RowLayer(Layer):
    """The block of a norm layer, or of a table that is also a Linear's weight: (p, p), or a diagonal (p,); damped exactly."""

    def __init__(self, unit, params, factor_dtype, inv_dtype: torch.dtype | None):
        super().__init__(unit, params, factor_dtype)
        self.inv_dtype = inv_dtype or self.dtype
        self._parameters = params
        self.inverse: Tensor | None = None  # (1, p, p); of a diagonal block (p,), the values: damped as they are used

    @property
    def ready(self) -> bool:
        return self.inverse is not None

    def collect(self, run: Pass, number: int, grad: Tensor) -> None:
        run.seen.add(self.names)
        uses = run.held.setdefault(self.names, [])
        uses.append((number, grad))
        if len(uses) == len(run_unit(run, self).calls):
            self.end(run)

    def end(self, run: Pass) -> None:
        uses = [(run.tape.calls[i], grad) for i, grad in run.held.pop(self.names, ())]
        if not uses:
            return
        if self.sums is None:
            self.sums = RowSums(self.unit, self._parameters, self.dtype, self.params[0].device)
        sites = []
        for call, _ in uses:
            call.check()
        for p in self.params:
            as_weight = [(call.normal, grad) for call, grad in uses if call.weight is p]
            as_bias = [(call.normal, grad) for call, grad in uses if call.bias is p]
            sites.append(site_of(tuple(p.shape), as_weight, as_bias, run.samples))
        self.sums.add(sites, run.samples, run.weight)

    def totals(self, terms: float, weight: float) -> list[Tensor]:
        return [self.sums.finish(weight)]

    def set_inverse(self, inverse: Tensor) -> None:
        self.inverse = inverse.to(self.inv_dtype)

    def precondition(self, grads: Sequence[Tensor], damping: float) -> tuple[list[Tensor], Tensor]:
        given = torch.cat([grad.reshape(-1) for grad in grads]).to(self.inv_dtype)
        v = self.inverse[0] @ given if self.inverse.dim() == 3 else given / (self.inverse + damping)
        parts = v.split([grad.numel() for grad in grads])
        return [part.view(grad.shape) for part, grad in zip(parts, grads, strict=True)], _dot(given, v)

    def state(self) -> dict[str, object]:
        kept = super().state()
        return kept if self.inverse is None else {**kept, "inverses": [self.inverse.clone()]}

    def restore(self, kept: Mapping[str, object], inverses: bool) -> None:
        super().restore(kept, inverses)
        if inverses and "inverses" in kept:
            self.set_inverse(kept["inverses"][0].to(self.params[0].device, copy=True))

    def memory(self) -> dict[str, int]:
        return {
            "g_factors": 0 if self.running is None else self.running.nbytes,
            "g_batch": 0 if self.sums is None else nbytes(self.sums.total),
            "g_inverses": nbytes(self.inverse),
        }


def _without(eigen: Eigen, keep: Tensor) -> tuple[Eigen, Tensor | slice]:
    """The basis of one group, less the directions that are not kept (n,), and which they are; all of it if few are."""
    count = int(keep.sum())
    if eigen.vectors is None or count > MOST_KEPT * eigen.rank:
        return eigen, slice(None)
    index = keep.nonzero().flatten() if count else keep.new_zeros(1, dtype=torch.int64)
    return Eigen(eigen.values[:, index], eigen.vectors[:, :, index], eigen.size), index


def run_unit(run: Pass, layer: Layer) -> Unit:
    """The layer's block in this pass: the same parameters, with this pass's calls."""
    return next(unit for unit in run.units if unit.names == layer.unit.names)


def _both_sides(right: Tensor, left: Tensor, v: Tensor) -> Tensor:
    """left v right for v (1, B, O, I), the cheaper order first; a side (B, n) is a diagonal."""
    if right.dim() == 2:
        v = v * right[:, None]
        return v * left[..., None] if left.dim() == 2 else left @ v
    if left.dim() == 2:
        return v * left[..., None] @ right
    if v.shape[1] == 1:
        return (left[0] @ (v[0, 0] @ right[0]))[None, None]
    return left @ (v @ right)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.reshape(-1), y.reshape(-1)).double()
