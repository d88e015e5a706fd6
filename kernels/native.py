"""Launchers of the compiled kernels (`_cpu`, `_cuda`): they check, allocate, and hand over pointers and strides."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch  # loaded first: the extensions share its OpenMP library

_modules: dict[str, ModuleType | str] = {}


def _load(device: str) -> ModuleType | str:
    """The extension for "cpu" or "cuda", or the reason why there is none."""
    if device not in _modules:
        try:
            _modules[device] = importlib.import_module(f"hvpfast.kernels._{device}")
            if device == "cpu":
                _modules[device].allow_threads(_openmp_reason() is None)
        except ImportError as error:
            _modules[device] = f"not built: {build_report().get(device, 'no record of a build; reinstall hvpfast')}"
            if any(Path(__file__).parent.glob(f"_{device}.*")):
                _modules[device] = f"built, but it cannot be loaded: {error}"
    return _modules[device]


def _openmp_reason() -> str | None:
    """Why the CPU kernels run on one thread, or None: a second OpenMP library would mean a second pool of threads."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    files = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if line.count(" ") > 4 and "/" in line}
    found = sorted(name for name in files if any(part in Path(name).name for part in ("libgomp", "libiomp", "libomp")))
    return None if len(found) < 2 else f"{len(found)} OpenMP libraries are loaded: {', '.join(found)}"


