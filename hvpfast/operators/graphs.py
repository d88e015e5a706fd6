"""Products of kept linearisations from CUDA graphs: the launches of one, captured for a number of columns, made as one.

Autograd runs every node on the stream of its forward pass, so what is captured is linearised on the stream of the capture too:
an operator's whole product runs `beside` the caller's stream. Nothing of this was run on a GPU so far.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvpfast.capture.problem import finite
from hvpfast.dispatch import BackendError, backend_in_use, graphs_in_use, precision_in_use
from hvpfast.space import Space

# One a device: parameters that two operators share have their gradients' ends there.
_streams: dict[int, torch.cuda.Stream] = {}
_broken: list[torch.cuda.CUDAGraph] = []  # whose capture failed: the allocator may go on asking them


class Recorder:
    """The stream that work is captured on, and the pool that captured work has its memory in."""

    def __init__(self, device: torch.device):
        self._index = torch.cuda.current_device() if device.index is None else device.index
        if self._index not in _streams:
            _streams[self._index] = torch.cuda.Stream(self._index)
        self._stream, self._pool = _streams[self._index], torch.cuda.graph_pool_handle()

    def beside(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x) on the stream, which waits for the caller's and then is waited for."""
        current = torch.cuda.current_stream(self._index)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                result = function(x)
        finally:
            current.wait_stream(self._stream)
        result.record_stream(current)  # the only tensor that leaves
        return result

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What `run` launches, captured: a function that launches it again, and where it leaves its result."""
        torch.cuda.synchronize(self._index)
        graph, out, failure = torch.cuda.CUDAGraph(), None, None
        try:  # other threads (a loader's, which pins memory) go on as they like
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out = run()
            except BaseException as error:  # capture_end, which must come, tells less of it
                failure = error
            graph.capture_end()
        except RuntimeError as error:
            failure = failure or error
        if failure is not None:
            _broken.append(graph)
            with contextlib.suppress(Exception):  # a capture that is cut off leaves the allocator in it
                torch._C._cuda_endAllocateToPool(self._index, self._pool)
                torch._C._cuda_releasePool(self._index, self._pool)
            raise failure
        return graph.replay, out


RECORDERS: dict[str, type[Recorder]] = {"cuda": Recorder}


class Graphs:
    """The CUDA graphs of one operator's products, and why there are not more: see `hvpfast.cuda_graphs`.

    Attributes:
        reason: why products are not captured (any longer), or None. room: bytes that vectors and results may take.
    """

    def __init__(self, who: str, space: Space):
        self.reason: str | None = None
        self._who, self._space = who, space
        self.forget()

    def __repr__(self) -> str:
        made = ", ".join(f"{batches} batches x {columns} columns" for columns, batches in self.captured.items())
        return f"<CUDA graphs of {self._who}: {made or 'none'}{f'; {self.reason}' if self.reason else ''}>"

    @property
    def captured(self) -> dict[int, int]:
        """Columns of a product -> how many batches' products with so many are captured."""
        found: dict[int, int] = {}
        for _, columns, *_ in self._made:
            found[columns] = found.get(columns, 0) + 1
        return found

    @property
    def bytes(self) -> int:
        """Memory of vectors and results; the pool's temporaries come on top."""
        return sum(x.nbytes for x in (*self._vectors.values(), *(out for _, out in self._made.values())))

    def asked(self) -> bool:
        """Whether products are to be captured now; BackendError where that is required and cannot be."""
        mode = graphs_in_use()
        able = self._space.device.type in RECORDERS
        if mode == "required" and not able:
            raise self._refusal(f"the parameters are on {self._space.device}, and CUDA graphs are a CUDA device's")
        if mode == "required" and self.reason is not None:
            raise self._refusal(self.reason)
        return mode != "off" and able

    def forget(self) -> None:
        """Drop all graphs, with the linearisations that they are of."""
        self.room = 0
        self._made: dict[tuple, tuple[Callable[[], None], Tensor]] = {}
        self._vectors: dict[int, Tensor] = {}  # by columns: what every batch's graph reads
        self._seen: set[tuple] = set()
        self._recorder: Recorder | None = None

    def beside(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x) on the stream that is captured."""
        if self._recorder is None:
            self._recorder = RECORDERS[self._space.device.type](self._space.device)
        return self._recorder.beside(function, x)

    def product(
        self, piece: object, rows: Tensor, run: Callable[[Sequence[Tensor]], Sequence[Tensor | None]], kept: bool
    ) -> Tensor | None:
        """The product of a batch's piece with rows (K, P): (K, P) in memory that the next one overwrites, or None before it is
        captured and where it cannot be. `run`: the product without a graph, tensor by tensor; `kept`: the piece will be there."""
        key = (id(piece), len(rows), *_settings())
        if key in self._made:
            replay, out = self._made[key]
            self._vectors[len(rows)].copy_(rows)
            replay()
            return out
        if kept and key in self._seen and self.reason is None:
            return self._captured(key, rows, run)
        self._seen.add(key)
        return None

    def stop(self, reason: str) -> None:
        """Capture nothing more: a warning, or BackendError where graphs are required."""
        known, self.reason = self.reason == reason, reason
        if graphs_in_use() == "required":
            raise self._refusal(reason)
        if not known:
            warnings.warn(
                f"{self._who}: products are not captured as CUDA graphs: {reason}", RuntimeWarning, stacklevel=11
            )

    def _captured(self, key: tuple, rows: Tensor, run: Callable) -> Tensor | None:
        k, space = len(rows), self._space
        held = k * space.size * space.dtype.itemsize
        if self.bytes + (held if k in self._vectors else 2 * held) > self.room:
            self.stop(f"vectors and results of {k} columns do not fit beside the linearisations in HVPFAST_CACHE_BYTES")
            return None
        vectors = self._vectors.setdefault(k, torch.empty(k, space.size, dtype=space.dtype, device=space.device))
        vectors.copy_(rows)

        def whole() -> Tensor:
            return space.join(run(space.split(vectors)), k, space.dtype)

        expected = whole()  # in the memory of the capture, so that all that is made once is made before
        if not finite(expected):
            return expected
        try:
            replay, out = self._recorder.record(whole)
            replay()
            reason = self._differs(out, expected)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            self._made[key] = replay, out
        else:
            self.stop(reason)
        return expected

    def _differs(self, got: Tensor, expected: Tensor) -> str | None:
        """What is wrong with a replay, or None: the same bits, or but for rounding where kernels add in whatever order."""
        if torch.equal(got, expected):
            return None
        eps, norm = torch.finfo(expected.dtype).eps, torch.linalg.vector_norm
        sizes, whole = self._space.sizes, norm(expected.double())
        for name, x, y in zip(self._space.names, got.split(sizes, 1), expected.split(sizes, 1), strict=True):
            error, bound = norm(x.double() - y.double()), eps**0.5 * norm(y.double()) + 64 * eps * whole
            if not error <= bound:
                return f"the first replay is off by {float(error):.1e} at {name!r}, whose product has norm {float(norm(y)):.1e}"
        return None

    def _refusal(self, reason: str) -> BackendError:
        return BackendError(
            f"{self._who}: CUDA graphs are required and cannot be had: {reason}. Use cuda_graphs('auto'), which goes on without "
            f"them, or change what is named above."
        )


def _settings() -> tuple:
    """What decides which kernels run, beside the arguments."""
    try:
        tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # they were set by their newer names
        tf32 = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    return backend_in_use(), precision_in_use(), *tf32, torch.are_deterministic_algorithms_enabled()
