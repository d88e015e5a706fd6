"""Curvature and training: thresholds of stability, and monitors of sharpness."""

from hvpfast.dynamics.monitor import Preconditioned, Record, SharpnessMonitor, batch_sharpness
from hvpfast.dynamics.thresholds import Threshold, preconditioner, stability_threshold

__all__ = [
    "Preconditioned",
    "Record",
    "SharpnessMonitor",
    "Threshold",
    "batch_sharpness",
    "preconditioner",
    "stability_threshold",
]
