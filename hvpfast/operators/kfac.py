"""K-FAC: the Kronecker-factored approximation of the Fisher / generalised Gauss-Newton matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvpfast import heap, ops
from hvpfast.autocast import full_precision
from hvpfast.capture.data import Batch
from hvpfast.capture.errors import NonFiniteError
from hvpfast.capture.problem import Problem, finite
from hvpfast.capture.state import preserved
from hvpfast.capture.tape import recording
from hvpfast.capture.units import Layout
from hvpfast.operators.accumulate import KroneckerSums, RowSums, accumulate
from hvpfast.operators.blocks import (
    Block,
    BlockDiagonal,
    Decomposed,
    FactoredBlock,
    Inverse,
    KroneckerBlock,
    RowBlock,
    SpectralBlock,
    as_damping,
)
from hvpfast.operators.factor import Dense, Diagonal, Factor, Thin, from_state
from hvpfast.operators.linear import LinearOperator
from hvpfast.operators.linearize import saved_bytes
from hvpfast.operators.spectral import Eigen, Spectrum, cholesky_inverses, eigendecompose, pi
from hvpfast.operators.sweep import FISHER_TYPES, Run, Sweep


class Factors(NamedTuple):
    """The Kronecker factors of a block: `G (x) A` in row-major order of (W | b).

    Attributes:
        A: (I, I), the input factor, with the bias's row and column last; (groups, I, I) for a grouped convolution; (I,)
            where it is a diagonal (embeddings). G: (O, O), the output factor; (groups, O, O); (O,) where it is a diagonal.
    """

    A: Tensor
    G: Tensor


class Memory(NamedTuple):
    """Bytes: of the parameters, of what the first batch's graph keeps, of the factors, and all together."""

    model: int
    activations: int
    factors: int
    total: int


