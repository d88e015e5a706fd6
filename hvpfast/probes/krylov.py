"""A Krylov basis that can be restarted and that locked vectors keep out of: the state behind `eigsh`.

Rows of one buffer: locked vectors first, then the basis V (m, n), then the next vector. After m products

    A V' = V' H + beta v_next e_m'        (outside the locked rows)

where the whole column V A v_m is stored in H (float64), not only the two entries that exact arithmetic would leave.
Two Gram-Schmidt passes in the working dtype: the second pass' coefficients carry what the first one rounded away, so
their float64 sum is as good as a float64 dot product with float32 vectors.
Sources: Wu & Simon, Thick-restart Lanczos, SIAM J. Matrix Anal. 22 (2000); Parlett, The Symmetric Eigenvalue Problem.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvpfast.ops import reorthogonalize

from .product import Product, gaussian, norm, rotate_rows

BREAKDOWN = 10  # a new direction shorter than BREAKDOWN * eps * ||A|| is rounding noise


class Basis:
    """Grown by `extend`, shortened by `restart`, emptied into locked rows by `lock`."""

    def __init__(self, product: Product, rows: int, locked_rows: int, seed: int) -> None:
        self.product, self.rows, self.seed = product, min(rows, product.n), seed
        self.V = torch.empty(self.rows + locked_rows + 1, product.n, dtype=product.dtype, device=product.device)
        self.H = torch.zeros(self.rows, self.rows, dtype=torch.float64)
        self.locked = 0
        self.draws = 0  # random vectors used so far
        self.scale = 0.0  # largest ||A v|| seen, a lower bound of ||A||
        self.breakdowns = 0
        self._reset()

    def _reset(self) -> None:
        self.size = 0
        self.beta = 0.0
        self.expected = torch.zeros(0, dtype=torch.float64)  # by symmetry, the next column of H above its diagonal
        self.log_betas = 0.0
        self.roots: list[float] = []  # Ritz values that restarts dropped

    @property
    def floor(self) -> float:
        return BREAKDOWN * self.product.eps * self.scale

    @property
    def exhausted(self) -> bool:
        """Locked rows and basis span the whole space: the Ritz pairs are exact."""
        return self.locked + self.size == self.product.n

    def _orthogonalise(self, w: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
        """The unit vector of w's part orthogonal to the first `count` rows, w's coefficients in them (count,), float64 on
        the CPU, and that part's norm. One wait for the device."""
        unit, coefficients, length = reorthogonalize(w, self.V[:count], normalize=True)
        numbers = torch.cat([coefficients, length[None]]).cpu()
        return unit, numbers[:-1], float(numbers[-1])

    def draw(self, vector: Tensor | None = None) -> None:
        """Put a unit vector orthogonal to all rows in the next row: from `vector` if that can be, else a random one."""
        count = self.locked + self.size
        while True:
            if vector is None:
                vector = gaussian(self.product, self.seed, self.draws)
                self.draws += 1
            length = norm(vector)
            if length > 0:
                unit, _, length = self._orthogonalise(vector / length, count)
                if length > 100 * self.product.eps:
                    self.V[count] = self._orthogonalise(unit, count)[0]
                    return
            vector = None

    def extend(self) -> None:
        """One product: the next row joins the basis."""
        product, m, count = self.product, self.size, self.locked + self.size + 1
        w = product(self.V[count - 1])
        self.scale = max(self.scale, norm(w))
        unit, coefficients, beta = self._orthogonalise(w, count)
        h = coefficients[self.locked :]
        if m:
            product.require_symmetric(float((h[:m] - self.expected).abs().max()), self.scale)
        self.H[: m + 1, m] = self.H[m, : m + 1] = h
        self.size = m + 1
        self.expected = torch.zeros(m + 1, dtype=torch.float64)
        self.beta = beta
        if self.exhausted or self.beta <= self.floor:
            self.beta = 0.0
            self.breakdowns += 1
            if not self.exhausted:
                self.draw()
        else:
            self.V[count] = unit
            self.expected[m] = self.beta
        self.log_betas += math.log(self.beta) if self.beta > 0 else -math.inf

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (m,) ascending, their coordinates (m, m) in columns, their residual norms (m,)."""
        theta, S = torch.linalg.eigh(self.H[: self.size, : self.size])
        return theta, S, self.beta * S[-1].abs()

    def log_component(self, theta: Tensor, beyond: float) -> float:
        """Log of the largest part that an unseen eigenvector could have had in the start vector.

        p(A) v_start = (product of betas) v_next for the polynomial p whose roots are the present Ritz values and those
        that restarts dropped. An eigenvector with eigenvalue `beyond` or further out, on the side where no root lies,
        therefore has a component of at most prod(beta) / prod|beyond - root| in the unit vector v_start.
        """
        roots = torch.cat([theta, torch.tensor(self.roots, dtype=torch.float64)])
        distances = (beyond - roots).abs()
        if float(distances.min()) == 0:
            return math.inf
        return self.log_betas - float(distances.log().sum())

    def restart(self, theta: Tensor, S: Tensor, keep: Tensor) -> None:
        """Shorten the basis to the Ritz vectors `keep`; the next vector and the decomposition stay."""
        l, m = keep.numel(), self.size
        kept = set(keep.tolist())
        self.roots += [value for i, value in enumerate(theta.tolist()) if i not in kept]
        rotate_rows(self.V[self.locked : self.locked + m], S[:, keep])
        self.V[self.locked + l] = self.V[self.locked + m].clone()
        self.expected = self.beta * S[-1, keep]
        self.H.zero_()
        self.H[:l, :l] = theta[keep].diag()
        self.size = l

    def lock(self, S: Tensor, chosen: Tensor) -> None:
        """Move the Ritz vectors `chosen` to the locked rows and empty the basis (no next vector until `draw`)."""
        rotate_rows(self.V[self.locked : self.locked + self.size], S[:, chosen])
        self.locked += chosen.numel()
        self.H.zero_()
        self._reset()

    def select(self, rows: Tensor) -> None:
        """Keep only these of the locked rows, in this order. The basis must be empty."""
        self.V[: rows.numel()] = self.V[rows.to(self.V.device)].clone()
        self.locked = rows.numel()
