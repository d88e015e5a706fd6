"""hvpfast: a custom-kernel accelerated curvature engine for PyTorch."""

from hvpfast import dispatch, ops, testing
from hvpfast.dispatch import BackendError, backend, backends, precision

__version__ = "0.1.0"
