"""Which implementation of an op runs, and why not the others.

An op is a function decorated with `@op`; its body is the reference, and implementations with the same signature
replace it (`hvpfast.kernels`). With nothing forced, the first implementation for the tensors' device that supports
the arguments and is not known to be slower runs, else the reference. A backend that is asked for by name runs or raises.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvpfast.autocast import full_precision
from hvpfast.untouchable import KNOWN, is_compiling, take_compiled, untouchable

BACKENDS = ("reference", "cpu", "triton", "cuda")
PRECISIONS = ("auto", "ieee", "bf16x3", "bf16")
GRAPHS = ("off", "auto", "required")
_AUTO = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # order of preference by device; the reference comes last
_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu")}  # cpu: under Triton's interpreter

OPS: dict[str, Op] = {}


class _State:
    """What is forced now: one for the process, so that autograd's own threads see it too."""

    __slots__ = ("backend", "graphs", "precision")

    def __init__(self):
        self.backend: str | None = _valid("HVPFAST_BACKEND", os.environ.get("HVPFAST_BACKEND", "auto"), BACKENDS)
        self.precision: str = _valid("HVPFAST_PRECISION", os.environ.get("HVPFAST_PRECISION", "auto"), PRECISIONS[1:])
        self.precision = self.precision or "auto"
        self.graphs = _graphs("HVPFAST_CUDA_GRAPHS", os.environ.get("HVPFAST_CUDA_GRAPHS", "off"))


def _valid(what: str, name: str | None, names: tuple[str, ...]) -> str | None:
    if name in (None, "auto"):
        return None
    if name not in names:
        raise ValueError(f"{what}: got {name!r}; it must be one of {', '.join(('auto', *names))}")
    return name


def _graphs(what: str, mode: str) -> str:
    if mode not in GRAPHS:
        raise ValueError(f"{what}: got {mode!r}; it must be one of {', '.join(GRAPHS)}")
    return mode


_state = _State()


class _Forced:
    """Context manager that sets one field of the state and puts the old value back."""

    def __init__(self, field: str, value: str | None):
        self._field, self._value, self._before = field, value, []

    def __enter__(self) -> None:
        self._before.append(getattr(_state, self._field))
        setattr(_state, self._field, self._value)

    def __exit__(self, *_: object) -> None:
        setattr(_state, self._field, self._before.pop())


def backend(name: str | None) -> _Forced:
    """Force one backend for every op within a `with` block; `"auto"` (or None) gives the choice back.

    Args:
        name: "reference", "cpu", "triton", "cuda" or "auto". `HVPFAST_BACKEND` sets it for the whole process.

    Raises:
        ValueError: for any other name. Inside the block an op that cannot run there raises `BackendError`.
    """
    return _Forced("backend", _valid("backend", name, BACKENDS))


def backend_in_use() -> str | None:
    """What `backend` or `HVPFAST_BACKEND` forced, or None."""
    return _state.backend


def precision_in_use() -> str:
    """What `precision` or `HVPFAST_PRECISION` set, else "auto"."""
    return _state.precision


def precision(name: str) -> _Forced:
    """Set how float32 data are multiplied inside kernels, within a `with` block.

    Args:
        name: "auto": bf16x3 for float32 statistics (and layers on the backward passes to them) where it is measured faster,
            else full float32. "ieee": full float32 everywhere. "bf16x3": every float32 split into two bf16 halves, three
            products, float32 sums (relative error about 3e-6). "bf16": one bf16 product (about 1e-3). 16-bit inputs multiply
            exactly into float32 sums under each; float64 is always float64. The reference is never less precise than "ieee".
            `HVPFAST_PRECISION` sets it for the whole process.

    Raises:
        ValueError: for any other name.
    """
    if name is None:
        raise ValueError("precision: got None; it must be one of auto, ieee, bf16x3, bf16")
    return _Forced("precision", _valid("precision", name, PRECISIONS[1:]) or "auto")


def graphs_in_use() -> str:
    """What `cuda_graphs` or `HVPFAST_CUDA_GRAPHS` set, else "off"."""
    return _state.graphs


def cuda_graphs(mode: str = "auto") -> _Forced:
    """Let products with `Hessian`, `GGN` and `EmpiricalFisher` on a CUDA device be replayed from CUDA graphs, within a `with`
    block. Not yet measured on a GPU, and so off by default.

    The first product linearises the batches (on a stream of its own) and runs as ever. The next with as many columns is captured,
    batch by batch, and the first replay compared with what it gave; from then on a batch's product is one launch, where a small
    model's takes hundreds. Changed parameters, buffers, modes or data are noticed as ever, and all is made anew, as it is for
    products on the other side of a `with`.

    Memory: for every number of columns K that is captured, the vectors (K P numbers) and each batch's result (as many), in what
    linearisations leave of `HVPFAST_CACHE_BYTES`; beside it a pool with the temporaries of a product.

    Args:
        mode: "auto": where something cannot be captured (a loss that reads values back, what does not fit in the memory above,
            an output or a loss still held, whose graph ends in the same parameters on another stream), products go on without,
            after a warning that says why; so does `operator.graphs.reason`, until `operator.release()`. Does nothing on a CPU.
            "required": `BackendError` instead, on a CPU too. "off": the default. `HVPFAST_CUDA_GRAPHS` sets it for the process.

    Raises:
        ValueError: for any other mode.
    """
    return _Forced("graphs", _graphs("cuda_graphs", mode))


