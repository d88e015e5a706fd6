"""What every probe needs of a matrix: checked, counted block products, reproducible random vectors, float64 sums.

A probe takes anything with `.shape`, `.dtype`, `.device` and `@`. Vectors live in the *working dtype*: float64 for a
float64 matrix, float32 for everything else. A 16-bit operator gets its operand rounded to its own dtype and its answer
cast back; a 16-bit dense tensor is cast up once instead, so its products are exact in float32.
"""

from __future__ import annotations

import hashlib
import warnings

import torch
from torch import Tensor

from hvpfast.ops.shared import pieces_of

COLUMNS = 8  # columns a single `A @ V` may have: a block costs less per column, its memory is bounded
REFUSALS = (TypeError, ValueError, IndexError, AssertionError, RuntimeError)  # what a block may meet with


class Product:
    """`A @ (.)` in the working dtype: by `COLUMNS` columns at most, counted by columns, refused if not finite."""

    def __init__(self, A, probe: str) -> None:
        self.probe = probe
        for attribute in ("shape", "dtype", "device"):
            if not hasattr(A, attribute):
                raise TypeError(
                    f"{probe}: A is a {type(A).__name__} without .{attribute}; A needs .shape, .dtype, .device and @; "
                    "pass a torch tensor or a linear operator"
                )
        if not isinstance(A.dtype, torch.dtype) or not A.dtype.is_floating_point:
            raise TypeError(f"{probe}: A has dtype {A.dtype}; needs a real floating torch dtype; convert A first")
        shape = tuple(A.shape)
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
            raise ValueError(f"{probe}: A has shape {shape}; needs a square (n, n) with n >= 1")
        self.A = A
        self.n = shape[0]
        self.device = torch.device(A.device)
        self.dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
        self.eps = torch.finfo(self.dtype).eps
        self.operand_dtype = A.dtype
        if isinstance(A, Tensor) and A.dtype != self.dtype:
            self.A, self.operand_dtype = A.detach().to(self.dtype), self.dtype
        self.product_eps = torch.finfo(self.operand_dtype).eps
        self.matvecs = 0
        self.warned_asymmetric = False
        self.takes_blocks: bool | None = None  # unknown until the first block

    def __call__(self, V: Tensor) -> Tensor:
        """`A @ V` for V (n,) or (n, K), in the working dtype; counts 1 or K matvecs."""
        if V.ndim == 1:
            return self._checked(V)
        if V.shape[1] <= COLUMNS:
            return self._block(V)
        return torch.cat([self._block(part) for part in V.split(COLUMNS, dim=1)], dim=1)

    def _block(self, V: Tensor) -> Tensor:
        if V.shape[1] > 1 and self.takes_blocks is not False:
            if self.takes_blocks:
                return self._checked(V)
            try:
                product = self._raw(V)
                if product.shape != V.shape:
                    raise ValueError(f"A @ V has shape {tuple(product.shape)} for V {tuple(V.shape)}")
            except REFUSALS as error:
                # an operator's own error class (a NaN, a shuffling loader) is a message, not a refusal of blocks
                if type(error).__module__ != "builtins" and not isinstance(error, torch.OutOfMemoryError):
                    raise
                self.takes_blocks = False
                columns = torch.stack([self._checked(column) for column in V.unbind(1)], dim=1)
                warnings.warn(
                    f"{self.probe}: A refused a block of {V.shape[1]} columns ({type(error).__name__}: {error}); "
                    "going on column by column, which is slower",
                    RuntimeWarning,
                    stacklevel=5,
                )
                return columns
            self.takes_blocks = True
            return self._finite(product)
        return torch.stack([self._checked(column) for column in V.unbind(1)], dim=1)

    def _raw(self, V: Tensor) -> Tensor:
        product = self.A @ V.to(self.operand_dtype).contiguous()
        if not isinstance(product, Tensor):
            raise TypeError(
                f"{self.probe}: A @ v gave a {type(product).__name__}; needs a tensor of v's shape; "
                "an operator's @ must take and return flat tensors"
            )
        return product.detach().to(self.dtype)

    def _checked(self, V: Tensor) -> Tensor:
        product = self._raw(V)
        if product.shape != V.shape:
            raise ValueError(
                f"{self.probe}: A @ v has shape {tuple(product.shape)} for v {tuple(V.shape)}; needs the same shape"
            )
        return self._finite(product)

    def _finite(self, product: Tensor) -> Tensor:
        finite = torch.isfinite(product)
        first = self.matvecs + 1
        self.matvecs += 1 if product.ndim == 1 else product.shape[1]
        if not finite.all():
            columns = finite.reshape(self.n, -1).all(dim=0)
            bad = int((~columns).nonzero()[0])
            count = int((~finite).sum())
            raise FloatingPointError(
                f"{self.probe}: matvec {first + bad} has NaN or inf ({count} entries of this product); "
                "needs finite products; check the loss, the data and the parameters, or use a wider dtype"
            )
        return product

    def identity(self, first: int, last: int) -> Tensor:
        """Columns first .. last-1 of the identity, (n, last - first)."""
        columns = torch.zeros(self.n, last - first, dtype=self.dtype, device=self.device)
        columns[torch.arange(first, last), torch.arange(last - first)] = 1
        return columns

    def dense(self) -> Tensor:
        """The symmetric part of A as a float64 (n, n) CPU tensor, by n matvecs; raises if A is not symmetric."""
        blocks = [self(self.identity(i, min(i + COLUMNS, self.n))).double().cpu() for i in range(0, self.n, COLUMNS)]
        matrix = torch.cat(blocks, dim=1)
        self.require_symmetric(float((matrix - matrix.T).abs().max()), float(matrix.abs().max()))
        return (matrix + matrix.T) / 2

    def require_symmetric(self, difference: float, scale: float) -> None:
        """Raise if two entries that a symmetric matrix has equal differ by far more than rounding explains; warn once,
        below float64, where large terms that cancel (a network that fits its data) may explain it."""
        said = f"{self.probe}: u'Av and v'Au differ by {difference:.3g} (size of A about {scale:.3g})"
        if difference <= max(1e-3, 16 * self.product_eps) * scale:
            return
        if difference > 0.05 * scale or self.product_eps <= torch.finfo(torch.float64).eps:
            raise ValueError(
                f"{said}; needs a symmetric A whose products do not change; check for dropout, shuffled data or a one-sided "
                f"product; if A is tiny next to the terms it is a sum of, this is their rounding: use float64"
            )
        if not self.warned_asymmetric:
            self.warned_asymmetric = True
            warnings.warn(
                f"{said}: rounding of products in this dtype; expect no more digits, or use float64", stacklevel=5
            )