class KFAC(BlockDiagonal):
    """Kronecker-factored approximate curvature: for every layer `G (x) A`, one block a module.

    A is the mean over samples and shared positions of `a a'` (each counted as the loss counts it: not at all where the
    target is ignored, by the class's weight), G the sum of `g g'` over the loss's own share of them, so that `G (x) A` is
    the layer's block of the GGN (or Fisher) where inputs and gradients do not depend on each other: in deep linear
    networks under a squared error, or for a single sample, it is that block exactly.

    Linear maps over any positions, convolutions (grouped: a block for each group), transposed convolutions, embeddings
    (A is a diagonal), `nn.MultiheadAttention` and Hugging Face's Conv1D have Kronecker blocks over (W | b). Norm layers
    and parameters that no rule covers have exact blocks, dense up to 512 numbers and diagonal beyond. A factor of more
    than 16384 features is kept as its diagonal. Every option of the loss is exact, as for `GGN`.

    Args:
        model, loss, data, params: as for `GGN`. One pass over the data, at the first use; the factors are those of the
            parameters at that time until `refresh()`.
        fisher_type: whose outer products G sums. "mc": `mc_samples` targets a sample drawn from the model's own
            prediction. "type-2": the exact root of the loss's Hessian, a backward pass a class (where positions of a
            sequence meet inside the model, one a class and position). "empirical": the data's own targets, every position
            a sample of its own. "forward-only": G is the identity (FOOF), no backward pass; norm layers get the mean
            square of their normalised input. "curvature-propagation": the root times `mc_samples` random sign vectors.
        mc_samples: draws for "mc" and "curvature-propagation".
        kfac_approx: for weights shared over positions: "expand", every position a sample, or "reduce", their mean
            input with their summed gradient.
        seed: of the draws: the same seed gives the same factors.

    Of float32 models on a CPU with AMX the factors, and wide layers on the backward passes to them, multiply in bf16x3 (relative
    error about 4e-6), those of "mc" and "curvature-propagation" on the forward pass too; `hvpfast.precision("ieee")`: nowhere.

    Products, scale and errors as for `GGN`. Further: `factors`, `inverse`, `power`, `sample`, `trace`, `logdet`,
    `diagonal`, `frobenius_norm`, `memory`, `state_dict`.

    Sources: J. Martens, R. Grosse, arXiv:1503.05671; R. Grosse, J. Martens, arXiv:1602.01407 (convolutions);
    R. Eschenhagen et al., arXiv:2311.00636 (expand and reduce); F. Benzing, arXiv:2201.12250 (FOOF).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: object,
        data: object,
        *,
        params: object = None,
        fisher_type: str = "mc",
        mc_samples: int = 1,
        kfac_approx: str = "expand",
        seed: int = 0,
    ):
        who = type(self).__name__
        if fisher_type not in FISHER_TYPES:
            raise ValueError(f"{who}: fisher_type is {fisher_type!r}; it must be one of {', '.join(FISHER_TYPES)}")
        if kfac_approx not in ("expand", "reduce"):
            raise ValueError(f"{who}: kfac_approx is {kfac_approx!r}; it must be 'expand' or 'reduce'")
        if not isinstance(mc_samples, int) or mc_samples < 1:
            raise ValueError(f"{who}: mc_samples is {mc_samples!r}; it must be a positive number of draws")
        self.problem = Problem(model, loss, data, params, who, per_sample=True)
        LinearOperator.__init__(self, self.problem.space, self.problem.params)
        self.fisher_type, self.mc_samples, self.kfac_approx, self.seed = fisher_type, mc_samples, kfac_approx, seed
        self._computed: list[Block] | None = None
        self._decomposed: list[Decomposed] | None = None

    # Computing ----------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Forget the factors: the next use computes them for the parameters as they are then."""
        self._computed = self._decomposed = None

    @full_precision
    def _factored(self) -> list[Block]:
        """The blocks as factors, computed once."""
        if self._computed is None:
            with torch.inference_mode(False), heap.reused(self.device.type == "cpu"):
                self._computed = self._compute()
        return self._computed

    def _blocks(self) -> list[Block]:
        return self._factored()

    @property
    def _few_rows(self) -> bool:
        """Whether rows may stand for a factor, where they are fewer than half its features."""
        return self.problem.data.single

    def _sweep(self, by_sample: bool) -> Sweep:
        return Sweep(self.problem, self.fisher_type, self.mc_samples, self.seed, by_sample)

    def _runs(self) -> Iterable[Run]:
        return self._sweep(self.kfac_approx == "reduce")

    def _compute(self) -> list[Block]:
        sums, rows, terms, weight = accumulate(
            self.problem, self._runs(), self.fisher_type, self.kfac_approx, self._few_rows
        )
        blocks: list[Block] = []
        for one in sums:
            a, g = one.finish(terms, weight)
            if self.fisher_type == "forward-only":
                g = Diagonal(torch.ones_like(g.diagonal()))
            for label, factor in (("input", a), ("output gradient", g)):
                # A Gram matrix is finite where its diagonal is.
                if not finite(factor.diagonal() if isinstance(factor, Dense) else factor.data):
                    raise NonFiniteError(
                        f"{self.problem.who}: the {label} factor of {one.unit.name!r} has NaN or inf: activations or gradients "
                        f"are too large for {factor.dtype}, or not finite"
                    )
            blocks.append(KroneckerBlock(one.unit.name, one.unit.names, one.layout, a, g))
        for one in rows:
            shapes = [self._params[name].shape for name in one.unit.names]
            share = terms if self.fisher_type == "forward-only" else weight
            blocks.append(RowBlock(one.unit.name, one.unit.names, shapes, one.finish(share)))
        place = {name: i for i, name in enumerate(self.space.names)}
        return sorted(blocks, key=lambda block: min(place[name] for name in block.names))

    # What is known of it ------------------------------------------------------------------------------------------------

    @property
    @full_precision
    def factors(self) -> dict[str, Factors]:
        """The Kronecker factors by module name; for a weight or bias that is a block of its own, by parameter name."""
        result = {}
        for block in self._kronecker_blocks():
            a, g = (factor.data if isinstance(factor, Diagonal) else factor.dense() for factor in (block.a, block.g))
            result[self._label(block)] = Factors(*(x[0] if block.layout.groups == 1 else x for x in (a, g)))
        return result

    def _kronecker_blocks(self) -> list[KroneckerBlock]:
        return [block for block in self._factored() if isinstance(block, KroneckerBlock)]

    def _label(self, block: Block) -> str:
        same = [other for other in self._factored() if other.name == block.name]
        return block.name if len(same) == 1 and block.name else ", ".join(block.names)

    @full_precision
    def memory(self) -> Memory:
        """What computing the factors takes, beforehand: the model is run forward on the first batch, nothing else."""
        with torch.inference_mode(False), preserved(self.problem.model):
            batch: Batch = next(iter(self.problem.data))
            with recording(self.problem.model, list(self._params.values())) as tape:
                evaluated = self.problem.evaluate(batch)
            sweep = self._sweep(self.kfac_approx == "reduce")
            run = Run(sweep, tape, evaluated)
            activations = saved_bytes([self.problem.output_tensor(evaluated.output)])
            size, kind = 0, torch.zeros(0, dtype=ops.accumulate_dtype(self.dtype)).element_size()
            single = self._few_rows
            for unit in run.units:
                if unit.layout is None:
                    size += RowSums.numbers(sum(self._params[name].numel() for name in unit.names))
                else:
                    size += KroneckerSums.numbers(unit, run, self.kfac_approx, single)
        parameters = sum(p.numel() * p.element_size() for p in self.problem.model.parameters())
        return Memory(parameters, activations, size * kind, parameters + activations + size * kind)

    # Functions of it ------------------------------------------------------------------------------------------------------

    def _eigen(self) -> list[Decomposed]:
        """The blocks in their eigenbases, all factors of one size decomposed together."""
        if self._decomposed is None:
            blocks = self._factored()
            kron = [block for block in blocks if isinstance(block, KroneckerBlock)]
            spectra = iter(self._spectra(kron))
            self._decomposed = [
                SpectralBlock(block.name, block.names, block.layout, next(spectra))
                if isinstance(block, KroneckerBlock)
                else block
                for block in blocks
            ]
        return self._decomposed

    def _spectra(self, blocks: list[KroneckerBlock]) -> list[Spectrum]:
        eigen = self._bases(blocks)
        return [Spectrum(g, a) for g, a in eigen]

    def _bases(self, blocks: list[KroneckerBlock]) -> list[tuple[Eigen, Eigen]]:
        try:
            eigen = eigendecompose([factor for block in blocks for factor in (block.a, block.g)])
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from error
        return list(zip(eigen[1::2], eigen[::2], strict=True))  # (G, A)

    @full_precision
    def inverse(self, damping: float = 0.0, method: str = "exact") -> Inverse:
        """The inverse of the damped operator.

        Args:
            damping: non-negative. method: "exact": (K + damping)^-1, by eigendecomposition. "pi": each factor on its own,
                `(A + pi sqrt(damping))^-1` and `(G + sqrt(damping) / pi)^-1` with pi^2 the ratio of their mean
                eigenvalues (Martens and Grosse 2015, section 6.3), by Cholesky. "uniform": damping is added to both
                factors. Norm layers and loose parameters are damped exactly in every method.

        Raises:
            ValueError: singular to working precision at this damping (the block is named), an unknown method.
        """
        who = f"{type(self).__name__}.inverse"
        damping = as_damping(damping, who)
        if method == "exact":
            return Inverse(self, [block.damped(damping, -1.0) for block in self._eigen()])
        if method not in ("pi", "uniform"):
            raise ValueError(f"{who}: method is {method!r}; it must be 'exact', 'pi' or 'uniform'")
        kron = self._kronecker_blocks()
        factors: list[Factor] = []
        shifts: list[Tensor | float] = []
        for block in kron:
            ratio = pi(block.a, block.g) if method == "pi" else None
            factors += [block.a, block.g]
            shifts += [damping, damping] if ratio is None else [math.sqrt(damping) * ratio, math.sqrt(damping) / ratio]
        try:
            inverses = cholesky_inverses(factors, shifts)
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from error
        made = iter(zip(factors, shifts, inverses, strict=True))
        results: list[Block] = []
        for block in self._blocks():
            if isinstance(block, KroneckerBlock):
                (a, shift_a, right), (g, shift_g, left) = next(made), next(made)
                logdet = -(block.layout.outputs * _logdet(a, shift_a) + block.layout.inputs * _logdet(g, shift_g)).sum()
                results.append(FactoredBlock(block, Dense(left), Dense(right), logdet))
            else:
                results.append(block.damped(damping, -1.0))
        return Inverse(self, results)

    @full_precision
    def power(self, exponent: float, damping: float = 0.0) -> BlockDiagonal:
        """(K + damping)^exponent, any real exponent. Raises ValueError where that is singular and the exponent negative."""
        shift = as_damping(damping, f"{type(self).__name__}.power")
        return BlockDiagonal(self, [block.damped(shift, float(exponent)) for block in self._eigen()])

    @full_precision
    def sample(self, n: int = 1, *, damping: float, generator: torch.Generator | None = None) -> Tensor:
        """n draws from N(0, (K + damping)^-1), (P, n): the parameters' posterior of a Laplace approximation around its mode.

        `generator` is on the CPU; None takes torch's own random state. Raises ValueError where the inverse does not exist.
        """
        z = torch.randn(n, self.shape[0], generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        return self.power(-0.5, damping)._rows(z).T

    @full_precision
    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det (K + damping), a float64 scalar; -inf where that is singular."""
        shift = as_damping(damping, f"{type(self).__name__}.logdet")
        return sum(block.sum(lambda x: (x + shift).log()) for block in self._eigen())

    @full_precision
    def det(self, damping: float = 0.0) -> Tensor:
        """det (K + damping), a float64 scalar (0 or inf beyond its range: use `logdet`)."""
        return self.logdet(damping).exp()

    @full_precision
    def eigenvalues(self) -> Tensor:
        """All P eigenvalues, ascending, float64."""
        values = [block.eigenvalues().double() for block in self._eigen()]
        zeros = [values[0].new_zeros(block.missing) for block in self._eigen()]
        return torch.cat([*values, *zeros]).sort().values

    # Keeping it ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """Everything that was computed, as tensors and plain values: `torch.save` it, `load_state_dict` it back."""
        blocks = {}
        for i, block in enumerate(self._factored()):
            kept: dict[str, object] = {"name": block.name, "names": list(block.names), "layout": None}
            if isinstance(block, KroneckerBlock):
                kept.update(layout=list(dataclasses.astuple(block.layout)), A=block.a.state(), G=block.g.state())
            else:
                kept["values"] = block.values
            blocks[str(i)] = kept
        parameters = {name: list(shape) for name, shape in zip(self.space.names, self.space.shapes, strict=True)}
        return {"kind": type(self).__name__, "parameters": parameters, "blocks": blocks}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take the factors of `state_dict` instead of computing them.

        Raises:
            ValueError: the state is of another kind of operator or of other parameters.
        """
        who = f"{type(self).__name__}.load_state_dict"
        mine = {name: list(shape) for name, shape in zip(self.space.names, self.space.shapes, strict=True)}
        if not isinstance(state, Mapping) or not {"kind", "parameters", "blocks"} <= set(state):
            raise ValueError(f"{who}: this is no state of {type(self).__name__}; give what state_dict() returned")
        if state["kind"] != type(self).__name__:
            raise ValueError(f"{who}: the state is of {state['kind']}, not of {type(self).__name__}")
        theirs = {name: list(shape) for name, shape in state["parameters"].items()}
        if theirs != mine:
            different = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
            raise ValueError(
                f"{who}: the state is of another model: {len(different)} parameters differ, first {different[0]!r}: "
                f"{theirs.get(different[0], 'absent')} there, {mine.get(different[0], 'absent')} here"
            )
        self._restore(state["blocks"])

    def _restore(self, blocks: Mapping[str, Mapping]) -> None:
        made: list[Block] = []
        for kept in blocks.values():
            names, to = tuple(kept["names"]), {"device": self.device, "dtype": ops.accumulate_dtype(self.dtype)}
            if kept["layout"] is not None:
                a, g = from_state(kept["A"]).to(**to), from_state(kept["G"]).to(**to)
                made.append(KroneckerBlock(kept["name"], names, Layout(*kept["layout"]), a, g))
            else:
                shapes = [self._params[name].shape for name in names]
                made.append(RowBlock(kept["name"], names, shapes, kept["values"].to(**to)))
        self._computed, self._decomposed = made, None


def _logdet(factor: Factor, shift: Tensor | float) -> Tensor:
    """log det (factor + shift), (B,) float64."""
    shift = torch.as_tensor(shift, dtype=torch.float64, device=factor.device).expand(factor.groups)
    if isinstance(factor, Diagonal):
        return (factor.data.double() + shift[:, None]).log().sum(1)
    if isinstance(factor, Thin):
        rows = factor.data.double()
        small = rows @ rows.mT
        rest = (factor.size - rows.shape[1]) * shift.log()
    else:
        small, rest = factor.data.double(), 0.0
    root = torch.linalg.cholesky(small + shift[:, None, None] * torch.eye(small.shape[1], dtype=small.dtype).to(small))
    return 2 * root.diagonal(dim1=1, dim2=2).log().sum(1) + rest
