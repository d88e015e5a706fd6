"""Second-order training: preconditioners that stand between `backward` and the optimizer."""

from hvpfast.optim.kfac import KFACPreconditioner
