"""The demo's data: scikit-learn's digits, or MNIST from IDX files that the user has. Nothing is ever downloaded."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hvpfast.cli.errors import UserError, extra

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MNIST = {
    "train images": ("train-images", 3),
    "train labels": ("train-labels", 1),
    "test images": ("t10k-images", 3),
    "test labels": ("t10k-labels", 1),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Train and test samples, scaled and centred: x (N, features) float32, y (N,) int64; digest of the bytes used."""

    name: str
    source: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    digest: str

    def describe(self) -> dict:
        """What `results.json` says of the data."""
        return {
            "name": self.name,
            "source": self.source,
            "train": len(self.y_train),
            "test": len(self.y_test),
            "features": self.x_train.shape[1],
            "classes": int(self.y_train.max()) + 1,
            "sha256": self.digest,
        }


def digits() -> Dataset:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, in one fixed random order: 1297 train, 500 test."""
    extra("sklearn.datasets", "cli")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))  # the file is sorted by writer
    train, test = order[:1297], order[1297:]
    x, y = bunch.data / 16, bunch.target
    return _dataset("digits", "scikit-learn's load_digits, shuffled once", x[train], y[train], x[test], y[test])


def mnist(folder: str | Path) -> Dataset:
    """MNIST from its four IDX files in `folder`, gzipped or not, named `train-images-idx3-ubyte` or `.idx3-ubyte`.

    Raises:
        UserError: the folder or a file is missing, or a file is not what its name says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--data {folder}: there is no such folder; it must hold MNIST's four IDX files")
    arrays = {}
    for what, (stem, axes) in _MNIST.items():
        path = _find(folder, stem, axes)
        arrays[what] = array = read_idx(path)
        if array.ndim != axes or array.dtype != np.uint8:
            raise UserError(
                f"{path}: holds {array.ndim} axes of {array.dtype}; the {what} must have {axes} axes of unsigned bytes"
            )
    for part in ("train", "test"):
        images, labels = arrays[f"{part} images"], arrays[f"{part} labels"]
        if len(images) != len(labels) or not len(images):
            raise UserError(
                f"{folder}: {len(images)} {part} images but {len(labels)} labels; the files do not belong together"
            )
    shapes = {arrays[f"{part} images"].shape[1:] for part in ("train", "test")}
    if len(shapes) > 1:
        raise UserError(f"{folder}: train and test images differ in size ({' and '.join(map(str, sorted(shapes)))})")
    train = len(arrays["train labels"])
    return _dataset(
        "MNIST",
        f"IDX files in {folder}",
        arrays["train images"].reshape(train, -1) / np.float32(255),
        arrays["train labels"],
        arrays["test images"].reshape(len(arrays["test labels"]), -1) / np.float32(255),
        arrays["test labels"],
    )


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file (big-endian header and data; gzip is recognised by its first bytes).

    Raises:
        UserError: it cannot be read, its magic number is no IDX file's, or it has too few or too many bytes.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the file again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES or raw[3] == 0:
        raise UserError(
            f"{path}: starts with {raw[:4].hex(' ') or 'nothing'}, which is no IDX magic number (00 00, type, axes); is it "
            f"another file, or was it unpacked wrongly?"
        )
    axes, dtype = raw[3], np.dtype(_IDX_TYPES[raw[2]])
    start = 4 + 4 * axes
    if len(raw) < start:
        raise UserError(
            f"{path}: ends within its header ({len(raw)} bytes of {start}); the file is truncated, copy it again"
        )
    shape = struct.unpack(f">{axes}I", raw[4:start])
    need = start + math.prod(shape) * dtype.itemsize
    if len(raw) != need:
        state = "truncated" if len(raw) < need else "too long"
        raise UserError(
            f"{path}: {len(raw)} bytes for shape {shape}, which needs {need}; the file is {state}, copy it again"
        )
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def _find(folder: Path, stem: str, axes: int) -> Path:
    names = [f"{stem}{joint}idx{axes}-ubyte{suffix}" for joint in "-." for suffix in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"--data {folder}: {names[0]} is missing; looked for {', '.join(names)}")


def _dataset(name: str, source: str, x, y, x_test, y_test) -> Dataset:
    """Hash, and take the training mean of every feature off."""
    x, x_test = (np.ascontiguousarray(part, dtype=np.float32) for part in (x, x_test))
    y, y_test = (np.ascontiguousarray(part, dtype=np.int64) for part in (y, y_test))
    digest = hashlib.sha256()
    for part in (x, y, x_test, y_test):
        digest.update(str(part.shape).encode())
        digest.update(part.tobytes())
    mean = x.mean(0, dtype=np.float64).astype(np.float32)
    tensors = (torch.from_numpy(part) for part in (x - mean, y, x_test - mean, y_test))
    return Dataset(name, source, *tensors, digest.hexdigest())
