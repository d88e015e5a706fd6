"""Plots of curvature: every function takes `ax=None` and returns `(fig, ax)`; needs `pip install hvpfast[plot]`."""

from hvpfast.plot.slices import line, plane
from hvpfast.plot.spectra import density, eigenvalues
from hvpfast.plot.training import sharpness, training

__all__ = ["density", "eigenvalues", "line", "plane", "sharpness", "training"]
