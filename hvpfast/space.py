"""Named parameters as one flat vector, and back, as views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class Space:
    """The vector space of a set of named tensors: P numbers, in the tensors' order, each flattened row-major.

    Attributes:
        names, shapes, sizes: of the tensors. size: P. dtype: the widest of theirs. device: the one they share.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.names = tuple(tensors)
        self.shapes = tuple(tuple(x.shape) for x in tensors.values())
        self.dtypes = tuple(x.dtype for x in tensors.values())
        self.sizes = tuple(x.numel() for x in tensors.values())
        self.size = sum(self.sizes)
        self.dtype = self.dtypes[0]
        for dtype in self.dtypes[1:]:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self.device = next(iter(tensors.values())).device

    def split(self, rows: Tensor) -> list[Tensor]:
        """(K, P) -> one (K, *shape) a tensor, in that tensor's dtype: views wherever the dtype allows."""
        parts = rows.split(self.sizes, 1)
        return [
            part.view(rows.shape[0], *shape).to(dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]

    def join(self, parts: Sequence[Tensor | None], k: int, dtype: torch.dtype) -> Tensor:
        """One (K, *shape) a tensor, None meaning zeros -> (K, P)."""
        rows = torch.empty(k, self.size, dtype=dtype, device=self.device)
        for view, part in zip(rows.split(self.sizes, 1), parts, strict=True):
            view.zero_() if part is None else view.copy_(part.reshape(k, -1))
        return rows

    def rows(self, v: object, who: str) -> tuple[Tensor, Callable[[Tensor], object]]:
        """Read any form of vectors of this space: (K, P) rows, and the function that gives a result the same form.

        Args:
            v: flat (P,) or (P, K); or a dict (by name) or a list or tuple (in order) of tensors shaped like the
                parameters, or like them with one more, last axis of K columns.
            who: named in errors.

        Raises:
            TypeError: not such an object, or not real floating tensors. ValueError: lengths, shapes, names or devices
                that do not fit.
        """
        if isinstance(v, Tensor):
            return self._flat_rows(v, who)
        if isinstance(v, Mapping):
            if set(v) != set(self.names):
                absent, extra = sorted(set(self.names) - set(v)), sorted(set(v) - set(self.names))
                raise ValueError(
                    f"{who}: the dict's names do not fit the parameters: missing {absent or 'none'}, unknown "
                    f"{extra or 'none'}"
                )
            rows, restore = self._listed_rows([v[name] for name in self.names], who)
            return rows, lambda result: dict(zip(self.names, restore(result), strict=True))
        if isinstance(v, (list, tuple)):
            rows, restore = self._listed_rows(list(v), who)
            return rows, lambda result: type(v)(restore(result)) if type(v) in (list, tuple) else restore(result)
        raise TypeError(
            f"{who}: got a {type(v).__name__}; it must be a tensor (P,) or (P, K), or a dict or list of tensors shaped "
            f"like the parameters"
        )

    def _flat_rows(self, v: Tensor, who: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if v.dim() not in (1, 2) or v.shape[0] != self.size:
            raise ValueError(
                f"{who}: the vector has shape {tuple(v.shape)}; it must be (P,) or (P, K) with P = {self.size}, the "
                f"number of parameters"
            )
        self._fits(v, who)
        v = v.detach()
        if v.dim() == 1:
            return v.unsqueeze(0), lambda result: result[0]
        return v.T, lambda result: result.T

    def _listed_rows(self, parts: list, who: str) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
        if len(parts) != len(self.names):
            raise ValueError(f"{who}: got {len(parts)} tensors; there are {len(self.names)} parameters")
        for part in parts:
            if not isinstance(part, Tensor):
                raise TypeError(f"{who}: the list holds a {type(part).__name__}; every entry must be a tensor")
            self._fits(part, who)
        parts = [part.detach() for part in parts]
        single = parts[0].dim() == len(self.shapes[0])
        k = 1 if single else parts[0].shape[-1]
        for name, part, shape in zip(self.names, parts, self.shapes, strict=True):
            if tuple(part.shape) != (shape if single else (*shape, k)):
                raise ValueError(
                    f"{who}: the tensor for {name!r} has shape {tuple(part.shape)}; it must be {shape}, or, as all others, "
                    f"{(*shape, 'K')} for K columns"
                )
        parts = [part.unsqueeze(0) if single else part.movedim(-1, 0) for part in parts]
        dtype = parts[0].dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)

        def restore(result: Tensor) -> list[Tensor]:
            pieces = [
                piece.view(k, *shape) for piece, shape in zip(result.split(self.sizes, 1), self.shapes, strict=True)
            ]
            return [piece[0] if single else piece.movedim(0, -1) for piece in pieces]

        return self.join(parts, k, dtype), restore

    def _fits(self, v: Tensor, who: str) -> None:
        if not v.dtype.is_floating_point:
            raise TypeError(f"{who}: the vector is {v.dtype}; it must be a real floating dtype")
        if v.device != self.device:
            raise ValueError(f"{who}: the vector is on {v.device} but the parameters are on {self.device}; move one")
