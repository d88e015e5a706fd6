"""hvpfast: a custom-kernel accelerated curvature engine for PyTorch."""

from hvpfast import dispatch, dynamics, landscape, ops, optim, testing
from hvpfast.capture import (
    NonFiniteError,
    StateError,
    clipped_grad,
    grad_second_moment,
    grad_statistics,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_gram,
    record,
)
from hvpfast.dispatch import BackendError, backend, backends, cuda_graphs, precision
from hvpfast.operators import EKFAC, GGN, KFAC, EmpiricalFisher, Hessian, Identity, LinearOperator
from hvpfast.probes import (
    Density,
    Eigs,
    Estimate,
    Inertia,
    Solution,
    density,
    diagonal,
    eigsh,
    frobenius_norm,
    inertia,
    logdet,
    solve,
    trace,
)

__version__ = "0.1.0"
