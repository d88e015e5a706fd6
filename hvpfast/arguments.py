"""What every op asks of its arguments: real floating tensors of one dtype on one device, and an `out` that fits.

The usual case is found out first and fast, since it is asked on every call; the reason is worked out only where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op sums and returns: float64 for float64, float32 for every narrower float."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def floats(name: str, **tensors: Tensor) -> None:
    """Raise unless all are floating tensors of one dtype on one device."""
    first = None
    for label, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: {label} is a {type(x).__name__}; it must be a torch.Tensor")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name}: {label} is {x.dtype}; it must be a real floating dtype, so convert it first")
        if first is None:
            first = label, x.dtype, x.device
        elif x.dtype != first[1]:
            raise TypeError(
                f"{name}: {first[0]} is {first[1]} but {label} is {x.dtype}; convert one to the other's dtype"
            )
        elif x.device != first[2]:
            raise ValueError(f"{name}: {first[0]} is on {first[2]} but {label} is on {x.device}; move one of them")


def alike(x: Tensor, y: Tensor) -> bool:
    """Whether both are floating tensors of one dtype on one device: the usual case, found out without a reason."""
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.dtype is y.dtype
        and x.is_floating_point()
        and ((x.is_cpu and y.is_cpu) or x.device == y.device)
    )


def usual(*tensors: Tensor) -> bool:
    """Whether all are plain floating CPU tensors of one dtype: found out without a reason, since it is asked on every call."""
    dtype = tensors[0].dtype if type(tensors[0]) is Tensor else None
    for x in tensors:
        if type(x) is not Tensor or x.dtype is not dtype or not x.is_cpu:
            return False
    return dtype.is_floating_point


def real(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def scalars(name: str, **given: object) -> None:
    """Raise unless all are real numbers, or tensors that hold one each."""
    for label, x in given.items():
        if isinstance(x, Tensor):
            if x.numel() != 1 or x.is_complex():
                raise TypeError(
                    f"{name}: {label} is a tensor of {x.dtype}, {tuple(x.shape)}; it must be one real number"
                )
        elif not hasattr(type(x), "__float__"):
            raise TypeError(f"{name}: {label} is {x!r}, a {type(x).__name__}; it must be a real number")


def output(name: str, out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise unless `out` can take a result of this shape for inputs like `like`."""
    if out is None:
        return
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}: out is a {type(out).__name__}; it must be a torch.Tensor")
    if out.shape != shape:
        raise ValueError(f"{name}: out has shape {tuple(out.shape)}; it must be {shape}")
    if out.dtype is not accumulate_dtype(like.dtype):
        raise TypeError(f"{name}: out is {out.dtype}; results for {like.dtype} are {accumulate_dtype(like.dtype)}")
    if not (out.is_cpu and like.is_cpu) and out.device != like.device:
        raise ValueError(f"{name}: out is on {out.device} but the inputs are on {like.device}")
    if not out.is_contiguous() and any(
        step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)
    ):
        raise ValueError(f"{name}: out is an expanded view, whose elements share memory; pass a tensor of its own")
