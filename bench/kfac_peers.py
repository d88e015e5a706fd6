"""Other libraries' Kronecker factors, each called at its fairest: determinism checks and counting passes off, joint (W | b)
where that is offered (it saves a second G), and tracing or compiling done before the clock starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.contest import Call, Unfit
from bench.models import Workload
from bench.peers import load


@dataclass
class Found:
    """What a call computed; the functions read it out afterwards, outside the clock.

    Attributes:
        a, g: factors of the first layer, up to scale. values: the sum of EKFAC's eigenvalues.
    """

    a: Callable[[], Tensor] | None = None
    g: Callable[[], Tensor] | None = None
    values: Callable[[], float] | None = None


def _first(model: nn.Module) -> tuple[str, nn.Module]:
    return next((name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def _is_head(module) -> bool:
    """Whether this curvlinops is later than 3.0.1: parameters by name, and computers of factors."""
    return "backend" in inspect.signature(module.KFACLinearOperator.__init__).parameters


def _options(work: Workload) -> dict:
    n = len(work.data[1])
    return {
        "check_deterministic": False,
        "num_data": n,
        "num_per_example_loss_terms": 1,
        "separate_weight_and_bias": False,
    }


def curvlinops(fisher_type: str):
    def prepare(work: Workload) -> Call:
        module = load("curvlinops")
        name, _ = _first(work.model)
        model, loss, batch = work
        options = _options(work) | {"fisher_type": fisher_type}
        if _is_head(module):
            raise Unfit("a later version is here: 'curvlinops compiled' and 'curvlinops hooks' are its two ways")

        def call() -> Found:
            operator = module.KFACLinearOperator(model, loss, list(model.parameters()), [batch], **options)
            operator.compute_kronecker_factors()
            return Found(lambda: operator._input_covariances[name], lambda: operator._gradient_covariances[name])

        return call

    return prepare


def _computer(kind: str, fisher_type: str, work: Workload):
    module = load("curvlinops")
    if not _is_head(module):
        raise Unfit("needs a curvlinops later than 3.0.1")
    made = getattr(
        load("curvlinops.computers." + {"Hooks": "kfac_hooks", "MakeFx": "kfac_make_fx"}[kind]), f"{kind}KFACComputer"
    )
    params = dict(work.model.named_parameters())
    return made(work.model, work.loss, params, [work.data], fisher_type=fisher_type, **_options(work))


def _factors_of(result, model: nn.Module) -> Found:
    inputs, gradients, _ = result
    key = next(k for k in gradients if any(part.startswith(_first(model)[0] + ".") for part in k))
    return Found(lambda: inputs[key], lambda: gradients[key])


def curvlinops_compiled(fisher_type: str):
    """As its own benchmark does: traced once, the function of a batch under torch.compile."""

    def prepare(work: Workload) -> Call:
        computer = _computer("MakeFx", fisher_type, work)
        traced = computer._trace_batch_functions()
        compiled = torch.compile(computer._compute_kronecker_factors)
        return lambda: _factors_of(compiled(traced), work.model)

    return prepare


def curvlinops_hooks(fisher_type: str):
    def prepare(work: Workload) -> Call:
        computer = _computer("Hooks", fisher_type, work)
        return lambda: _factors_of(computer.compute(), work.model)

    return prepare


def backpack(fisher_type: str):
    def prepare(work: Workload) -> Call:
        module, extensions = load("backpack"), load("backpack.extensions")
        model, loss = module.extend(work.model, use_converter=_branches(work.model)), module.extend(work.loss)
        x, y = work.data
        saved = "kflr" if fisher_type == "type-2" else "kfac"
        weight = _first(work.model)[1].weight

        def call() -> Found:
            model.zero_grad()
            made = extensions.KFLR() if saved == "kflr" else extensions.KFAC(mc_samples=1)  # it keeps what it passes on
            with module.backpack(made):
                loss(model(x), y).backward()
            g, a = getattr(weight, saved)
            # a convolution's G is here of gradients summed over positions, another approximation: A alone is comparable
            return Found(lambda: a, None if weight.dim() > 2 else lambda: g)

        return call

    return prepare


def _branches(model: nn.Module) -> bool:
    return not all(isinstance(m, nn.Sequential) or not list(m.children()) for m in model.modules())


def _loader(work: Workload):
    x, y = work.data
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=len(x), collate_fn=lambda rows: (x, y)
    )


def nngeometry(fisher_type: str):
    def prepare(work: Workload) -> Call:
        metrics, kind = load("nngeometry.metrics"), load("nngeometry.object").PMatKFAC
        loader = _loader(work)
        function = metrics.FIM if fisher_type == "type-2" else metrics.FIM_MonteCarlo

        def call() -> Found:
            matrix = function(work.model, loader, kind, variant="classif_logits")
            a, g = next(iter(matrix.data.values()))
            return Found(lambda: a, lambda: g)

        return call

    return prepare


def asdl(fisher_type: str):
    def prepare(work: Workload) -> Call:
        module = load("asdl.fisher")
        x, _ = work.data
        kind = "fisher_exact" if fisher_type == "type-2" else "fisher_mc"
        config = module.FisherConfig(kind, ["kron"], loss_type="cross_entropy", data_size=len(x))
        maker = module.get_fisher_maker(work.model, config)
        maker.setup_model_call(work.model, x)
        first = _first(work.model)[1]

        def call() -> Found:
            maker.forward_and_backward()
            kron = first.fisher.kron
            return Found(lambda: kron.A, lambda: kron.B)

        return call

    return prepare


def factors(fisher_type: str) -> dict[str, Callable[[Workload], Call]]:
    return {
        "curvlinops": curvlinops(fisher_type),
        "curvlinops hooks": curvlinops_hooks(fisher_type),
        "curvlinops compiled": curvlinops_compiled(fisher_type),
        "backpack": backpack(fisher_type),
        "nngeometry": nngeometry(fisher_type),
        "asdl": asdl(fisher_type),
    }


# EKFAC ------------------------------------------------------------------------------------------------------------------


def ekfac_curvlinops(work: Workload) -> Call:
    module = load("curvlinops")
    if _is_head(module):
        raise Unfit("a later version is here")
    model, loss, batch = work

    def call() -> Found:
        operator = module.EKFACLinearOperator(
            model, loss, list(model.parameters()), [batch], fisher_type="mc", **_options(work)
        )
        operator.compute_kronecker_factors()
        operator.compute_eigenvalue_correction()
        found = operator._corrected_eigenvalues.values()
        return Found(values=lambda: sum(float(v.sum()) for v in found))

    return call


def ekfac_compiled(work: Workload) -> Call:
    """Factors and correction under torch.compile, eigh as it is, as in its own benchmark."""
    if not _is_head(load("curvlinops")):
        raise Unfit("needs a curvlinops later than 3.0.1")
    ekfac = load("curvlinops.computers.ekfac_make_fx")
    computer = ekfac.MakeFxEKFACComputer(
        work.model, work.loss, dict(work.model.named_parameters()), [work.data], fisher_type="mc", **_options(work)
    )
    traced = computer._trace_batch_functions()
    corrections, _ = computer._trace_eigencorrection_batch_functions()
    x, y = work.data
    factored = torch.compile(computer._compute_kronecker_factors)
    corrected = torch.compile(corrections[len(x)])

    def call() -> Found:
        inputs, gradients, _ = factored(traced)
        with torch.no_grad():
            values = corrected(computer._params, x, y, *computer._eigenvectors_(inputs, gradients))
        return Found(values=lambda: sum(float(v.sum()) for v in values.values()))

    return call


def ekfac_nngeometry(work: Workload) -> Call:
    """Eigenvectors of the factors, then the corrected diagonal."""
    metrics, kind = load("nngeometry.metrics"), load("nngeometry.object").PMatEKFAC
    loader = _loader(work)

    def call() -> Found:
        matrix = metrics.FIM_MonteCarlo(work.model, loader, kind, variant="classif_logits")
        matrix.update_diag(loader)
        return Found(values=lambda: float(matrix.trace()))

    return call


EKFAC: dict[str, Callable[[Workload], Call]] = {
    "curvlinops": ekfac_curvlinops,
    "curvlinops compiled": ekfac_compiled,
    "nngeometry": ekfac_nngeometry,
}
