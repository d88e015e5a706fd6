"""EKFAC: K-FAC's eigenbasis with corrected eigenvalues."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hvpfast import heap, ops
from hvpfast.autocast import full_precision
from hvpfast.capture import kronecker
from hvpfast.capture.units import Unit
from hvpfast.operators.blocks import Block, Decomposed, Inverse, KroneckerBlock, SpectralBlock
from hvpfast.operators.kfac import KFAC
from hvpfast.operators.spectral import Eigen, Spectrum
from hvpfast.operators.sweep import Run, Sweep


class EKFAC(KFAC):
    """K-FAC's eigenbasis with corrected eigenvalues: in it, the exact diagonal of the Fisher's block.

    `(Q_G (x) Q_A) diag(s) (Q_G (x) Q_A)'` with `s = sum over samples and columns (Q_G' g_m' a_m Q_A)^2`: of all matrices
    with this eigenbasis the nearest to the block in Frobenius norm, so never further from it than K-FAC.

    Arguments, methods and errors as for `KFAC`; a second pass over the data, for which a single
    batch is run once. `inverse` is exact.

    Source: T. George et al., arXiv:1806.03884.
    """

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        self._held: Run | None = None  # the only batch's, between the two passes
        if self.fisher_type == "forward-only":
            raise ValueError(
                "EKFAC: fisher_type='forward-only' has no gradients to correct eigenvalues with; use KFAC, or another type"
            )

    @property
    def _few_rows(self) -> bool:
        # The mean rows of "reduce" do not span the gradients, whose second moment is taken in the whole basis.
        return super()._few_rows and self.kfac_approx == "expand"

    def _sweep(self, by_sample: bool) -> Sweep:
        return super()._sweep(True)  # rows are told apart by sample, in both passes

    def _runs(self) -> Iterable[Run]:
        return self._sweep(True) if self._held is None else [self._held]

    def _blocks(self) -> list[Block]:
        return self._eigen()

    @full_precision
    def _eigen(self) -> list[Decomposed]:
        if self._decomposed is not None:
            return self._decomposed
        with torch.inference_mode(False), heap.reused(self.device.type == "cpu"), contextlib.ExitStack() as stack:
            if self._computed is None and self.problem.data.single:  # one run of the model serves both passes
                runs = stack.enter_context(contextlib.closing(iter(self._sweep(True))))
                self._held = next(runs)
                self._held.again = True
                stack.callback(setattr, self, "_held", None)
                self._factored()
                self._held.again = False
            return super()._eigen()

    def _spectra(self, blocks: list[KroneckerBlock]) -> list[Spectrum]:
        bases = self._bases(blocks)
        totals = [
            torch.zeros(
                g.values.shape[0], g.values.shape[1], a.values.shape[1], dtype=block.a.dtype, device=self.device
            )
            for block, (g, a) in zip(blocks, bases, strict=True)
        ]
        place = {block.names: i for i, block in enumerate(blocks)}
        weights = []
        for run in self._runs():
            weights.append(run.weight)
            self._correct(run, place, totals, bases)
        scale = self.problem.batches_total(weights)
        return [Spectrum(g, a, total.div_(scale)) for (g, a), total in zip(bases, totals, strict=True)]

    def _correct(self, run: Run, place: dict, totals: list[Tensor], bases: list[tuple[Eigen, Eigen]]) -> None:
        units: dict[int, list[Unit]] = {}
        for unit in run.units:
            for number in unit.calls if unit.layout is not None else ():
                units.setdefault(number, []).append(unit)
        waiting: dict[tuple[str, ...], tuple[Unit, list[tuple[int, Tensor]]]] = {}

        def add(unit: Unit, uses: list[tuple[int, Tensor]]) -> None:
            i, layout = place[unit.names], unit.layout
            pairs = [(run.tape.calls[number].kronecker, grad) for number, grad in uses]
            g, a = bases[i]
            weight, ones = layout.weight is not None, layout.bias is not None
            kronecker.add_rotated_moment(
                totals[i], pairs, run.samples, weight, ones, a.vectors, g.vectors, run.apart, run.weight
            )

        def receive(number: int, grad: Tensor) -> None:
            heap.settle()
            for unit in units[number]:
                if len(unit.calls) == 1:
                    add(unit, [(number, grad)])
                else:
                    waiting.setdefault(unit.names, (unit, []))[1].append((number, grad))

        def done() -> None:
            for unit, uses in waiting.values():
                add(unit, uses)
            waiting.clear()

        run.pull(receive, None, done)
        for unit in run.units:
            if unit.layout is not None:
                run.require_finite(totals[place[unit.names]], unit.name)

    @full_precision
    def inverse(self, damping: float = 0.0, method: str = "exact") -> Inverse:
        """The inverse of the damped operator, `(K + damping)^-1`, exactly. Raises ValueError as for `KFAC.inverse`."""
        if method != "exact":
            raise ValueError(f"EKFAC.inverse: method is {method!r}; corrected eigenvalues have only 'exact'")
        return super().inverse(damping)

    def state_dict(self) -> dict[str, object]:
        """As `KFAC.state_dict`, with the eigenbases and the corrected eigenvalues."""
        state = super().state_dict()
        spectra = (block for block in self._eigen() if isinstance(block, SpectralBlock))
        for kept in state["blocks"].values():
            if kept["layout"] is not None:
                spectrum = next(spectra).spectrum
                kept["spectrum"] = {
                    "G": (spectrum.g.values, spectrum.g.vectors),
                    "A": (spectrum.a.values, spectrum.a.vectors),
                    "values": spectrum.values,
                }
        return state

    def _restore(self, blocks: Mapping[str, Mapping]) -> None:
        super()._restore(blocks)
        to = {"device": self.device, "dtype": ops.accumulate_dtype(self.dtype)}
        made: list[Decomposed] = []
        for block, kept in zip(self._computed, blocks.values(), strict=True):
            if not isinstance(block, KroneckerBlock):
                made.append(block)
                continue
            layout = block.layout
            g, a = (
                Eigen(*(None if x is None else x.to(**to) for x in kept["spectrum"][side]), size)
                for side, size in (("G", layout.outputs), ("A", layout.inputs))
            )
            spectrum = Spectrum(g, a, kept["spectrum"]["values"].to(**to))
            made.append(SpectralBlock(block.name, block.names, layout, spectrum))
        self._decomposed = made
