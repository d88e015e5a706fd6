"""Second-order training: preconditioners that stand between `backward` and the optimizer, and natural-gradient steps."""

from hvpfast.optim.ekfac import EKFACPreconditioner
from hvpfast.optim.kfac import KFACPreconditioner
from hvpfast.optim.natural import NaturalStep, natural_gradient
