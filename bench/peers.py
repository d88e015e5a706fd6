"""Other libraries for the same quantities: which of them are here, and how each is called at its fairest.

Their own checks (determinism, passes that count the data) are switched off, and what they may keep between calls they keep.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.contest import Call, Unfit

DISTRIBUTIONS = {
    "curvlinops": "curvlinops-for-pytorch",
    "backpack": "backpack-for-pytorch",
    "opacus": "opacus",
    "pyhessian": "pyhessian",
    "nngeometry": "nngeometry",
    "scipy": "scipy",
}


def load(name: str):
    """The peer's module, or `Unfit` with the reason why it is not here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except Exception as error:  # a peer that breaks on import for whatever reason must not stop the others
            raise Unfit(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def versions() -> dict[str, str]:
    """Of hvpfast, torch, and the peers that are installed."""
    found = {}
    for name in ("hvpfast", "torch", "triton", "numpy", *DISTRIBUTIONS.values()):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    return found


# ops ------------------------------------------------------------------------------------------------------------------


def _opacus_layer(a: Tensor, g: Tensor) -> nn.Linear:
    if len(a) != len(g):
        raise Unfit("opacus pairs each input with one gradient (K = 1)")
    return nn.Linear(a.shape[2], g.shape[2], bias=False, device=a.device, dtype=a.dtype)


def _opacus_norms(a: Tensor, g: Tensor) -> Call:
    function = load("opacus.grad_sample.linear").compute_linear_norm_sample
    layer = _opacus_layer(a, g)
    shaped = (a[:, 0], g[:, 0]) if a.shape[1] == 1 else (a, g)
    return lambda: function(layer, [shaped[0]], shaped[1])[layer.weight].square()


def _opacus_grads(a: Tensor, g: Tensor) -> Call:
    function = load("opacus.grad_sample.linear").compute_linear_grad_sample
    layer = _opacus_layer(a, g)
    return lambda: function(layer, [a], g)[layer.weight]


def _backpack(extension: str, saved: str, finish: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Call]:
    """BackPACK's extension on one Linear whose backward pass brings exactly g; its own backward pass is included."""

    def prepare(a: Tensor, g: Tensor) -> Call:
        backpack, extensions = load("backpack"), load("backpack.extensions")
        layer = _opacus_layer(a, g)
        model = backpack.extend(layer)
        made = getattr(extensions, extension)()
        shaped = (a[:, 0], g[:, 0]) if a.shape[1] == 1 else (a, g)

        def call() -> Tensor:
            layer.zero_grad()
            with backpack.backpack(made):
                model(shaped[0]).backward(shaped[1])
            return finish(getattr(layer.weight, saved))

        return call

    return prepare


# op -> name -> prepare(a, g) -> call
OPS: dict[str, dict[str, Callable[[Tensor, Tensor], Call]]] = {
    "sample_norms_squared": {
        "opacus": _opacus_norms,
        "backpack": _backpack("BatchL2Grad", "batch_l2", lambda x: x),
    },
    "sample_grads": {"opacus": _opacus_grads, "backpack": _backpack("BatchGrad", "grad_batch", lambda x: x)},
    "second_moment": {"backpack": _backpack("SumGradSquared", "sum_grad_squared", lambda x: x)},
}


# operators ------------------------------------------------------------------------------------------------------------


def _parameters(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _flat(parts) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def curvlinops_operator(kind: str, model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor]):
    """curvlinops' operator, without its determinism check and its pass to count the data."""
    made = getattr(load("curvlinops"), kind)
    return made(
        model, loss, _parameters(model), [data], check_deterministic=False, num_data=len(data[1]), progressbar=False
    )


def curvlinops_product(kind: str) -> Callable:
    def prepare(model, loss, data, v: Tensor) -> Call:
        operator = curvlinops_operator(kind, model, loss, data)
        return lambda: operator @ v

    return prepare


def pyhessian_product(model, loss, data, v: Tensor) -> Call:
    """PyHessian keeps the gradient's graph from its constructor and differentiates it again."""
    module, utils = load("pyhessian"), load("pyhessian.utils")
    if v.dim() > 1:
        raise Unfit("pyhessian multiplies with one vector at a time")
    computer = module.hessian(model, loss, data=data, cuda=v.is_cuda)
    parts = [
        part.view_as(p) for part, p in zip(v.split([p.numel() for p in computer.params]), computer.params, strict=True)
    ]
    return lambda: _flat(utils.hessian_vector_product(computer.gradsH, computer.params, parts))


def backpack_ggn(model, loss, data, v: Tensor) -> Call:
    ggnvp = load("backpack.hessianfree.ggnvp")
    if v.dim() > 1:
        raise Unfit("backpack multiplies with one vector at a time")
    params = _parameters(model)
    output = model(data[0])
    value = loss(output, data[1])
    parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
    return lambda: _flat(ggnvp.ggn_vector_product_from_plist(value, output, params, parts))


PRODUCTS: dict[str, dict[str, Callable]] = {
    "Hessian": {"curvlinops": curvlinops_product("HessianLinearOperator"), "pyhessian": pyhessian_product},
    "GGN": {"curvlinops": curvlinops_product("GGNLinearOperator"), "backpack": backpack_ggn},
}
