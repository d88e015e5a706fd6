"""What `gpu.py` times: every kernel, its baselines in the same group, and the least flops and bytes that each must cost."""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

REHEARSAL = os.environ.get("HVPFAST_GPU_REHEARSAL") == "1"
if REHEARSAL:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from hvpfast import dispatch  # noqa: E402

sys.path.append(str(Path(__file__).parents[1]))  # after the installed hvpfast: for the other modules of bench
from bench.formulations import FORMULATIONS  # noqa: E402

DEVICE = "cpu" if REHEARSAL else "cuda"
BACKENDS = ("cpu", "triton") if REHEARSAL else ("triton", "cuda")

# (N, D) of gram, (N, T, I, O) of the norms: what the README's tables show.
GRAM = ((64, 48),) if REHEARSAL else ((32768, 768), (32768, 4096), (8192, 2048), (4096, 1024), (1024, 256))
NORMS = ((3, 4, 16, 16), (3, 1, 16, 16)) if REHEARSAL else (
    (256, 128, 4096, 4096), (32, 1024, 4096, 4096), (64, 256, 768, 3072), (64, 3136, 64, 64), (4096, 1, 4096, 4096),
)  # fmt: skip


class Timed(NamedTuple):
    """What is timed: `run`, its least flops and bytes, and what multiplies: the key of a ceiling, and how often."""

    group: str
    name: str
    run: Callable[[], object]
    flops: float
    bytes: float
    ceiling: str = "bf16"
    products: int = 1


