"""How `bench.proof` asks each installed library for a case's matrix, by its documented interface.

Every function returns (P, P) in the order of `model.parameters()`, or norms (N,), at the scale of the case's own loss.
`Unfit`: the library's interface has no place for the case.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

import hvpfast
from bench import peers
from bench.contest import Unfit

EMPIRICAL = ("kfac-pytorch",)  # held against the empirical Fisher: they have no other
DISTRIBUTIONS = {**peers.DISTRIBUTIONS, "asdl": "asdfghjkl", "kfac-pytorch": "kfac-pytorch"}


class Absent(Exception):
    """The library gave no result for some parameters, and no error."""


def _blocks(case, found: dict[int, Tensor]) -> Tensor:
    """A (p, p) block a parameter (by id) -> (P, P)."""
    missing = [p for p in case.params if id(p) not in found]
    if missing:
        raise Absent(f"{len(missing)} parameters have no block")
    return torch.block_diag(*(found[id(p)] for p in case.params))


def _one_batch(case) -> tuple[Tensor, Tensor]:
    if len(case.batches) > 1:
        raise Unfit("one batch only")
    return case.batches[0]


def _plain(case) -> nn.Module:
    """The loss, where its class and reduction say all: the library takes no loss, but a name of one."""
    loss = case.loss
    if getattr(loss, "weight", None) is not None or getattr(loss, "pos_weight", None) is not None:
        raise Unfit("takes no class weights")
    if getattr(loss, "label_smoothing", 0.0):
        raise Unfit("takes no label smoothing")
    if not isinstance(loss, (nn.CrossEntropyLoss, nn.MSELoss)):
        raise Unfit("not one of its losses")
    return loss


def curvlinops(case) -> Tensor:
    """3.0.1 takes a list of parameters, later versions a dict."""
    module = peers.load("curvlinops")
    named = dict(case.model.named_parameters())
    params = (
        named
        if "dict" in str(inspect.signature(module.GGNLinearOperator.__init__).parameters["params"].annotation)
        else list(named.values())
    )
    options = {"check_deterministic": False}
    if case.quantity.startswith("K-FAC"):
        options |= {"fisher_type": "type-2" if case.quantity == "K-FAC" else "mc", "separate_weight_and_bias": False}
        if "backend" in inspect.signature(module.KFACLinearOperator.__init__).parameters:
            options["backend"] = "make_fx"  # its hooks are documented not to know tied weights
        operator = module.KFACLinearOperator(case.model, case.loss, params, case.batches, **options)
    elif case.quantity in ("GGN", "Hessian"):
        kind = getattr(module, f"{case.quantity}LinearOperator")
        operator = kind(case.model, case.loss, params, case.batches, **options)
    else:
        raise Unfit("no per-sample quantities")
    return operator @ torch.eye(operator.shape[1])


def backpack(case) -> Tensor:
    x, y = _one_batch(case)
    module, extensions = peers.load("backpack"), peers.load("backpack.extensions")
    kinds = {"K-FAC": "KFLR", "K-FAC, drawn labels": "KFAC", "gradient norms": "BatchL2Grad"}
    if case.quantity not in kinds:
        raise Unfit("products of one batch, without a matrix over batches")
    norms = case.quantity == "gradient norms"
    model = module.extend(case.model)
    loss = module.extend(case.loss)
    with module.backpack(getattr(extensions, kinds[case.quantity])()):
        loss(model(x), y).backward()
    for p in case.params:
        if not hasattr(p, "batch_l2" if norms else "kflr" if case.quantity == "K-FAC" else "kfac"):
            raise Absent("a parameter has no result")
    if norms:  # of the samples' shares of the loss: a mean divides each by N
        squares = sum(p.batch_l2 for p in case.params)
        return squares.sqrt() * (len(x) if case.loss.reduction == "mean" else 1)
    saved = "kflr" if case.quantity == "K-FAC" else "kfac"
    found = {}
    for p in case.params:
        factors = getattr(p, saved)
        found[id(p)] = torch.kron(*factors) if len(factors) == 2 else factors[0]
    return _blocks(case, found)


def opacus(case) -> Tensor:
    if case.quantity != "gradient norms":
        raise Unfit("per-sample gradients only")
    x, y = _one_batch(case)
    kind = peers.load("opacus").GradSampleModule
    model = kind(case.model, loss_reduction=case.loss.reduction)
    case.loss(model(x), y).backward()
    return sum(p.grad_sample.flatten(1).square().sum(1) for p in model.parameters()).sqrt()


def pyhessian(case) -> Tensor:
    if case.quantity != "Hessian":
        raise Unfit("Hessians only")
    module = peers.load("pyhessian")
    computer = module.hessian(case.model, case.loss, dataloader=case.batches, cuda=False)
    columns = []
    for unit in torch.eye(sum(p.numel() for p in case.params)):
        parts = [s.view_as(p) for s, p in zip(unit.split([p.numel() for p in case.params]), case.params, strict=True)]
        _, product = computer.dataloader_hv_product(parts)
        columns.append(torch.cat([part.reshape(-1) for part in product]))
    return torch.stack(columns, 1)


def nngeometry(case) -> Tensor:
    metrics, kind = peers.load("nngeometry.metrics"), peers.load("nngeometry.object").PMatKFAC
    if not case.quantity.startswith("K-FAC"):
        raise Unfit("compared in K-FAC only")
    loss, (x, y) = _plain(case), case.whole
    if isinstance(loss, nn.CrossEntropyLoss) and bool((y == loss.ignore_index).any()):
        raise Unfit("takes no loss, so no ignore_index")
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(case.batches[0][0]))
    variant = "classif_logits" if isinstance(loss, nn.CrossEntropyLoss) else "regression"
    if case.quantity == "K-FAC":
        matrix = metrics.FIM(case.model, data, kind, variant=variant)
    else:
        matrix = metrics.FIM_MonteCarlo(case.model, data, kind, variant=variant)
    scale = 1.0 if loss.reduction == "mean" else float(len(x))
    if variant == "regression":  # unit variance, a mean over samples; the loss is a mean over elements
        scale *= 2 / y[0].numel()
    return matrix.to_torch(split_weight_bias=True) * scale


def asdl(case) -> Tensor:
    module = peers.load("asdl.fisher")
    if not case.quantity.startswith("K-FAC"):
        raise Unfit("compared in K-FAC only")
    loss, (x, y) = _plain(case), _one_batch(case)
    entropy = isinstance(loss, nn.CrossEntropyLoss)
    config = module.FisherConfig(
        fisher_type="fisher_exact" if case.quantity == "K-FAC" else "fisher_mc",
        fisher_shapes=["kron"],
        loss_type="cross_entropy" if entropy else "mse",
        data_size=len(x),
        **({"ignore_index": loss.ignore_index} if entropy else {}),
    )
    maker = module.get_fisher_maker(case.model, config)
    maker.setup_loss_call(loss, maker.setup_model_call(case.model, x), y)
    maker.forward_and_backward()
    scale = 1.0 if loss.reduction == "mean" else float(len(x))
    if entropy:  # the documented data_size is the user's: what counts are the targets that are not ignored
        scale *= len(x) / int((y != loss.ignore_index).sum())
    else:
        scale *= 2 / y[0].numel()
    found = {}
    for layer in case.model.modules():
        if hasattr(layer, "fisher") and hasattr(layer, "weight"):
            a, g = layer.fisher.kron.A, layer.fisher.kron.B
            found[id(layer.weight)] = torch.kron(g, a) * scale
            if layer.bias is not None:
                found[id(layer.bias)] = g * scale
    return _blocks(case, found)


def kfac_pytorch(case) -> Tensor:
    """Running averages start at the identity: a factor_decay of almost 0 takes the new factors alone."""
    kind = peers.load("kfac.preconditioner").KFACPreconditioner
    x, y = _one_batch(case)
    if case.quantity != "K-FAC" or len(x) > 1:
        raise Unfit("empirical Fisher only: compared on one sample")
    wide = {"factor_dtype": torch.float64, "inv_dtype": torch.float64}
    preconditioner = kind(case.model, factor_decay=1e-300, **wide)
    case.loss(case.model(x), y).backward()
    preconditioner.step()
    found, states = {}, preconditioner.state_dict()["layers"]
    for name, layer in case.model.named_modules():
        if name in states:
            a, g = states[name]["A"].double(), states[name]["G"].double()
            found[id(layer.weight)] = torch.kron(g, a[:-1, :-1])
            found[id(layer.bias)] = g * a[-1, -1]
    return _blocks(case, found)


FUNCTIONS: dict[str, tuple[str, Callable]] = {
    "curvlinops": ("curvlinops", curvlinops),
    "BackPACK": ("backpack", backpack),
    "nngeometry": ("nngeometry", nngeometry),
    "ASDL": ("asdl.fisher", asdl),
    "kfac-pytorch": ("kfac.preconditioner", kfac_pytorch),
    "Opacus": ("opacus", opacus),
    "PyHessian": ("pyhessian", pyhessian),
}


def installed() -> dict[str, Callable]:
    """By name, those that can be imported here."""
    found = {}
    for name, (module, function) in FUNCTIONS.items():
        try:
            peers.load(module)
        except Unfit:
            continue
        found[name] = function
    return found


def versions() -> dict[str, str]:
    return {"hvpfast": hvpfast.__version__, "torch": torch.__version__} | {
        name: importlib.metadata.version(name) for name in DISTRIBUTIONS.values() if name != "scipy" and _has(name)
    }


def _has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
