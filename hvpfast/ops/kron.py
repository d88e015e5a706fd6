"""Products and solves with Kronecker factors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hvpfast.arguments import floats, usual
from hvpfast.dispatch import op
from hvpfast.ops.shared import wide


def _each_layer(name: str, **given) -> list[dict]:
    """The arguments layer by layer; raises unless all are tensors, or all lists of one length."""
    counts = {label: len(x) for label, x in given.items() if isinstance(x, (list, tuple))}
    if not counts:
        return [given]
    if len(counts) < len(given) or len(set(counts.values())) > 1:
        got = ", ".join(f"{label} {counts.get(label, 'one tensor')}" for label in given)
        raise ValueError(f"{name}: got {got}; give one tensor each, or lists with one entry a layer each")
    if not counts["v"]:
        raise ValueError(f"{name}: the lists are empty; give at least one layer")
    return [dict(zip(given, layer, strict=True)) for layer in zip(*given.values(), strict=True)]


def _check_kron(name: str, v: Tensor, left: tuple[str, Tensor], right: tuple[str, Tensor]) -> None:
    floats(name, v=v, **dict((left, right)))
    if v.dim() not in (2, 3):
        raise ValueError(f"{name}: v has shape {tuple(v.shape)}; it must be (O, I) or (K, O, I)")
    for (label, factor), size in ((left, v.shape[-2]), (right, v.shape[-1])):
        if tuple(factor.shape) != (size, size):
            raise ValueError(
                f"{name}: {label} has shape {tuple(factor.shape)} for v {tuple(v.shape)}; it must be {(size, size)}"
            )


def _squares(shape: tuple[int, ...], left: Tensor, right: Tensor) -> bool:
    """Whether left and right fit a v of this shape."""
    return (
        (len(shape) == 2 or len(shape) == 3)
        and left.shape == (shape[-2], shape[-2])
        and right.shape == (shape[-1], shape[-1])
    )


def _check_kron_apply(left, v, right):
    if type(v) is Tensor and usual(v, left, right) and _squares(v.shape, left, right):
        return
    for layer in _each_layer("kron_apply", left=left, v=v, right=right):
        _check_kron("kron_apply", layer["v"], ("left", layer["left"]), ("right", layer["right"]))


@op(check=_check_kron_apply, backends=("triton",))
def kron_apply(
    left: Tensor | Sequence[Tensor], v: Tensor | Sequence[Tensor], right: Tensor | Sequence[Tensor]
) -> Tensor | list[Tensor]:
    """`left v right`: the product of `left (x) right'` with a weight-shaped v; for all layers of a model in one call.

    Args:
        left: (O, O). v: (O, I), or (K, O, I) for K at once. right: (I, I). Or lists of these, one entry a layer.

    Returns:
        shaped like v, float32 or float64; a list for lists. Raises TypeError or ValueError where they do not fit.
    """
    if isinstance(v, Tensor):
        return wide(left) @ wide(v) @ wide(right)
    return [wide(one) @ wide(x) @ wide(other) for one, x, other in zip(left, v, right, strict=True)]


def _check_kron_solve(v, qg, qa, eigenvalues, damping):
    if type(v) is Tensor and type(damping) is float and usual(v, qg, qa, eigenvalues):
        shape = v.shape
        if _squares(shape, qg, qa) and eigenvalues.shape == shape[-2:]:
            return
    for layer in _each_layer("kron_solve", v=v, qg=qg, qa=qa, eigenvalues=eigenvalues):
        x, values = layer["v"], layer["eigenvalues"]
        _check_kron("kron_solve", x, ("qg", layer["qg"]), ("qa", layer["qa"]))
        floats("kron_solve", v=x, eigenvalues=values)
        if values.shape != x.shape[-2:]:
            raise ValueError(
                f"kron_solve: eigenvalues has shape {tuple(values.shape)}; it must be {tuple(x.shape[-2:])}"
            )
    if isinstance(damping, (list, tuple)) and (isinstance(v, Tensor) or len(damping) != len(v)):
        raise ValueError(f"kron_solve: damping has {len(damping)} entries; give one number, or one a layer")


@op(check=_check_kron_solve, backends=("triton",))
def kron_solve(
    v: Tensor | Sequence[Tensor],
    qg: Tensor | Sequence[Tensor],
    qa: Tensor | Sequence[Tensor],
    eigenvalues: Tensor | Sequence[Tensor],
    damping: float | Sequence[float],
) -> Tensor | list[Tensor]:
    """`qg ((qg' v qa) / (eigenvalues + damping)) qa'`: solves with a damped (E)K-FAC block in its eigenbasis.

    Args:
        v: (O, I), or (K, O, I) for K at once. qg: (O, O), qa: (I, I), eigenvectors in columns. eigenvalues: (O, I): for
            K-FAC the products of the factors' eigenvalues. damping: added to each. Or lists, one entry a layer.

    Returns:
        shaped like v, float32 or float64; a list for lists. Raises TypeError or ValueError where they do not fit.
    """
    if not isinstance(v, Tensor):
        shares = damping if isinstance(damping, (list, tuple)) else [damping] * len(v)
        layers = zip(v, qg, qa, eigenvalues, shares, strict=True)
        return [kron_solve.reference(*layer) for layer in layers]
    qg, qa = wide(qg), wide(qa)
    return qg @ ((qg.mT @ wide(v) @ qa) / (wide(eigenvalues) + damping)) @ qa.mT
