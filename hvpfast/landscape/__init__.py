"""Slices of the loss landscape: along a line and over a plane, with filter-normalised directions."""

from hvpfast.landscape.directions import normalised
from hvpfast.landscape.slices import Line, Plane, line, plane

__all__ = ["Line", "Plane", "line", "normalised", "plane"]
