"""Writes IDX files, as MNIST comes in."""

import struct

import numpy as np

TYPES = {np.uint8: 0x08, np.int8: 0x09, np.int16: 0x0B, np.int32: 0x0C, np.float32: 0x0D, np.float64: 0x0E}


def idx(array: np.ndarray) -> bytes:
    """The array as the bytes of an IDX file."""
    header = struct.pack(">BBBB", 0, 0, TYPES[array.dtype.type], array.ndim) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()