def build_report() -> dict[str, str]:
    """What the installation built: for "cpu" and "cuda" either "built" or the reason why not."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def missing(device: str) -> str | None:
    """Why no compiled kernel can run on "cpu" or "cuda" here, or None."""
    module = _load(device)
    if isinstance(module, str):
        return module
    if device == "cuda" and not torch.cuda.is_available():
        return "compiled, but torch sees no CUDA device"
    return None


# C++ kernels for the CPU ----------------------------------------------------------------------------------------------

_CPU_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CPU_PRECISIONS = {"auto": 0, "ieee": 1, "bf16x3": 2, "bf16": 3}


def _cpu_dtype_reason(name: str, x: torch.Tensor) -> str:
    return f"{name} is {x.dtype}; the kernel reads float64, float32, bfloat16 and float16"


def _cpu_rows(x: torch.Tensor) -> tuple[int, int, int, int, int, int] | None:
    """x (..., I) as rows: (outer, inner, I, outer stride, inner stride, feature stride); None: more than two levels."""
    cols = x.shape[-1]
    if x.is_contiguous():
        return 1, x.numel() // cols if cols else x.shape[:-1].numel(), cols, 0, cols, 1
    levels: list[list[int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 0:
            return 1, 0, cols, 0, 0, 1
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = [levels[-1][0] * size, stride]
        else:
            levels.append([size, stride])
    if len(levels) > 2:
        return None
    (outer, outer_stride), (inner, inner_stride) = ([[1, 0], [1, 0]] + levels)[-2:]
    return outer, inner, cols, outer_stride, inner_stride, x.stride(-1)


def cpu_gram(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, precision="auto"):
    width = x.shape[-1] + ones_column
    if out is None:
        out = x.new_empty((width, width), dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    rows = _cpu_rows(x)
    if rows is None:  # the reference's reshape copies here too
        x = x.contiguous()
        rows = _cpu_rows(x)
    _modules["cpu"].gram(
        x.data_ptr(), _CPU_DTYPES[x.dtype], *rows, ones_column, alpha, beta,
        out.data_ptr(), *out.stride(), _CPU_PRECISIONS[precision], torch.get_num_threads(),
    )  # fmt: skip
    return out


def cpu_gram_supports(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, precision="auto") -> str | None:
    return None if x.dtype in _CPU_DTYPES else _cpu_dtype_reason("x", x)


def cpu_sample_norms_squared(a, g, *, precision="auto"):
    out = g.new_empty(g.shape[0], dtype=torch.float64 if g.dtype is torch.float64 else torch.float32)
    _modules["cpu"].sample_norms_squared(
        a.data_ptr(), a.shape, a.stride(), g.data_ptr(), g.shape, g.stride(), _CPU_DTYPES[a.dtype],
        out.data_ptr(), _CPU_PRECISIONS[precision], torch.get_num_threads(),
    )  # fmt: skip
    return out


def cpu_sample_norms_squared_supports(a, g, *, precision="auto") -> str | None:
    return None if a.dtype in _CPU_DTYPES else _cpu_dtype_reason("a", a)


def cpu_second_moment(a, g, *, out=None, precision="auto"):
    if out is None:
        shape = (g.shape[2], a.shape[2])
        out = g.new_empty(shape, dtype=torch.float64 if g.dtype is torch.float64 else torch.float32)
    _modules["cpu"].second_moment(
        a.data_ptr(), a.shape, a.stride(), g.data_ptr(), g.shape, g.stride(), _CPU_DTYPES[a.dtype],
        out.data_ptr(), out.stride(), _CPU_PRECISIONS[precision], torch.get_num_threads(),
    )  # fmt: skip
    return out


def cpu_second_moment_supports(a, g, *, out=None, precision="auto") -> str | None:
    return None if a.dtype in _CPU_DTYPES else _cpu_dtype_reason("a", a)


def _cpu_convolution(x, kernel_size, stride, padding, dilation) -> tuple[tuple[int, ...], ...]:
    """(size, memory stride, kernel, stride, dilation, padding before, positions) of three axes; those not there are 1."""
    axes = x.dim() - 2

    def each(value) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * axes if len(values) == 1 else values

    kernel, steps, spread = each(kernel_size), each(stride), each(dilation)
    reach = [d * (k - 1) for k, d in zip(kernel, spread, strict=True)]
    if isinstance(padding, str):
        around = reach if padding == "same" else [0] * axes
        before = [r // 2 for r in around]
    else:
        before = each(padding)
        around = [2 * p for p in before]
    rows = [
        (size, hop, k, s, d, p, (size + both - r - 1) // s + 1)
        for size, hop, k, s, d, p, both, r in zip(
            x.shape[2:], x.stride()[2:], kernel, steps, spread, before, around, reach, strict=True
        )
    ]
    return ((1, 0, 1, 1, 1, 0, 1),) * (3 - axes) + tuple(rows)


def cpu_conv_gram(
    x, kernel_size, *, stride=1, padding=0, dilation=1, groups=1, ones_column=False, kfac_approx="expand",
    out=None, alpha=1.0, beta=0.0, precision="auto",
):  # fmt: skip
    axes = _cpu_convolution(x, kernel_size, stride, padding, dilation)
    offsets, positions, channels = 1, 1, x.shape[1] // groups
    for axis in axes:
        offsets, positions = offsets * axis[2], positions * axis[6]
    features = channels * offsets
    width = features + ones_column
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    if out is None:
        out = x.new_empty((width, width) if groups == 1 else (groups, width, width), dtype=wide)
    blocks = out if groups > 1 else out[None]
    for group in range(groups):
        part, block = x[:, group * channels : (group + 1) * channels], blocks[group]
        _modules["cpu"].conv_gram(
            part.data_ptr(), _CPU_DTYPES[x.dtype], x.shape[0], channels, *x.stride()[:2], axes, alpha, beta,
            block.data_ptr(), *block.stride(), _CPU_PRECISIONS[precision], torch.get_num_threads(),
        )  # fmt: skip
        if ones_column:
            totals = _cpu_patch_sums(part.sum(0, dtype=wide), axes).mul_(alpha)
            count = alpha * x.shape[0] * positions
            if beta != 0:
                totals_row, count = totals + beta * block[-1, :-1], count + beta * block[-1, -1]
                totals = totals + beta * block[:-1, -1]
            else:
                totals_row = totals
            block[-1, :-1], block[:-1, -1], block[-1, -1] = totals_row, totals, count
    return out


def _cpu_patch_sums(image: torch.Tensor, axes) -> torch.Tensor:
    """image (C, *spatial) -> (C * offsets,): for every kernel offset, the sum of the values that it meets."""
    for axis, (size, _, k, s, d, p, positions) in enumerate(axes[3 - (image.dim() - 1) :]):
        taken = image.new_zeros(size, k)  # taken[r, u] = 1 where offset u meets input position r
        for u in range(k):
            first = u * d - p
            skipped = max(0, -(first // s))
            taken[first + skipped * s : first + (positions - 1) * s + 1 : s, u] = 1 if first + skipped * s < size else 0
        image = torch.movedim(torch.tensordot(image, taken, dims=([axis + 1], [0])), -1, axis + 1)
    return image.flatten()


def cpu_conv_gram_supports(
    x, kernel_size, *, stride=1, padding=0, dilation=1, groups=1, ones_column=False, kfac_approx="expand",
    out=None, alpha=1.0, beta=0.0, precision="auto",
) -> str | None:  # fmt: skip
    if x.dtype not in _CPU_DTYPES:
        return _cpu_dtype_reason("x", x)
    if kfac_approx == "reduce":
        return "the kernel sums over positions; 'reduce' averages them first"
    if x.numel() == 0:
        return "x is empty"
    return None




# CUDA C++ kernels -----------------------------------------------------------------------------------------------------

_CUDA_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


def cuda_gram_supports(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, precision="auto") -> str | None:
    if x.dtype not in _CUDA_DTYPES:
        return f"x is {x.dtype}; the kernel reads float32, bfloat16 and float16 and sums in float32"
    if not x.is_cuda:
        return f"x is on {x.device.type}; the kernel reads the memory of a CUDA device"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the device's compute capability is below 8.0"
    if out is not None and x.numel() and x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
        return "out shares memory with x"
    return None


def cuda_gram_worthwhile(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, precision="auto") -> str | None:
    return "not yet measured on a GPU, so Triton's kernel is taken before it"


def cuda_gram(x, *, out=None, alpha=1.0, beta=0.0, ones_column=False, precision="auto"):
    """See `hvpfast.ops.gram`. float32 data are multiplied in full under every precision."""
    width = x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), width)
    if out is None:
        out = x.new_empty((width + bool(ones_column),) * 2, dtype=torch.float32)
    if not out.numel():
        return out
    module = _load("cuda")
    blocks = max(1, -(-width // module.gram_tile()))
    splits = _cuda_splits(blocks * (blocks + 1) // 2, len(rows), x.device)
    workspace = x.new_empty(module.gram_workspace(width, bool(ones_column), splits), dtype=torch.float32)
    module.gram(
        rows.data_ptr(), _CUDA_DTYPES[x.dtype], len(rows), width, *rows.stride(), out.data_ptr(), *out.stride(),
        alpha, beta, bool(ones_column), workspace.data_ptr(), splits, x.device.index or 0,
        torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    return out


def _cuda_splits(tiles: int, rows: int, device: torch.device) -> int:
    """Ranges of rows: enough blocks for two waves of the device, each of at least 1024 rows."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // tiles, rows // 1024, 64))
