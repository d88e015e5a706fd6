"""Errors that more than one room raises."""

from __future__ import annotations


class NonFiniteError(FloatingPointError, ValueError):
    """NaN or inf in a loss, gradient or product; the message names the batch, the parameter and the likely cause."""


class StateError(RuntimeError):
    """The model or the data are in a state in which the result would not be what was asked (dropout, shuffling, ...)."""