def with_tf32(allowed: bool, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with torch's float32 products in TF32, or in full."""

    def called():
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            return run()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return called


def on(op: str, backend: str, precision: str, *args: Tensor, **kwargs) -> Callable[[], object] | None:
    """The op bound to a backend and precision, or None where it cannot run."""
    with dispatch.precision(precision):
        if dispatch.OPS[op].why_not(backend, *args, **kwargs) is not None:
            return None
    bound = dispatch.OPS[op].on(backend)

    def run():
        with dispatch.precision(precision):
            return bound(*args, **kwargs)

    return run


def kernels_of(op: str, group: str, flops: float, size: float, wide: tuple, narrow: tuple, **kwargs) -> Iterator[Timed]:
    """Each backend and precision of an op: on float32 arguments (`wide`) and on the same in bf16 (`narrow`)."""
    modes = (
        ("bf16", "auto", 1, "bf16"),
        ("fp32", "bf16x3", 3, "bf16"),
        ("fp32", "bf16", 1, "bf16"),
        ("fp32", "ieee", 1, "fp32"),
    )
    for backend in BACKENDS:
        for dtype, precision, products, ceiling in modes:
            run = on(op, backend, precision, *(narrow if dtype == "bf16" else wide), **kwargs)
            if run is not None:
                moved = size / 2 if dtype == "bf16" else size
                yield Timed(group, f"{backend} {dtype} {precision}", run, flops, moved, ceiling, products)


def compiled(
    group: str, call: Callable[..., object], args: tuple, kwargs: dict, flops: float, size: float
) -> Iterator[Timed]:
    """The reference under torch.compile, products in TF32."""
    if not REHEARSAL:
        made = torch.compile(call, dynamic=False)
        run = with_tf32(True, lambda: made(*args, **kwargs))
        yield Timed(group, "reference compiled tf32", run, flops, size, "tf32")


def formulations(op: str, group: str, args: tuple, kwargs: dict, flops: float, size: float) -> Iterator[Timed]:
    """torch's own ways to an op's result (bench/formulations.py), einsum left out: cuBLAS in bf16, TF32 and float32."""
    narrow, less = _converted(args), {key: _converted(value) for key, value in kwargs.items()}
    for name, call in FORMULATIONS.get(op, {}).items():
        if "einsum" in name:
            continue
        takes = inspect.signature(call).parameters
        plain = {key: value for key, value in {"out": None, "dilation": 1}.items() if key in takes}
        yield Timed(
            group, f"{name} bf16", lambda call=call, plain=plain: call(*narrow, **plain, **less), flops, size / 2
        )
        for tf32, ceiling in ((True, "tf32"), (False, "fp32")):
            run = with_tf32(tf32, lambda call=call, plain=plain: call(*args, **plain, **kwargs))
            yield Timed(group, f"{name} {ceiling}", run, flops, size, ceiling)


def gram_times(rows: int, width: int) -> Iterator[Timed]:
    group = f"gram N={rows} D={width}"
    x = torch.randn(rows, width, device=DEVICE)
    narrow, out = x.bfloat16(), torch.zeros(width, width, device=DEVICE)
    full, size, reference = 2 * rows * width**2, 4 * x.numel(), dispatch.OPS["gram"].reference
    yield Timed(group, "torch.mm bf16, bf16 out", lambda: narrow.T @ narrow, full, size / 2)
    yield Timed(group, "torch.mm tf32", with_tf32(True, lambda: torch.mm(x.T, x, out=out)), full, size, "tf32")
    yield Timed(group, "torch.mm fp32", with_tf32(False, lambda: torch.mm(x.T, x, out=out)), full, size, "fp32")
    yield Timed(
        group, "reference bf16", lambda: reference(narrow, out=out, alpha=0.1, beta=0.9), full, size / 2, "fp32"
    )
    blend = {"out": out, "alpha": 0.1, "beta": 0.9}
    yield from compiled(group, reference, (x,), blend, full, size)
    yield from kernels_of("gram", group, rows * width * (width + 1), size, (x,), (narrow,), **blend)


def norms_times(n: int, t: int, i: int, o: int) -> Iterator[Timed]:
    group = f"sample_norms_squared N={n} T={t} I={i} O={o}"
    a, g = torch.randn(n, t, i, device=DEVICE), torch.randn(n, t, o, device=DEVICE)
    narrow = a.bfloat16(), g.bfloat16()
    flops = 2 * n * (i + o) if t == 1 else n * t * min((t + 1) * (i + o), 2 * i * o)
    size, reference = 4 * (a.numel() + g.numel()), dispatch.OPS["sample_norms_squared"].reference
    left, right = narrow[1].flatten(0, 1), narrow[0].flatten(0, 1)
    yield Timed(group, "weight gradient, torch.mm bf16", lambda: left.T @ right, 2 * n * t * i * o, size / 2)
    yield Timed(group, "reference bf16", lambda: reference(*narrow), flops, size / 2, "fp32")
    yield Timed(group, "reference fp32", lambda: reference(a, g), flops, size, "fp32")
    yield from formulations("sample_norms_squared", group, (a, g), {}, flops, size)
    yield from compiled(group, reference, (a, g), {}, flops, size)
    yield from kernels_of("sample_norms_squared", group, flops, size, (a, g), narrow)


# Everything else: the op, its arguments in float32, its least products (half its flops) and its modes below.
_STATISTIC = ("bf16x3", 3), ("bf16", 1), ("ieee", 1)
_OPERATOR = ("auto", 6), ("bf16", 1), ("ieee", 1)  # "auto" is bf16x6 there
_CHAIN = ("auto", 6), ("bf16", 3), ("ieee", 1)  # and each step one finer


def op_times(
    op: str, group: str, args: tuple, products: float, size: float, modes: tuple = _STATISTIC, **kwargs
) -> Iterator[Timed]:
    """An op's reference (eager, TF32, compiled, bf16), then its kernels on float32 and on the same in bf16."""
    reference, flops = dispatch.OPS[op].reference, 2 * products
    narrow, less = _converted(args), {key: _converted(value) for key, value in kwargs.items()}
    yield Timed(group, "reference fp32", with_tf32(False, lambda: reference(*args, **kwargs)), flops, size, "fp32")
    yield Timed(group, "reference tf32", with_tf32(True, lambda: reference(*args, **kwargs)), flops, size, "tf32")
    yield Timed(group, "reference on bf16 data", lambda: reference(*narrow, **less), flops, size / 2, "fp32")
    yield from formulations(op, group, args, kwargs, flops, size)
    yield from compiled(group, reference, args, kwargs, flops, size)
    for backend in BACKENDS:
        for precision, times in modes:
            run = on(op, backend, precision, *args, **kwargs)
            if run is not None:
                ceiling = "fp32" if precision == "ieee" else "bf16"
                yield Timed(group, f"{backend} fp32 {precision}", run, flops, size, ceiling, times)
        run = on(op, backend, "auto", *narrow, **less)
        if run is not None:
            yield Timed(group, f"{backend} bf16 auto", run, flops, size / 2, "bf16", 1)


def _converted(values):
    if isinstance(values, Tensor):
        return values.bfloat16() if values.is_floating_point() else values
    return type(values)(map(_converted, values)) if isinstance(values, (tuple, list)) else values


def pair_times(op: str, n: int, t: int, i: int, o: int) -> Iterator[Timed]:
    """Ops of a (N, T, I) and g (N, T, O)."""
    a, g = torch.randn(n, t, i, device=DEVICE), torch.randn(n, t, o, device=DEVICE)
    products, size = n * t * i * o, 4 * (a.numel() + g.numel() + i * o)
    args, modes = (a, g), _STATISTIC
    if op == "sample_dots":
        args, modes = (a, g, torch.randn(1, o, i, device=DEVICE)), _CHAIN
    elif op == "weighted_grad":
        args, modes = (a, g, torch.randn(n, 1, device=DEVICE)), _OPERATOR
    elif op == "sample_statistics":
        args, size = (a, g, torch.randn(n, device=DEVICE)), size + 4 * i * o
    elif op == "rotated_second_moment":
        args = (a, g, *(torch.linalg.qr(torch.randn(f, f, device=DEVICE))[0] for f in (i, o)))
        products += n * t * (i * i + o * o)
    elif op == "sample_gram":
        products = n * (n + 1) // 2 * t * t * (i + o) if t * (i + o) < 2 * i * o / t else n * n * i * o // 2
        size = 4 * (a.numel() + g.numel() + n * n)
    elif op == "sample_grads":
        size = 4 * (a.numel() + g.numel() + n * i * o)
    yield from op_times(op, f"{op} N={n} T={t} I={i} O={o}", args, products, size, modes)


def rop_times(p: int, i: int, o: int, k: int) -> Iterator[Timed]:
    """linear_rop, beside cuBLAS's two products and their sum."""
    x, w, dx, dw = (torch.randn(*shape, device=DEVICE) for shape in ((p, i), (o, i), (k, p, i), (k, o, i)))
    group, products = f"linear_rop P={p} I={i} O={o} K={k}", 2 * k * p * o * i
    db, size = torch.randn(k, o, device=DEVICE), 4 * (x.numel() + w.numel() + dx.numel() + dw.numel() + k * p * o)
    yield from op_times("linear_rop", group, (x, w, dx, dw), products, size, _OPERATOR, db=db)


def activation_times(rows: int, features: int) -> Iterator[Timed]:
    """activation_rop of a GELU, beside autograd's double backward of a kept graph; then norm_rop of a LayerNorm."""
    x, g, c = (torch.randn(rows, features, device=DEVICE) for _ in range(3))
    group, size = f"activation_rop gelu {rows}x{features}", 4 * 5 * x.numel()
    yield from op_times("activation_rop", group, (x, g, c), 20 * x.numel(), size, (("auto", 1),), activation="gelu")
    w, c_weight, c_bias = (torch.randn(features, device=DEVICE) for _ in range(3))
    mean, rstd = x.mean(1), (x.var(1, correction=0) + 1).rsqrt()  # eps = 1, as make_inputs has it
    given = {"c": c, "mean": mean, "weight": w, "c_weight": c_weight, "c_bias": c_bias}
    yield from op_times(
        "norm_rop", f"norm_rop layer {rows}x{features}", (x, g, rstd), 20 * x.numel(), size, (("auto", 1),), **given
    )


def conv_times(n: int, c: int, side: int, kernel: int, stride: int, groups: int) -> Iterator[Timed]:
    """conv_gram, its floor the products of the boxes (conv_plan.py), or of half the patches' Gram matrix for few channels."""
    from hvpfast.kernels import conv_plan
    from hvpfast.kernels.native import _cpu_convolution as convolution

    x = torch.randn(n, c, side, side, device=DEVICE)
    how = {"stride": stride, "padding": kernel // 2, "groups": groups}
    axes, of_group, positions, features, _ = convolution(x.shape, kernel, stride, kernel // 2, 1, groups)
    boxes, _, _ = conv_plan.boxes_of(axes)
    pixels = sum(math.prod(run.count for run in box.runs) / (1 if any(box.delta) else 2) for box in boxes)
    products = n * groups * min(pixels * of_group**2, positions * features**2 / 2)
    size = 4 * (x.numel() + groups * features**2)
    group = f"conv_gram {kernel}x{kernel}/{stride} N={n} C={c} {side}x{side} groups={groups}"
    yield from op_times("conv_gram", group, (x, kernel), products, size, **how)


def softmax_times(rows: int, classes: int, columns: int) -> Iterator[Timed]:
    logits, v = torch.randn(rows, classes, device=DEVICE), torch.randn(columns, rows, classes, device=DEVICE)
    size = 4 * (logits.numel() + 2 * v.numel())
    modes = (("auto", 1),)
    group = f"softmax_hvp rows={rows} C={classes} K={columns}"
    weight = torch.ones(rows, device=DEVICE)
    yield from op_times("softmax_hvp", group, (logits, v), 3 * v.numel(), size, modes, weight=weight)
    yield from op_times("softmax_root", group.replace("hvp", "root"), (logits, v), 3 * v.numel(), size, modes)
    u = torch.rand(columns, rows, device=DEVICE)
    size = 4 * (logits.numel() + v.numel())
    yield from op_times("softmax_sample", group.replace("hvp", "sample"), (logits, u), v.numel(), size, modes)


def eigh_times(batch: int, n: int) -> Iterator[Timed]:
    """Eigendecompositions: torch's and cuSOLVER's batched one, whichever of them torch calls by itself. No floor: 9 n^3 flops
    and one pass are what they need, not what an iteration can do."""
    from hvpfast.kernels import eigh_batched

    x = torch.randn(batch, n, n, device=DEVICE)
    a, group = x @ x.mT, f"eigh B={batch} n={n}"
    flops, size = 9 * batch * n**3, 8 * a.numel()
    yield Timed(group, "torch.linalg.eigh fp32", lambda: torch.linalg.eigh(a), flops, size, "fp32")
    if not REHEARSAL and not isinstance(eigh_batched._library(), str):
        solver = eigh_batched._solver(a.device.index)
        stream = torch.cuda.current_stream().cuda_stream
        yield Timed(group, "cusolverDnXsyevBatched fp32", lambda: solver.eigh(a, stream), flops, size, "fp32")


def krylov_times(count: int, length: int) -> Iterator[Timed]:
    """reorthogonalize; its floor reads the basis three times, twice being needed and once to spare the cache."""
    w = torch.randn(length, device=DEVICE)
    basis = torch.randn(count, length, device=DEVICE).div_(length**0.5)  # as good as orthonormal, for the time
    reference = dispatch.OPS["reorthogonalize"].reference
    group, flops, size = f"reorthogonalize k={count} n={length}", 8 * count * length, 4 * length * (3 * count + 4)
    yield Timed(group, "reference fp32", lambda: reference(w, basis), flops, size, "fp32")
    yield from compiled(group, reference, (w, basis), {}, flops, size)
    for backend in BACKENDS:
        run = on("reorthogonalize", backend, "auto", w, basis)
        if run is not None:
            yield Timed(group, f"{backend} fp32", run, flops, size, "fp32")
        lists = (
            list(w.chunk(100)),
            list(basis.chunk(100, 1)),
        )  # as a model's parameters lie, but for their memory's gaps
        run = on("reorthogonalize", backend, "auto", *lists)
        if run is not None:
            yield Timed(group, f"{backend} fp32, {len(lists[0])} tensors", run, flops, size, "fp32")


def cg_times(tensors: int, length: int) -> Iterator[Timed]:
    """cg_update on a list of tensors, in place; its floor reads eight vectors and writes three."""
    x, r, p, q = ([torch.randn(length // tensors, device=DEVICE) for _ in range(tensors)] for _ in range(4))
    rz, elements = sum(one.double().square().sum() for one in r), tensors * (length // tensors)
    group, flops, size = f"cg_update {tensors} tensors n={length}", 10 * elements, 4 * 11 * elements
    reference = dispatch.OPS["cg_update"].reference
    yield Timed(group, "reference fp32", lambda: reference(x, r, p, q, rz, inplace=True), flops, size, "fp32")
    yield from compiled(group, reference, (x, r, p, q, rz), {"inplace": True}, flops, size)
    yield Timed(group, "torch._foreach fp32", lambda: _cg_by_foreach(x, r, p, q, rz), flops, size, "fp32")
    for backend in BACKENDS:
        run = on("cg_update", backend, "auto", x, r, p, q, rz, inplace=True)
        if run is not None:
            yield Timed(group, f"{backend} fp32", run, flops, size, "fp32")


def _cg_by_foreach(x: list[Tensor], r: list[Tensor], p: list[Tensor], q: list[Tensor], rz: Tensor) -> None:
    """torch's own multi-tensor kernels, sums in float32."""
    curvature = torch.stack([one.sum() for one in torch._foreach_mul(p, q)]).sum()
    rate = (rz / curvature).float()
    torch._foreach_add_(x, torch._foreach_mul(p, rate))
    torch._foreach_sub_(r, torch._foreach_mul(q, rate))
    rr = torch.stack(torch._foreach_norm(r)).square().sum()
    torch._foreach_mul_(p, (rr / rz).float())
    torch._foreach_add_(p, r)


def norm_stats_times(n: int, t: int, i: int) -> Iterator[Timed]:
    """LayerNorm's statistics, beside autograd's backward pass and a reduction of each sample's gradients."""
    x, g = torch.randn(n, t, i, device=DEVICE), torch.randn(n, t, i, device=DEVICE)
    group, size = f"norm_sample_stats N={n} T={t} I={i}", 4 * (x.numel() + g.numel())
    for name, a, slope in (("fp32", x, g), ("bf16", x.bfloat16(), g.bfloat16())):
        leaf = a.clone().requires_grad_()
        scale, shift = (torch.ones(n, 1, i, device=DEVICE, dtype=a.dtype, requires_grad=True) for _ in range(2))
        out = torch.nn.functional.layer_norm(leaf, (i,)) * scale + shift

        def by_autograd(out=out, inputs=(scale, shift), slope=slope):
            rows = torch.autograd.grad(out, inputs, slope, retain_graph=True)
            return [x.float().square().sum(axes) for x in rows for axes in ((1, 2), (0, 1))]

        yield Timed(
            group, f"autograd and reduction {name}", by_autograd, 0, size if name == "fp32" else size / 2, "fp32"
        )
    yield from op_times("norm_sample_stats", group, (x, g), 4 * x.numel(), size, (("auto", 1),), kind="layer", eps=1e-5)
    yield from op_times(
        "bias_sample_stats", group.replace("norm", "bias"), (g,), g.numel() / 2, size / 2, (("auto", 1),)
    )


def lookup_times(n: int, t: int, rows: int, width: int) -> Iterator[Timed]:
    g, indices = torch.randn(n, t, width, device=DEVICE), torch.randint(0, rows, (n, t), device=DEVICE)
    shape, size = f"N={n} T={t} rows={rows} D={width}", 4 * g.numel()
    modes = (("auto", 1),)
    yield from op_times(
        "embedding_sample_norms", f"embedding_sample_norms {shape}", (g, indices), g.numel(), size, modes
    )
    group, size = f"embedding_second_moment {shape}", size + 4 * rows * width
    yield from op_times("embedding_second_moment", group, (g, indices, rows), g.numel(), size, modes)


def kron_times(op: str, layers: int, features: int) -> Iterator[Timed]:
    def draw() -> list[Tensor]:
        return [torch.randn(features, features, device=DEVICE) / features**0.5 for _ in range(layers)]

    v, left, right = draw(), draw(), draw()
    solve = op == "kron_solve"
    args = (v, left, right, [x.square() for x in draw()], 1e-3) if solve else (left, v, right)
    products, size = (4 if solve else 2) * layers * features**3, 4 * (5 if solve else 4) * layers * features**2
    yield from op_times(op, f"{op} layers={layers} I=O={features}", args, products, size, _CHAIN)


PAIRS = ("second_moment", "sample_statistics", "rotated_second_moment", "weighted_grad", "sample_dots", "sample_grads")
ALL: tuple[tuple[Callable, tuple], ...] = (
    (gram_times, GRAM),
    (norms_times, NORMS),
    (conv_times, ((2, 16, 5, 3, 1, 1), (1, 3, 6, 3, 2, 1)) if REHEARSAL else (
        (32, 64, 56, 3, 1, 1), (32, 256, 14, 3, 1, 1), (32, 128, 28, 3, 2, 1), (64, 3, 224, 7, 2, 1), (32, 512, 14, 3, 1, 512),
    )),
    (pair_times, tuple((op, 3, 4, 16, 16) for op in (*PAIRS, "sample_gram")) if REHEARSAL else (
        *((op, 64, 256, 1024, 1024) for op in PAIRS), ("second_moment", 4096, 1, 2048, 2048),
        ("sample_gram", 4096, 1, 4096, 4096), ("sample_gram", 256, 64, 1024, 1024),
    )),
    (rop_times, ((20, 17, 33, 2),) if REHEARSAL else ((8192, 768, 3072, 1), (8192, 4096, 4096, 1), (4096, 1024, 1024, 8))),
    (activation_times, ((3, 20),) if REHEARSAL else ((16384, 768), (8192, 4096), (1024, 1024))),
    (softmax_times, ((3, 20, 2),) if REHEARSAL else (
        (4096, 128 * 1024, 1), (8192, 1000, 4), (262144, 10, 1), (16, 128 * 1024, 1),
    )),
    (eigh_times, ((3, 40),) if REHEARSAL else ((256, 32), (256, 64), (128, 100), (16, 512))),
    (krylov_times, ((3, 40),) if REHEARSAL else ((8, 1 << 26), (64, 1 << 24), (400, 1 << 21))),
    (cg_times, ((3, 40),) if REHEARSAL else ((1, 1 << 26), (150, 1 << 26), (60, 1 << 22))),
    (norm_stats_times, ((3, 4, 16),) if REHEARSAL else ((32, 1024, 4096), (64, 256, 768), (8, 4096, 8192))),
    (lookup_times, ((3, 4, 5, 16),) if REHEARSAL else ((32, 1024, 50257, 768), (256, 128, 30522, 1024))),
    (kron_times, tuple((op, 2, 20) for op in ("kron_apply", "kron_solve")) if REHEARSAL else tuple(
        (op, 48, features) for op in ("kron_apply", "kron_solve") for features in (256, 1024)
    )),
)  # fmt: skip
