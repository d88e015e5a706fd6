"""Curvature matrices as linear operators."""

from hvpfast.operators.ekfac import EKFAC
from hvpfast.operators.fisher import EmpiricalFisher
from hvpfast.operators.ggn import GGN
from hvpfast.operators.hessian import Hessian
from hvpfast.operators.kfac import KFAC
from hvpfast.operators.linear import Identity, LinearOperator
