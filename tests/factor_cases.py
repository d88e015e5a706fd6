"""Kronecker factors of every kind and rank, float64."""

import math

import torch

from hvpfast.operators.factor import Dense, Diagonal, Thin

TOLERANCE = 1e-10


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(groups, n, seed=0):
    return torch.linalg.qr(randn(groups, n, n, seed=seed))[0]


def prescribed(values, groups=1, seed=0):
    """Dense factor with these eigenvalues (n,), and its exact vectors."""
    values = torch.as_tensor(values, dtype=torch.float64).expand(groups, -1)
    q = orthogonal(groups, values.shape[-1], seed)
    return Dense((q * values[:, None]) @ q.mT)


def scaled_rows(groups, rank, n, low, seed=0):
    """Thin factor whose singular values fall from 1 to low."""
    u, v = orthogonal(groups, rank, seed), orthogonal(groups, n, seed + 1)[:, :rank]
    return Thin((u * torch.logspace(0, math.log10(low), rank, dtype=torch.float64)) @ v)


CASES = {
    "random": lambda: Dense(randn(1, 13, 17).mT.mT @ randn(1, 13, 17).mT / 17),
    "rank 3 of 11, kept dense": lambda: Dense(randn(1, 3, 11).mT @ randn(1, 3, 11)),
    "repeated eigenvalues": lambda: prescribed([0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 5.0]),
    "1e-12 to 1": lambda: prescribed(torch.logspace(-12, 0, 15)),
    "size 1": lambda: Dense(torch.tensor([[[3.0]]], dtype=torch.float64)),
    "zero": lambda: Dense(torch.zeros(1, 5, 5, dtype=torch.float64)),
    "3 groups": lambda: Dense(randn(3, 7, 9) @ randn(3, 7, 9).mT),
    "thin": lambda: Thin(randn(1, 4, 19)),
    "thin, 3 groups": lambda: Thin(randn(3, 5, 17)),
    "thin, 1e-7 to 1": lambda: scaled_rows(1, 9, 29, 1e-7),
    "thin, groups of different rank": lambda: Thin(
        torch.stack([randn(4, 12), torch.cat([randn(1, 12, seed=2)] * 4), torch.zeros(4, 12, dtype=torch.float64)])
    ),
    "thin, one row": lambda: Thin(randn(1, 1, 6)),
    "thin, zero": lambda: Thin(torch.zeros(1, 2, 9, dtype=torch.float64)),
    "thin, nearly square": lambda: Thin(randn(1, 10, 11)),
    "diagonal": lambda: Diagonal(randn(1, 8).square()),
    "diagonal, 2 groups, zeros in it": lambda: Diagonal(randn(2, 6).clamp_min(0)),
}
NAMES = list(CASES)


def everything():
    return [CASES[name]() for name in NAMES]


def eye(n):
    return torch.eye(n, dtype=torch.float64)
