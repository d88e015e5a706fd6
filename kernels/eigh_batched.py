"""Eigenvalues and vectors of many symmetric matrices at once: cuSOLVER's batched solver, where torch does not call it itself.

`torch.linalg.eigh` on CUDA took one matrix after another above n = 32 up to torch 2.11 (pytorch#174674: 500 of 100 x 100 in
914 ms, batched 8 ms, reported on a GPU that is not ours); from torch 2.12 on it hands every batch to the same solver
(pytorch#175403). `cusolverDnXsyevBatched` is in cuSOLVER since CUDA 12.6.2. Nothing is linked: the symbols are taken from the
library that torch itself has loaded. Not yet measured on a GPU; `bench/gpu.sh` times it beside torch, and

    python -m hvpfast.kernels.eigh_batched

says what the installed torch does: by its version, and where there is a GPU by measurement.
"""

from __future__ import annotations

import ctypes
import functools
import re
import statistics
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.float64: 1}  # CUDA_R_32F, CUDA_R_64F
_VECTORS = 1  # CUSOLVER_EIG_MODE_VECTOR
_UPPER = 1  # CUBLAS_FILL_MODE_UPPER: of the transposed matrix that a row-major one is read as, so its lower triangle
_LOOPED_ABOVE = 32  # torch < 2.12 hands smaller matrices to a batched solver too
_BATCHED_SINCE = (2, 12)  # torch

_handle, _size, _pointer, _int, _long = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
# handle, params, jobz, uplo, n, type of A, A, lda, type of W, W, type computed in
_PROBLEM = (_handle, _handle, _int, _int, _long, _int, _pointer, _long, _int, _pointer, _int)
_PROTOTYPES = {
    "cusolverDnCreate": (ctypes.POINTER(_handle),),
    "cusolverDnCreateParams": (ctypes.POINTER(_handle),),
    "cusolverDnSetStream": (_handle, _pointer),
    "cusolverDnXsyevBatched_bufferSize": (*_PROBLEM, ctypes.POINTER(_size), ctypes.POINTER(_size), _long),
    "cusolverDnXsyevBatched": (*_PROBLEM, _pointer, _size, _pointer, _size, _pointer, _long),
}


class SolverError(RuntimeError):
    """A call of cuSOLVER returned a status other than success."""


class Solver:
    """The functions of one libcusolver, with a handle on the device that is current: one for each thread and device."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _PROTOTYPES.items():
            getattr(library, name).argtypes, getattr(library, name).restype = arguments, _int
        self.library = library
        self.handle, self.params = _handle(), _handle()
        self.call("cusolverDnCreate", ctypes.byref(self.handle))
        self.call("cusolverDnCreateParams", ctypes.byref(self.params))

    def call(self, name: str, *arguments) -> None:
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise SolverError(f"{name} returned status {status}")

    def eigh(self, a: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        """As `eigh` below, on a stream: a (B, n, n). Nothing waits: a matrix that did not converge has NaN for values."""
        batch, n, code = a.shape[0], a.shape[-1], _DTYPES[a.dtype]
        vectors = a.clone(memory_format=torch.contiguous_format)  # overwritten; column-major, so transposed at the end
        values = a.new_empty(batch, n)
        info = torch.empty(batch, dtype=torch.int32, device=a.device)
        problem = (
            self.handle, self.params, _VECTORS, _UPPER, n, code, vectors.data_ptr(), n, code, values.data_ptr(), code,
        )  # fmt: skip
        on_device, on_host = _size(), _size()
        self.call("cusolverDnSetStream", self.handle, stream)
        self.call("cusolverDnXsyevBatched_bufferSize", *problem, ctypes.byref(on_device), ctypes.byref(on_host), batch)
        workspace = torch.empty(on_device.value, dtype=torch.uint8, device=a.device)
        host = ctypes.create_string_buffer(max(1, on_host.value))
        self.call(
            "cusolverDnXsyevBatched", *problem, workspace.data_ptr(), on_device, ctypes.addressof(host), on_host,
            info.data_ptr(), batch,
        )  # fmt: skip
        return values.masked_fill_((info != 0)[:, None], torch.nan), vectors.mT


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, n), ascending, and vectors (B, n, n) in columns of symmetric matrices a (B, n, n), float32 or float64.

    As `torch.linalg.eigh`, which runs wherever `why_not(a)` has a reason: the lower triangle is read. By cuSOLVER's batched
    solver nothing waits for the device, and a matrix that did not converge has NaN for values; torch raises LinAlgError.
    The first call of a thread on a device makes a handle: make it before a CUDA graph is captured.
    """
    if why_not(a) is None:
        try:
            with torch.cuda.device(a.device):
                return _solver(a.device.index).eigh(a, torch.cuda.current_stream(a.device).cuda_stream)
        except SolverError as error:  # an argument that this version refuses, before anything has run
            warnings.warn(
                f"hvpfast: {error}; torch.linalg.eigh goes on, which may be slower", RuntimeWarning, stacklevel=2
            )
    return torch.linalg.eigh(a)


