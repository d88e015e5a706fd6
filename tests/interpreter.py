"""Triton's interpreter without the work that it does again for every operation: the same programs, checks and results."""

from __future__ import annotations

import functools
import math

import numpy as np

VERSION = "3.9."


def quicken() -> None:
    """Patch the interpreter of this process; of a version that it was not written for, nothing."""
    try:
        import triton
    except ImportError:
        return
    if not triton.__version__.startswith(VERSION) or not triton.knobs.runtime.interpret:
        return
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    call, broadcast = InterpretedFunction.__call__, TritonSemantic.broadcast_impl_value
    np_dtype, check = interpreter._get_np_dtype, TritonSemantic.binary_op_sanitize_overflow_impl
    patched: set[int] = set()
    of_scalars = functools.cache(np_dtype)

    def call_within(self, *args, **kwargs):
        """A function called from a kernel: the kernel's launch has patched its language, save for the first of each module."""
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            return call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def check_overflow(self, lhs, rhs, binary_op):
        """That an integer result has room, in two operations of NumPy instead of a dozen of the interpreter."""
        kind = lhs.type.scalar
        if not isinstance(self.builder, InterpreterBuilder):
            return check(self, lhs, rhs, binary_op)
        if kind.int_bitwidth >= 64:
            return None
        operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__]
        exact = operation(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        least, most = kind.get_int_min_value(), kind.get_int_max_value()
        assert exact.size == 0 or (least <= exact.min() and exact.max() <= most), (
            f"{kind} overflow in {binary_op.__name__}"
        )

    def broadcast_pair(self, lhs, rhs):
        """Nothing to do for blocks of one shape, the most frequent pair."""
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    @functools.cache
    def shape_of(sizes):
        return core.constexpr(math.prod(sizes)), core.tuple([core.constexpr(size) for size in sizes])

    def make_tensor(self, handle, type):
        """As `tensor.__init__`, with the shape's objects made once."""
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shape_of(tuple(type.shape.values) if type.is_block() else ())

    InterpretedFunction.__call__ = call_within
    TritonSemantic.broadcast_impl_value = broadcast_pair
    core.tensor.__init__ = make_tensor
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
    interpreter._get_np_dtype = lambda kind: of_scalars(kind) if type(kind) is core.dtype else np_dtype(kind)