class BackendError(RuntimeError):
    """A backend was asked for by name, or CUDA graphs were required, and cannot run what it was asked for."""


@dataclass(frozen=True)
class Choice:
    """What would run, and why each other backend of the op would not."""

    backend: str
    why_not: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([f"runs: {self.backend}", *(f"not {name}: {why}" for name, why in self.why_not.items())])


class _Implementation:
    """One backend of one op, loaded: `run`, and what it says of given arguments."""

    __slots__ = ("run", "slower", "unfit")

    def __init__(self, run: Callable, unfit: Callable | None, slower: Callable | None):
        self.run, self.unfit, self.slower = run, unfit, slower


class Op:
    """A function that has a reference body and replaceable implementations; made by `@op`.

    Attributes:
        name: the op's name. reference: the plain PyTorch body. backends: names of the backends that implement it.
    """

    def __init__(self, reference: Callable, check: Callable | None, backends: tuple[str, ...]):
        self.reference = full_precision(reference)
        self.name = self.__name__ = reference.__name__
        self.__doc__ = reference.__doc__
        self.__wrapped__ = self.reference
        self.__module__ = reference.__module__
        self.__signature__ = inspect.signature(reference)
        self.backends = backends
        self._check = check
        self._loaded: dict[str, _Implementation | str] = {}
        self._auto: dict[str, tuple[_Implementation, ...]] = {}
        self._whole: Callable | None = None  # the compiled form of a whole call, for the usual arguments

    def __repr__(self) -> str:
        return f"<op {self.name}: {', '.join(('reference', *self.backends))}>"

    def __call__(self, *args, **kwargs):
        # A call must cost at most 3 us over the function that it ends in (bench_dispatch.py).
        forced, precision = _state.backend, _state.precision
        if self._whole is not None and forced is None and not is_compiling():
            result = self._whole(args, kwargs, precision)
            if result is not NotImplemented:
                return result
        if self._check is not None:
            self._check(*args, **kwargs)
        if forced is not None:
            return self._run_on(forced, args, kwargs)
        device = _device(args, kwargs)
        candidates = self._auto.get(device)
        if candidates is None:  # a compiler traces no imports, and takes the reference anyway
            candidates = () if is_compiling() else self._candidates(device)
        if candidates and not is_compiling():
            extended = {**kwargs, "precision": precision} if kwargs else {"precision": precision}
            touchable = False
            for one in candidates:  # `slower` looks at shapes alone, and spares small calls the rest
                if one.slower is not None and one.slower(*args, **extended) is not None:
                    continue
                if not touchable:
                    if untouchable(args, kwargs) is not None:
                        break
                    touchable = True
                if one.unfit is None or one.unfit(*args, **extended) is None:
                    return _run(one, args, extended) if "out" in extended else one.run(*args, **extended)
        return self.reference(*args, **kwargs)

    def on(self, name: str) -> Callable:
        """The op bound to one backend: a callable with the op's signature, which runs there or raises `BackendError`."""
        if _valid("backend", name, BACKENDS) is None:
            raise ValueError(f"{self.name}.on: got {name!r}; it must be one of {', '.join(BACKENDS)}")

        def bound(*args, **kwargs):
            if self._check is not None:
                self._check(*args, **kwargs)
            return self._run_on(name, args, kwargs)

        bound.__name__, bound.__doc__, bound.__signature__ = f"{self.name}_{name}", self.__doc__, self.__signature__
        return bound

    def choose(self, *args, **kwargs) -> Choice:
        """Say what a call with these arguments would run, and why not the other backends; nothing is computed.

        Raises:
            ValueError, TypeError: for arguments that the op itself refuses. BackendError: a forced backend cannot run.
        """
        if self._check is not None:
            self._check(*args, **kwargs)
        device, why_not = _device(args, kwargs), {}
        if _state.backend is not None:
            reason = self.why_not(_state.backend, *args, **kwargs)
            if reason is not None:
                raise self._refusal(_state.backend, reason)
            return Choice(_state.backend, {})
        chosen = None
        for name in _AUTO.get(device, ()):
            reason = self.why_not(name, *args, **kwargs)
            one = self._loaded.get(name)
            if reason is None and isinstance(one, _Implementation) and one.slower is not None:
                reason = one.slower(*args, precision=_state.precision, **kwargs)
            if reason is None and chosen is not None:
                reason = f"{chosen} comes first"
            if reason is None:
                chosen = name
            else:
                why_not[name] = reason
        for name in self.backends:
            if name != chosen and name not in why_not:
                why_not[name] = self.why_not(name, *args, **kwargs) or f"not taken by itself for {device} tensors"
        return Choice(chosen or "reference", why_not)

    def why_not(self, name: str, *args, **kwargs) -> str | None:
        """The reason for which backend `name` cannot run: at all, or with the arguments where some are given; or None."""
        if name == "reference":
            return None
        one = self._load(name)
        if isinstance(one, str):
            return one
        if not args and not kwargs:
            return None
        device = _device(args, kwargs)
        if device not in _DEVICES[name]:
            return f"the tensors are on {device}; it takes those on {' or '.join(_DEVICES[name])}"
        reason = "torch.compile is tracing" if is_compiling() else untouchable(args, kwargs)
        if reason is None and one.unfit is not None:
            reason = one.unfit(*args, precision=_state.precision, **kwargs)
        return reason

    def _run_on(self, name: str, args: tuple, kwargs: dict):
        if name == "reference":
            return self.reference(*args, **kwargs)
        reason = self.why_not(name, *args, **kwargs)
        if reason is not None:
            raise self._refusal(name, reason)
        return _run(self._loaded[name], args, {**kwargs, "precision": _state.precision})

    def _refusal(self, name: str, reason: str) -> BackendError:
        return BackendError(
            f"{self.name}: backend {name!r} was asked for and cannot run: {reason}. "
            f"Use backend('auto'), which falls back to the reference, or change what is named above."
        )

    def _candidates(self, device: str) -> tuple[_Implementation, ...]:
        loaded = [self._load(name) for name in _AUTO.get(device, ())]
        self._auto[device] = tuple(one for one in loaded if isinstance(one, _Implementation))
        return self._auto[device]

    def _load(self, name: str) -> _Implementation | str:
        if name not in self._loaded:
            self._loaded[name] = self._find(name)
        return self._loaded[name]

    def _find(self, name: str) -> _Implementation | str:
        if name not in self.backends:
            return f"{self.name} has no {name} implementation"
        reason = missing(name)
        if reason is not None:
            return reason
        try:
            if name == "triton":
                module, prefix, stem = importlib.import_module(f"hvpfast.kernels.{self.name}"), "", self.name
            else:
                module, prefix = importlib.import_module("hvpfast.kernels.native"), f"{name}_{self.name}_"
                stem = f"{name}_{self.name}"
        except ImportError as error:
            return f"its kernel module could not be imported: {error}"
        run = getattr(module, stem, None)
        if run is None:
            return (
                f"{module.__name__} has no function {stem}; reinstall hvpfast, so that all its parts are of one version"
            )
        if name == "cpu" and hasattr(module, "cpu_calls"):
            self._whole = take_compiled(module.cpu_calls(KNOWN), self.name)
        return _Implementation(
            run, getattr(module, f"{prefix}supports", None), getattr(module, f"{prefix}worthwhile", None)
        )


