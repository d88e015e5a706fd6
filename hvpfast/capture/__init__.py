"""From a user's model, loss and data to what the ops take: samples, shared positions, features."""

from hvpfast.capture.errors import NonFiniteError, StateError