def _generator(seed: int, index: int, purpose: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{purpose}:{seed}:{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def rademacher(product: Product, seed: int, indices: range) -> Tensor:
    """(n, len(indices)) of independent signs; column j depends on (seed, indices[j], n) only, not on the device."""
    columns = [
        torch.randint(0, 2, (product.n,), generator=_generator(seed, index, "rademacher"), dtype=torch.int8)
        for index in indices
    ]
    return torch.stack(columns, dim=1).to(product.device).to(product.dtype).mul_(2).sub_(1)


def gaussian(product: Product, seed: int, index: int) -> Tensor:
    """(n,) standard normal vector, drawn on the CPU from (seed, index)."""
    vector = torch.randn(product.n, generator=_generator(seed, index, "gaussian"), dtype=product.dtype)
    return vector.to(product.device)


def row_gram(X: Tensor, Y: Tensor) -> Tensor:
    """X (J, n), Y (K, n) -> (J, K) float64: X Y'."""
    total = torch.zeros(X.shape[0], Y.shape[0], dtype=torch.float64, device=X.device)
    for columns in pieces_of(X, 1):
        total += X[:, columns].double() @ Y[:, columns].double().T
    return total


def rotate_rows(X: Tensor, S: Tensor) -> None:
    """Replace the first J rows of X (m, n) by S' X, S (m, J) float64, in place and in float64 arithmetic."""
    mix = S.T.to(X.device)
    for columns in pieces_of(X, 1):
        X[: mix.shape[0], columns] = (mix @ X[:, columns].double()).to(X.dtype)


def norm(x: Tensor) -> float:
    """Euclidean norm of x, accumulated in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


class Bar:
    """A tqdm bar over matvecs when asked for and installed; nothing otherwise."""

    def __init__(self, product: Product, total: int | None, progress: bool) -> None:
        self.product, self.bar = product, None
        if progress:
            try:
                from tqdm.auto import tqdm
            except ImportError:  # the bar is an extra, the number is not
                return
            self.bar = tqdm(total=total, desc=product.probe, unit="matvec")

    def update(self) -> None:
        if self.bar is not None:
            self.bar.update(self.product.matvecs - self.bar.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.update()
            self.bar.close()


def require_count(probe: str, name: str, value: int, least: int, why: str = "") -> None:
    """ValueError unless `value` is an int >= least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        because = f" ({why})" if why else ""
        raise ValueError(f"{probe}: {name}={value!r}; needs an integer >= {least}{because}")
