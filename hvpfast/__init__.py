"""hvpfast: a custom-kernel accelerated curvature engine for PyTorch."""

from hvpfast import dispatch, ops, testing
from hvpfast.capture import NonFiniteError, StateError
from hvpfast.dispatch import BackendError, backend, backends, precision
from hvpfast.operators import GGN, EmpiricalFisher, Hessian, Identity, LinearOperator

__version__ = "0.1.0"