def op(check: Callable | None = None, backends: tuple[str, ...] = ()) -> Callable[[Callable], Op]:
    """Make an op of a function whose body is its reference.

    Args:
        check: called with the op's arguments first, for every backend; raises ValueError or TypeError on bad ones.
        backends: names of the backends for which `hvpfast.kernels` has an implementation.
    """

    def decorate(reference: Callable) -> Op:
        made = Op(reference, check, backends)
        OPS[made.name] = made
        return made

    return decorate


def missing(name: str) -> str | None:
    """Why no op at all can run on backend `name` here (not built, no GPU, ...), or None."""
    if name == "reference":
        return None
    try:
        if name == "triton":
            return _triton_missing()
        return importlib.import_module("hvpfast.kernels.native").missing(name)
    except ImportError as error:
        return f"hvpfast.kernels cannot be imported ({error}); install hvpfast with `pip install .`"


def _triton_missing() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it with `pip install hvpfast[triton]`"
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        return "no CUDA device; TRITON_INTERPRET=1, set before Python starts, runs Triton kernels on the CPU"
    return None


class Backends(list):
    """Rows (op, backend, reason): reason is None where the backend can run; prints as a table."""

    def __str__(self) -> str:
        wide = max(len(name) for name, _, _ in self)
        return "\n".join(f"{name:<{wide}}  {where:<9}  {reason or 'ready'}" for name, where, reason in self)

    __repr__ = __str__


def backends() -> Backends:
    """The table of op x backend, with the reason where one is missing; `print(hf.backends())` shows it."""
    return Backends((name, where, each.why_not(where)) for name, each in OPS.items() for where in BACKENDS)


def _run(one: _Implementation, args: tuple, kwargs: dict):
    """Run an implementation; autograd learns that `out` was written, as it would of any in-place operation."""
    result = one.run(*args, **kwargs)
    if kwargs.get("out") is not None:
        torch.autograd.graph.increment_version(kwargs["out"])
    return result


def _device(args: tuple, kwargs: dict) -> str:
    first = args[0] if args else next(iter(kwargs.values()))
    while not isinstance(first, Tensor):
        first = first[0]
    return "cpu" if first.is_cpu else first.device.type
