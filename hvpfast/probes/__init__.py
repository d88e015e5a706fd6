"""Probes: questions asked of a matrix through its products only.

A matrix is anything with .shape, .dtype, .device and @.
"""

from .lanczos import eigsh
from .linear_solve import solve
from .quadrature import density, inertia, logdet
from .results import Density, Eigs, Estimate, Inertia, Solution
from .stochastic import diagonal, frobenius_norm, trace

__all__ = [
    "Density",
    "Eigs",
    "Estimate",
    "Inertia",
    "Solution",
    "density",
    "diagonal",
    "eigsh",
    "frobenius_norm",
    "inertia",
    "logdet",
    "solve",
    "trace",
]