def why_not(a: Tensor) -> str | None:
    """Why `torch.linalg.eigh` takes these matrices, or None."""
    if not a.is_cuda:
        return f"a is on {a.device.type}; cuSOLVER needs a CUDA device"
    if a.dtype not in _DTYPES:
        return f"a is {a.dtype}; the call is written for float32 and float64"
    if a.requires_grad and torch.is_grad_enabled():
        return "a requires grad, and only torch's function is differentiable"
    if a.dim() != 3 or a.shape[0] < 2 or a.shape[-1] <= _LOOPED_ABOVE:
        return f"a has shape {tuple(a.shape)}; torch is slow with several matrices above {_LOOPED_ABOVE} only"
    if torch_batches(torch.__version__):
        return f"torch {torch.__version__} calls the batched solver itself"
    return _library() if isinstance(_library(), str) else None


def torch_batches(version: str) -> bool:
    """Whether a torch of that version hands batches above n = 32 to a batched solver: since 2.12, pytorch#175403."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= _BATCHED_SINCE


def loaded(maps: str) -> str | None:
    """The path of libcusolver in the text of /proc/self/maps."""
    found = re.search(r"(/\S.*/libcusolver\.so[.\d]*)$", maps, re.MULTILINE)
    return found[1] if found else None


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The libcusolver that torch has loaded, or why there is none with the batched solver."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return "the system does not tell which libraries are loaded (no /proc/self/maps)"
    if loaded(maps.read_text()) is None:
        torch.linalg.eigh(torch.ones(1, 1, device="cuda"))  # torch loads its linear algebra when it is first needed
    path = loaded(maps.read_text())
    if path is None:
        return "torch has loaded no libcusolver"
    library = ctypes.CDLL(path)
    if not hasattr(library, "cusolverDnXsyevBatched"):
        return f"{path} has no cusolverDnXsyevBatched (CUDA 12.6.2 and later have)"
    return library


_of_thread = threading.local()


def _solver(device: int) -> Solver:
    solvers = _of_thread.__dict__.setdefault("solvers", {})
    if device not in solvers:
        solvers[device] = Solver(_library())
    return solvers[device]


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median time on the current CUDA device."""
    run()
    times = []
    for _ in range(repeats):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def main() -> None:
    """Print what the installed torch does with batches."""
    does = "batches" if torch_batches(torch.__version__) else "loops over"
    print(f"torch {torch.__version__}: by its version, torch.linalg.eigh {does} matrices above n = {_LOOPED_ABOVE}")
    if not torch.cuda.is_available():
        print("no CUDA device: nothing can be measured here")
        return
    if isinstance(_library(), str):
        print(_library())
        return
    for batch, n in ((64, 33), (64, 128), (48, 1024)):
        x = torch.randn(batch, n, n, device="cuda")
        a, stream = x @ x.mT, torch.cuda.current_stream().cuda_stream
        torch_ms = milliseconds(lambda a=a: torch.linalg.eigh(a))
        ours_ms = milliseconds(lambda a=a, s=stream: _solver(torch.cuda.current_device()).eigh(a, s))
        print(f"{batch} of {n} x {n}, float32: torch {torch_ms:.2f} ms, cusolverDnXsyevBatched {ours_ms:.2f} ms")


if __name__ == "__main__":
    main()
