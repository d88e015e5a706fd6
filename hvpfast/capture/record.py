"""A tape of the user's own forward and backward pass, from which per-sample quantities follow without another one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.autograd.graph import Node

from hvpfast.capture.data import tensors_in
from hvpfast.capture.errors import StateError
from hvpfast.capture.problem import chosen_parameters, uncompiled
from hvpfast.capture.sites import Site
from hvpfast.capture.state import refuse_batch_statistics
from hvpfast.capture.tape import recording


class record:
    """Records one forward and backward pass: `with hf.record(model) as tape: loss(model(X), y).backward()`.

    Afterwards `hf.per_sample_grads(tape, reduction="mean")` and the other per-sample functions use what the pass left:
    the layers' inputs and output gradients. No extra pass is made, and nothing of the model is changed; the inputs of
    layers are kept alive until the tape is dropped.

    Args:
        model: a `torch.nn.Module`, a row of output a sample, BatchNorm in eval mode. Dropout is allowed: its masks are part
            of this one pass. params: None for every parameter that requires grad, or names, Parameters or a dict.

    Raises:
        StateError: BatchNorm on batch statistics; no forward pass or more than one in the block; no backward pass; a
            parameter with uses that no layer rule covers (named: choose others by params=, or use the functional forms).
    """

    def __init__(self, model: nn.Module, *, params: object = None):
        if uncompiled(model) is not model:
            raise TypeError(
                "record: the model is compiled, and compiled graphs call no hooks; run and record the module itself"
            )
        self._model = model
        self._params = chosen_parameters(model, params, "record")
        self.names = tuple(self._params)
        refuse_batch_statistics(model, "record")
        self._grads: dict[int, Tensor] = {}
        self._sites: list[Site] | None = None
        self._covered: list[bool] = []
        self._runs = self.samples = 0

    def __enter__(self) -> record:
        self._context = recording(self._model, list(self._params.values()), self._watch)
        self._tape = self._context.__enter__()
        self._handle = self._model.register_forward_hook(self._ran)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()
        self._context.__exit__(None, None, None)
        if error[0] is not None:
            self._grads.clear()

    def _watch(self, number: int, place: Tensor | Node) -> None:
        def keep(grad: Tensor | tuple[Tensor | None, ...]) -> None:
            grad = grad[0] if isinstance(grad, tuple) else grad
            if grad is not None:
                before = self._grads.get(number)
                self._grads[number] = grad.detach() if before is None else before + grad.detach()

        place.register_hook(keep) if isinstance(place, Tensor) else place.register_prehook(keep)

    def _ran(self, model: nn.Module, args: object, output: object) -> None:
        found = [x for x in tensors_in(getattr(output, "logits", output)) if x.requires_grad]
        self._runs += 1
        if found and self._runs == 1:
            self.samples = found[0].shape[0] if found[0].dim() else 0
            self._covered = self._tape.covered(found[0], list(self._params.values()))
            self._grads.clear()  # what the tape's own probing of the batch's axis left in the hooks

    def sites(self, who: str) -> list[Site]:
        """The parameters' sites, from the gradients of the scalar that `backward` was called on."""
        if self._sites is None:
            if self._runs != 1:
                raise StateError(
                    f"{who}: the tape saw {self._runs} forward passes; run the model exactly once inside `with hf.record(model)`"
                )
            bare = [name for name, own in zip(self.names, self._covered, strict=True) if not own]
            if bare:
                raise StateError(
                    f"{who}: the tape does not have every use of {', '.join(map(repr, bare[:4]))}: no layer rule covers it. "
                    f"Choose other parameters with record(model, params=...), or call {who}(model, loss, batch)"
                )
            if not self._grads:
                raise StateError(
                    f"{who}: the tape saw no backward pass; call loss.backward() inside `with hf.record(model)`"
                )
            grads = [self._grads.get(number) for number in range(len(self._tape.calls))]
            self._sites = self._tape.sites(list(self._params.values()), grads)
            for name, site in zip(self.names, self._sites, strict=True):
                if site.rows == 0:
                    raise ValueError(f"{who}: no data reach parameter {name!r}; leave it out with params=")
        return self._sites


def scale_of(reduction: str | None, samples: int, who: str) -> float:
    """What turns a row of a batch's gradient into the gradient of the sample's own loss: N for a mean, 1 for a sum."""
    scales: dict[str | None, Callable[[], float]] = {"mean": lambda: float(samples), "sum": lambda: 1.0}
    if reduction not in scales:
        raise ValueError(
            f"{who}: reduction is {reduction!r}; a tape knows gradients and not the loss: say reduction='mean' if the loss is "
            f"the plain mean over samples, 'sum' if it is their sum"
        )
    return scales[reduction]()
