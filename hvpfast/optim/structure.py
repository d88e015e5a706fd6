"""What of a model a preconditioner works on, and whether a model or a state is still the one that it was made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from hvpfast.capture.errors import StateError
from hvpfast.capture.units import Layout, Unit


def tracked_parameters(
    model: nn.Module, skip: Callable[[str, nn.Module], bool]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters to precondition, all but those of batch norms and of modules to skip: that require grad, that do not."""
    out: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or skip(name, module):
            out.update(id(p) for p in module._parameters.values() if p is not None)
    tracked = {name: p for name, p in model.named_parameters() if id(p) not in out}
    trained = {name: p for name, p in tracked.items() if p.requires_grad}
    return trained, {name: p for name, p in tracked.items() if name not in trained}


def check_structure(model: nn.Module, params: Mapping[str, Tensor], shapes: Mapping[str, tuple], who: str) -> None:
    """Raise StateError if the model no longer has these very parameters in these shapes."""
    now = dict(model.named_parameters(remove_duplicate=False))
    for name, p in params.items():
        if now.get(name) is not p:
            what = "is gone" if name not in now else "is another tensor"
        elif tuple(p.shape) != shapes[name]:
            what = f"has shape {tuple(p.shape)}, and had {shapes[name]}"
        else:
            continue
        raise StateError(
            f"{who}: the model has changed since the preconditioner was made: parameter {name!r} {what}; make a new "
            f"preconditioner for the model as it is now"
        )


def check_state(state: object, kind: str, shapes: Mapping[str, tuple]) -> None:
    """Raise ValueError unless this is the state of such a preconditioner, of parameters with these names and shapes."""
    who = f"{kind}.load_state_dict"
    if not isinstance(state, Mapping) or not {"kind", "steps", "parameters"} <= set(state):
        raise ValueError(f"{who}: this is no state of a {kind}; give what state_dict() returned")
    if state["kind"] != kind:
        raise ValueError(f"{who}: the state is of a {state['kind']}, not of a {kind}")
    theirs = {name: tuple(shape) for name, shape in state["parameters"].items()}
    if theirs == shapes:
        return
    lists = {
        "missing here": sorted(theirs.keys() - shapes.keys()),
        "not in the state": sorted(shapes.keys() - theirs.keys()),
        "of another shape": sorted(n for n in theirs.keys() & shapes.keys() if theirs[n] != shapes[n]),
    }
    shown = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in lists.items() if names)
    raise ValueError(f"{who}: the state is of another model, or of other skip_layers: {shown}")


def unit_of(kept: Mapping[str, object]) -> Unit:
    """The block that a layer's state is of; it has no calls."""
    layout = kept["layout"]
    if layout is not None:
        layout = Layout(*(tuple(x) if isinstance(x, list) else x for x in layout))
    return Unit(kept["name"], tuple(kept["names"]), layout, ())
