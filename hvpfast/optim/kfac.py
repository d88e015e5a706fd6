"""K-FAC as a preconditioner of gradients: `loss.backward(); preconditioner.step(); optimizer.step()`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hvpfast.capture.errors import StateError
from hvpfast.capture.torch_losses import as_loss
from hvpfast.capture.units import Unit
from hvpfast.optim.inverses import invert
from hvpfast.optim.layers import KroneckerLayer, Layer, RowLayer
from hvpfast.optim.options import SCHEDULES, Schedule, Scheduled, check_model, choice, float_dtype, refuse, skips
from hvpfast.optim.passes import Pass, Recorder
from hvpfast.optim.structure import check_state, check_structure, tracked_parameters, unit_of
from hvpfast.optim.together import precondition

TOLERANCE = 0.05  # off-diagonal mass, relative, up to which an earlier eigenbasis serves: see `eigen.eigendecompose`
DROWNED = 0.1  # times the tolerance and the damping: eigenvalues below that count as zero


class KFACPreconditioner(Scheduled):
    """Multiplies gradients by the inverse of a damped Kronecker-factored Fisher, with kfac-pytorch's arguments.

        preconditioner = hf.optim.KFACPreconditioner(model, lr=0.1, factor_update_steps=10, inv_update_steps=100)
        ...
        loss.backward()
        preconditioner.step()        # .grad is now the preconditioned gradient
        optimizer.step()

    Every layer's gradient V, shaped (O, I) with the bias last, becomes `nu (G (x) A + damping)^-1 V`, with A the running
    average of the mean `a a'` over samples and positions and G that of `N sum g g'` over the gradients at the layer's
    output: in expectation of the same scale as the loss's own Hessian, so that a damping means the same for every batch
    size. Linear maps over any positions, convolutions of any kind (a block a group), embeddings, `nn.MultiheadAttention`
    and Hugging Face's Conv1D have such blocks; weights that are used several times are one block. Norm layers have exact
    blocks (see `hf.KFAC`). BatchNorm, modules in `skip_layers`, and parameters that no rule covers (named in one warning)
    keep their plain gradients.

    Factors are made on factor steps only, from a forward pass of the model in training mode and its backward pass, dropout
    and all; in between no layer is hooked. Passes that other parts of hvpfast make (probes, monitors) do not count.

    Args (those marked * also take a function of the step, `steps`):
        model: the module that is called. On one device, not compiled, not wrapped for distribution.
        factor_update_steps*, inv_update_steps*: steps between updates of factors, and of what is made of them.
        damping*: > 0. With "eigen" it is exact and that of every step; with "inverse" that of the last inverse update.
        factor_decay*: d of the running average d F + (1 - d) new, which starts with the first factor.
        kl_clip*: at most this much `lr^2 |sum V . preconditioned V|`, by nu <= 1, without a wait for the device; None: off.
        lr*: the optimizer's, for kl_clip only.
        accumulation_steps: backward passes a step, the loss of each divided by this number. Factors take all of them.
        compute_method: "eigen": (G (x) A + damping)^-1 exactly, four products a layer and step. "inverse":
            `(G + sqrt(damping) / pi)^-1 V (A + pi sqrt(damping))^-1` (Martens and Grosse 2015, section 6.3), two products.
            "newton-schulz": the same, both inverses by matrix products, checked, and by Cholesky where those fall short;
            slower on a CPU.
        grad_scaler: a GradScaler or a function that returns its scale; factors are divided by its square. Call
            `scaler.unscale_(optimizer)` before `step`. Steps with inf or NaN leave the factors as they are.
        factor_dtype: float32 or float64; None: float32, float64 for float64 parameters. inv_dtype: of inverses and
            eigenbases; None: as the factors; bfloat16 too, whose products are faster and coarse to 3 digits.
        skip_layers: regular expressions, searched for in module names and class names.
        fisher_type: "empirical": g from the user's own backward pass. "mc": from a second one of targets drawn from the
            model's prediction, made by `preconditioner.sample(output, target)` before `backward`; needs `loss_fn`.
        loss_fn: a torch loss or any callable(output, target) -> scalar, for "mc". seed: of its draws.
        kfac_approx: "expand" or "reduce", as for `hf.KFAC`.
        reduction: of the loss, "mean" or "sum": whether g is divided by the number of the loss's terms. These are the
            output's rows, and positions where it has more than two axes.
        tolerance: of "eigen". An earlier eigenbasis is kept, or turned, while what it leaves off the diagonal is below
            this, relative to the factor; else it is found anew. Directions in which no eigenvalue reaches a tenth of this
            times the damping count as zero (on a CPU): they are then no part of the products. 0: always anew, every direction.

    Safe paths. A NaN or inf in a layer's gradient, or in its preconditioned one: the plain gradient stays. In a step's
    factors: the last good ones stay. A decomposition that fails in float64 too: the last good one stays. Each is warned of
    at the next inverse update. A layer that did not run keeps what it had; its gradient, if any, uses that.

    Raises:
        ValueError, TypeError: arguments out of range; those of kfac-pytorch that divide work over processes, a model
            wrapped for that, or compiled. StateError, from `step`: a factor step that saw no backward pass; a model whose
            parameters were replaced or changed shape.

    Sources: J. Martens, R. Grosse, arXiv:1503.05671; R. Grosse, J. Martens, arXiv:1602.01407; kl_clip: J. Ba, R. Grosse,
    J. Martens, Distributed second-order optimization using Kronecker-factored approximations, ICLR 2017.
    """

    _extra: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        *,
        factor_update_steps: int | Schedule = 1,
        inv_update_steps: int | Schedule = 1,
        damping: float | Schedule = 0.001,
        factor_decay: float | Schedule = 0.95,
        kl_clip: float | Schedule | None = 0.001,
        lr: float | Schedule = 0.1,
        accumulation_steps: int = 1,
        compute_method: str = "eigen",
        grad_scaler: object = None,
        factor_dtype: torch.dtype | None = None,
        inv_dtype: torch.dtype | None = None,
        skip_layers: list[str] | None = None,
        fisher_type: str = "empirical",
        loss_fn: object = None,
        seed: int = 0,
        kfac_approx: str = "expand",
        reduction: str = "mean",
        tolerance: float = TOLERANCE,
        **other: object,
    ):
        self._who = who = type(self).__name__
        refuse(who, other)
        check_model(model, who)
        self._set_schedules(factor_update_steps, inv_update_steps, damping, factor_decay, kl_clip, lr)
        if not isinstance(accumulation_steps, int) or accumulation_steps < 1:
            raise ValueError(f"{who}: accumulation_steps is {accumulation_steps!r}; it must be a whole number >= 1")
        if not 0 <= tolerance < 1:
            raise ValueError(f"{who}: tolerance is {tolerance!r}; it must be in [0, 1)")
        self.compute_method = choice(compute_method, who, "compute_method", ("eigen", "inverse", "newton-schulz"))
        self.fisher_type = choice(fisher_type, who, "fisher_type", ("empirical", "mc"))
        self.kfac_approx = choice(kfac_approx, who, "kfac_approx", ("expand", "reduce"))
        self.reduction = choice(reduction, who, "reduction", ("mean", "sum"))
        self.factor_dtype = float_dtype(factor_dtype, who, "factor_dtype", narrow=False)
        self.inv_dtype = float_dtype(inv_dtype, who, "inv_dtype", narrow=True)
        self.accumulation_steps, self.tolerance = accumulation_steps, tolerance
        # On GPUs whole bases: leaving directions out is a wait, and takes a layer out of the launch that it shares.
        self._drowned = 0.0 if any(p.is_cuda for p in model.parameters()) else DROWNED * tolerance
        if (self.fisher_type == "mc") != (loss_fn is not None):
            raise ValueError(
                f"{who}: fisher_type is {fisher_type!r} and loss_fn is {loss_fn!r}; 'mc' draws targets for a loss, so it "
                f"needs loss_fn=; 'empirical' takes the user's own gradients, so it must not have one"
            )
        self._loss = None if loss_fn is None else as_loss(loss_fn, who)
        self._scale = getattr(grad_scaler, "get_scale", grad_scaler) or (lambda: 1.0)
        if not callable(self._scale):
            raise TypeError(
                f"{who}: grad_scaler is a {type(grad_scaler).__name__}; it must be a GradScaler or a function"
            )
        self._generator = torch.Generator().manual_seed(seed)
        self._params, self._frozen = tracked_parameters(model, skips(skip_layers, who))
        if not self._params:
            raise ValueError(f"{who}: no parameter is left to precondition; look at requires_grad and skip_layers")
        self._shapes = {name: tuple(p.shape) for name, p in self._params.items()}
        self._named: set[str] = set()  # what was warned of
        self._layers: dict[str, Layer] = {}
        self._owner: dict[str, str] = {}  # of a parameter: its layer's key
        self._terms, self._weight = 0.0, 0.0
        self._skipped = torch.zeros(2, dtype=torch.int64)  # factors, gradients
        self.model = model
        self._recorder = Recorder(model, self._params, self._due, self._arrived, self.fisher_type == "empirical")

    def __repr__(self) -> str:
        shown = [f"{name}={given}" for name, given in self._schedules.items()]
        shown += [f"{name}={getattr(self, name)!r}" for name in ("compute_method", "fisher_type", "kfac_approx")]
        return f"{self._who}({', '.join(shown)}, layers={len(self._layers)}, steps={self._steps})"

    # Factors ------------------------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        """Whether this step takes factors: it is its turn, or there are none."""
        return not self._layers or self._steps % self.factor_update_steps == 0

    def _inverses_due(self) -> bool:
        return self._steps % self.inv_update_steps == 0

    def _arrived(self, run: Pass, number: int, grad: Tensor) -> None:
        if number not in run.by_call:
            return
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            if not run.seen:
                self._begin(run)
            for unit in run.by_call[number]:
                self._layer(unit).collect(run, number, grad)

    def _begin(self, run: Pass) -> None:
        """The scale of a pass: of every outer product, and of all passes together."""
        if self.fisher_type == "mc":
            return  # known by `sample`
        scale = float(self._scale())
        factor = run.terms * self.accumulation_steps if self.reduction == "mean" else 1
        run.weight = (factor / scale) ** 2
        self._terms += run.total
        self._weight = self._weight + run.terms if self.reduction == "mean" else 1.0

    def _layer(self, unit: Unit) -> Layer:
        key = ", ".join(unit.names)
        layer = self._layers.get(key)
        if layer is None:
            other = next((self._owner[name] for name in unit.names if name in self._owner), None)
            if other is None:
                layer = self._layers[key] = self._make(unit)
                self._owner.update(dict.fromkeys(unit.names, key))
        if layer is None or not layer.unit.same(unit):
            raise StateError(
                f"{self._who}: parameters {key!r} were used as {layer.unit.layout if layer else f'part of {other!r}'} before "
                f"and are used as {unit.layout} now, so their factors do not add up; make a new preconditioner"
            )
        if (moved := layer.moved()) is not None:
            raise StateError(
                f"{self._who}: {layer.label!r} {moved}; preconditioner.load_state_dict(preconditioner.state_dict()) takes "
                f"the factors along"
            )
        return layer

    def _make(self, unit: Unit) -> Layer:
        if unit.layout is None:
            return RowLayer(unit, self._params, self.factor_dtype, self.inv_dtype)
        options = self.factor_dtype, self.inv_dtype, self.compute_method, self.kfac_approx, self._drowned
        return KroneckerLayer(unit, self._params, *options)

    def sample(self, output: Tensor, target: object) -> None:
        """For fisher_type="mc", between forward and backward: draw targets and run their gradients back to the layers'
        outputs, no further. Does nothing on steps that take no factors.

        Args:
            output: the model's, with its graph. target: the data's, whose weights and ignored entries count.

        Raises:
            StateError: not a "mc" preconditioner; no forward pass in training mode that this is the output of.
        """
        if self.fisher_type != "mc":
            raise StateError(f"{self._who}.sample: fisher_type is {self.fisher_type!r}; only 'mc' draws targets")
        if not self._due():
            return

        def columns(run: Pass) -> list[Tensor]:
            f, loss = output.detach(), self._loss
            share = float(loss.denominators(f, target).sum()) if loss.settle(f, target) == "mean" else 1.0
            scale = float(self._scale())
            run.weight = share / scale**2
            self._terms += run.total
            self._weight = self._weight + share if loss.reduction == "mean" else 1.0
            return [loss.draw(f, target, 1, self._generator)[0].detach() * scale]

        if not self._recorder.pull(output, columns):
            raise StateError(
                f"{self._who}.sample: no forward pass that it could belong to: run the model once in training mode "
                f"(model.train()), then call sample, once, then backward"
            )

    def reset_batch(self) -> None:
        """Forget what was gathered since the last step: a batch that must not count."""
        self._recorder.clear()
        self._terms = self._weight = 0.0
        for layer in self._layers.values():
            layer.reset()

    def _update_factors(self) -> None:
        check_structure(self.model, self._params, self._shapes, self._who)
        if not self._recorder.passes and not self._recorder.bare:
            cause = (
                "call preconditioner.sample(output, target) between forward and backward"
                if self.fisher_type == "mc"
                else "run the model in training mode (model.train()), with grad enabled, and call backward before step"
            )
            raise StateError(
                f"{self._who}.step: step {self._steps} takes factors, and no backward pass was seen since the last one; {cause}"
            )
        for run in self._recorder.passes:
            for layer in self._layers.values():
                if layer.names in run.seen:
                    layer.end(run)
        decay = self.factor_decay
        fine = [layer.update(self._terms, self._weight, decay) for layer in self._layers.values()]
        self._count(0, [one for one in fine if one is not None])

    def _update_inverses(self) -> None:
        missing = [layer for layer in self._layers.values() if not layer.ready]
        layers = list(self._layers.values()) if self._inverses_due() else missing
        if not layers:
            return
        for label, reason in invert(layers, self.damping, self.tolerance).items():
            warnings.warn(f"{self._who}: {label!r} keeps its last inverse: {reason}", RuntimeWarning, stacklevel=4)
        factors, gradients = self._skipped.tolist()
        if factors or gradients:
            self._skipped.zero_()
            warnings.warn(
                f"{self._who}: NaN or inf since the last inverse update: factors of a layer left as they were {factors} times, "
                f"a layer's plain gradient kept {gradients} times",
                RuntimeWarning,
                stacklevel=4,
            )

    def _count(self, kind: int, fine: list[Tensor]) -> None:
        if fine:
            count = (~torch.stack(fine)).sum()
            self._skipped = self._skipped.to(count.device)
            self._skipped[kind] += count

    # The step -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Replace the gradients by preconditioned ones, in place. Between `backward` and the optimizer's step."""
        with torch.autocast(next(iter(self._params.values())).device.type, enabled=False):
            if self._recorder.passes or self._due():
                self._update_factors()
            self._update_inverses()
            self._finish_batch()
            self._precondition()
        self._steps += 1

    def _finish_batch(self) -> None:
        self.reset_batch()

    def _precondition(self) -> None:
        damping, limit, lr = self.damping, self.kl_clip, self.lr
        acting: list[Layer] = []
        given: list[list[Tensor]] = []
        partial: list[str] = []
        for layer in self._layers.values():
            grads = [p.grad for p in layer.params]
            if layer.ready and all(grad is not None for grad in grads):
                acting.append(layer)
                given.append(grads)
            elif any(grad is not None for grad in grads) and any(grad is None for grad in grads):
                partial += [name for name, grad in zip(layer.unit.names, grads, strict=True) if grad is not None]
        self._name_the_plain(partial)
        if not acting:
            return
        found = precondition(acting, given, damping)
        dots = torch.stack([dot for _, dot in found])
        fine = dots.isfinite()
        nu: Tensor | float = 1.0
        if limit is not None:
            total = torch.where(fine, dots, 0.0).sum().abs()
            nu = (limit / (lr * lr * total)).sqrt().clamp(max=1.0)
        for grads, (parts, _), good in zip(given, found, fine.unbind(), strict=True):
            for grad, part in zip(grads, parts, strict=True):
                part = part.mul_(
                    nu
                )  # of this step alone; no value is asked for, which a device would have to be waited for
                torch.where(good, part if part.dtype is grad.dtype else part.to(grad.dtype), grad, out=grad)
        self._count(1, list(fine.unbind()))

    def _name_the_plain(self, partial: list[str]) -> None:
        """Warn, once of each kind, of parameters that have a gradient and no block, or no block that it goes through."""
        found = {
            "no layer rule covers {}: they keep their plain gradients; name their modules in skip_layers to say so": [
                name for name, p in self._params.items() if name not in self._owner and p.grad is not None
            ],
            "{} did not require grad when it was made: they keep their plain gradients; make a new preconditioner": [
                name for name, p in self._frozen.items() if p.grad is not None
            ],
            "{} keep their plain gradients: other parameters of their layers have none; make a new preconditioner": partial,
        }
        for said, names in found.items():
            if names and said not in self._named:
                self._named.add(said)
                some = ", ".join(names[:6]) + (" and more" if len(names) > 6 else "")
                warnings.warn(f"{self._who}: {said.format(some)}", stacklevel=4)

    # Keeping it ---------------------------------------------------------------------------------------------------------

    def state_dict(self, include_factors: bool = True) -> dict[str, object]:
        """Steps, hyper-parameters that are no functions, the random state, and for each layer copies of its factors and of
        what was made of them: training goes on from it bit by bit as it would have. `include_factors=False`: no layers.
        """
        state: dict[str, object] = {name: x for name, x in self._schedules.items() if not callable(x)}
        state.update(kind=self._who, steps=self._steps, generator=self._generator.get_state())
        state["parameters"] = {name: list(shape) for name, shape in self._shapes.items()}
        if include_factors:
            state["layers"] = {key: layer.state() for key, layer in self._layers.items()}
        return state

    def load_state_dict(self, state: Mapping[str, object], compute_inverses: bool = True) -> None:
        """Take over a state. Without its layers (`include_factors=False`) the next step takes factors.

        Args:
            compute_inverses: False: leave the inverses out; they are made in the next step.

        Raises:
            ValueError: the state of another kind of preconditioner, or of another model: its parameters are named.
        """
        check_state(state, self._who, self._shapes)
        self.reset_batch()
        self._schedules.update({name: state[name] for name in SCHEDULES if name in state})
        self._steps = state["steps"]
        self._generator.set_state(state["generator"].cpu())
        self._layers, self._owner = {}, {}
        for kept in state.get("layers", {}).values():
            self._layer(unit_of(kept)).restore(kept, compute_inverses)

    def memory_usage(self) -> dict[str, int]:
        """Bytes held now: factors, the sums of the current batch, what was made of the factors, and all together."""
        sizes = dict.fromkeys(
            ("a_factors", "g_factors", "a_batch", "g_batch", "a_inverses", "g_inverses", *self._extra), 0
        )
        for layer in self._layers.values():
            for name, size in layer.memory().items():
                sizes[name] += size
        return {**sizes, "total": sum(sizes.values())}

    def close(self) -> None:
        """Take the hooks off the model."""
        self._recorder.remove()
