"""From a user's model, loss and data to what the ops take: samples, shared positions, features."""

from hvpfast.capture.errors import NonFiniteError, StateError
from hvpfast.capture.quantities import (
    clipped_grad,
    grad_second_moment,
    grad_statistics,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_gram,
)
from hvpfast.capture.record import record
