"""Where the samples lie in every tensor behind the model's output, told from the graph's nodes: nothing is computed.

A tensor's numbers, in their row-major order, are indexed by (a, n, b): n the sample, `Place(outer, inner)` the extents of a
and b. Views keep that order; the nodes below keep samples apart, each in the axis where they are. Any other node ends the
attempt: what samples share is then found out by running gradients back (see `rows`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

if TYPE_CHECKING:
    from hvpfast.capture.tape import Tape


class Place(NamedTuple):
    """The extents before and behind the samples' in the row-major order."""

    outer: int
    inner: int


class Axis(NamedTuple):
    """The axis of a shape that holds the samples, and the extents within it before and behind theirs."""

    number: int
    outer: int
    inner: int


Shape = Sequence[int]
Follow = Callable[
    [Node, Axis, int, Shape, int, Shape], "Axis | None"
]  # node, axis, N, its shape, which input, input's shape
_FOLLOW: dict[str, Follow] = {}
_VIEWS = frozenset(
    "ViewBackward0 UnsafeViewBackward0 ReshapeAliasBackward0 UnsqueezeBackward0 SqueezeBackward0 SqueezeBackward1 "
    "SqueezeBackward2 CloneBackward0 ToCopyBackward0 AliasBackward0".split()
)


def _nodes(names: str) -> Callable[[Follow], Follow]:
    def register(follow: Follow) -> Follow:
        _FOLLOW.update(dict.fromkeys(names.split(), follow))
        return follow

    return register


def _same(axis: Axis, shape: Shape, number: int, given: Shape) -> Axis | None:
    """The axis as number `number` of an input, where it is as long there."""
    fine = 0 <= number < len(given) and given[number] == shape[axis.number]
    return axis._replace(number=number) if fine else None


def _dims(given: object, axes: int) -> list[int]:
    """A node's saved axes, which count from behind as unsigned numbers, counted from the front."""
    numbers = given if isinstance(given, (tuple, list)) else (given,)
    return [(d - (1 << 64) if d >= 1 << 63 else d) % axes for d in numbers]


@_nodes(
    "AddBackward0 SubBackward0 RsubBackward1 MulBackward0 DivBackward0 NegBackward0 PowBackward0 PowBackward1 ExpBackward0 "
    "LogBackward0 SqrtBackward0 RsqrtBackward0 AbsBackward0 SinBackward0 CosBackward0 ErfBackward0 ReciprocalBackward0 "
    "ReluBackward0 ThresholdBackward0 LeakyReluBackward0 EluBackward0 GeluBackward0 SiluBackward0 MishBackward0 TanhBackward0 "
    "SigmoidBackward0 SoftplusBackward0 HardtanhBackward0 HardswishBackward0 HardsigmoidBackward0 LogSigmoidBackward0 "
    "ClampBackward1 ClampMinBackward0 ClampMaxBackward0 WhereBackward0 MaskedFillBackward0 ExpandBackward0 _ActivationBackward"
)
def _elementwise(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    return _same(axis, shape, axis.number - (len(shape) - len(given)), given)


@_nodes("TransposeBackward0")
def _transposed(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    one, other = _dims((node._saved_dim0, node._saved_dim1), len(shape))
    return _same(axis, shape, {one: other, other: one}.get(axis.number, axis.number), given)


@_nodes("PermuteBackward0")
def _permuted(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    return _same(axis, shape, _dims(node._saved_dims, len(shape))[axis.number], given)


@_nodes("TBackward0")
def _turned(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    return _same(axis, shape, len(shape) - 1 - axis.number, given)


@_nodes("MeanBackward1 SumBackward1 AmaxBackward0 AminBackward0 VarBackward0 StdBackward0 LinalgVectorNormBackward0")
def _reduced(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    if node._saved_dim is None:
        return None
    gone = _dims(node._saved_dim, len(given))
    if node._saved_keepdim:
        return None if axis.number in gone else _same(axis, shape, axis.number, given)
    left = [d for d in range(len(given)) if d not in gone]
    return _same(axis, shape, left[axis.number], given)


@_nodes(
    "SoftmaxBackward0 LogSoftmaxBackward0 SliceBackward0 SplitBackward0 SplitWithSizesBackward0 UnsafeSplitBackward0 CatBackward0"
)
def _along_others(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    return None if axis.number in _dims(node._saved_dim, len(shape)) else _same(axis, shape, axis.number, given)


@_nodes("SelectBackward0 UnbindBackward0")
def _selected(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    (gone,) = _dims(node._saved_dim, len(given))
    return _same(axis, shape, axis.number + (gone <= axis.number), given)


@_nodes("StackBackward0")
def _stacked(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    (new,) = _dims(node._saved_dim, len(shape))
    return None if axis.number == new else _same(axis, shape, axis.number - (new < axis.number), given)


@_nodes("NativeLayerNormBackward0 _NormBackward")
def _normalised(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    over = node.shape if node.name() == "_NormBackward" else node._saved_normalized_shape  # rows_twice's, or torch's
    outside = which == 0 and axis.number < len(shape) - len(over)
    return _same(axis, shape, axis.number, given) if outside else None


@_nodes("AddmmBackward0 MmBackward0")
def _product(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    """Rows of the first factor; an added term is taken where it has them too."""
    inputs = len(node.next_functions)  # mm: the factors; addmm: what is added, and they
    rows = which == inputs - 2 or (which == inputs - 3 and given == shape)
    return _same(axis, shape, 0, given) if axis.number == 0 and rows else None


@_nodes("_LinearBackward")
def _linear(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    """The package's own (see `statistics_precision`): all axes but the last are rows."""
    return _same(axis, shape, axis.number, given) if which == 0 and axis.number < len(shape) - 1 else None


@_nodes("BmmBackward0")
def _products(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    return _same(axis, shape, 0, given) if axis.number == 0 else None


@_nodes(
    "ScaledDotProductFlashAttentionForCpuBackward0 ScaledDotProductFlashAttentionBackward0 "
    "ScaledDotProductEfficientAttentionBackward0 ScaledDotProductCudnnAttentionBackward0"
)
def _attention(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    return _same(axis, shape, axis.number, given) if axis.number < 2 and which < 3 else None


@_nodes(
    "ConvolutionBackward0 _ConvolutionBackward MaxPool2DWithIndicesBackward0 MaxPool3DWithIndicesBackward0 "
    "AvgPool2DBackward0 AvgPool3DBackward0 "
    "AdaptiveAvgPool2DBackward0 AdaptiveAvgPool3DBackward0 ConstantPadNdBackward0 ReflectionPad1DBackward0 "
    "ReflectionPad2DBackward0 ReplicationPad1DBackward0 ReplicationPad2DBackward0 UpsampleNearest2DBackward0 "
    "UpsampleBilinear2DBackward0 NativeGroupNormBackward0 NativeBatchNormBackward0"
)
def _images(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    """Image by image: the samples in the first axis, nothing else in it, and no statistics of the batch."""
    whole = (
        axis == Axis(0, 1, 1)
        and len(given) == len(shape)
        and which == 0
        and not getattr(node, "_saved_training", False)
    )
    return _same(axis, shape, 0, given) if whole else None


@_nodes("NllLossBackward0 NllLoss2DBackward0 MseLossBackward0 BinaryCrossEntropyWithLogitsBackward0")
def _losses(node: Node, axis: Axis, n: int, shape: Shape, which: int, given: Shape) -> Axis | None:
    """Of every sample by itself: without a reduction."""
    return _same(axis, shape, 0, given) if axis.number == 0 and node._saved_reduction == 0 and which == 0 else None


def _axis(place: Place, n: int, shape: Shape) -> Axis | None:
    """The axis that holds all samples of a tensor of this shape, or None where several share them."""
    before = 1
    for number, size in enumerate(shape):
        if size % n == 0 and place.outer % before == 0:
            outer = place.outer // before
            if size % (outer * n) == 0:
                found = Axis(number, outer, size // (outer * n))
                if math.prod(shape[number + 1 :]) * found.inner == place.inner:
                    return found
        before *= size
    return None


def _place(axis: Axis, shape: Shape) -> Place:
    return Place(math.prod(shape[: axis.number]) * axis.outer, axis.inner * math.prod(shape[axis.number + 1 :]))


def scattered_calls(tape: Tape, output: Tensor, n: int) -> set[int] | None:
    """Calls behind `output` (rows of N samples in order) whose rows, over the batch's axis and all positions, are not N equal
    parts in the order of the samples; None where the nodes do not tell, or some row serves several samples."""
    numbers: dict[tuple[Node, int], list[int]] = {}
    for i, call in enumerate(tape.calls):
        numbers.setdefault((call.edge.node, call.edge.output_nr), []).append(i)
    if output.grad_fn is None or not output.numel() or output.shape[0] % n:
        return None
    start = (output.grad_fn, output.output_nr)
    places: dict[tuple[Node, int], Place | None] = {
        start: Place(1, output.numel() // n)
    }  # None: the same for all samples
    waiting, scattered = [start], set()
    while waiting:
        key = waiting.pop()
        (node, nr), place = key, places[key]
        shape = tuple(node._input_metadata[nr].shape)
        axis = None if place is None else _axis(place, n, shape)
        for number in numbers.get(key, ()):
            call = tape.calls[number]
            rows = call.row_axes
            if call.weight is None and call.bias is None:
                continue  # no parameter's: frozen, or another call stands for it
            if place is None or (rows is not None and (axis is None or axis.number >= rows)):
                return None
            if rows is not None and place.outer > 1:
                scattered.add(number)
        for which, (following, index) in enumerate(node.next_functions):
            if following is None or following.name() == "torch::autograd::AccumulateGrad":
                continue
            given, there = tuple(following._input_metadata[index].shape), None
            if place is not None and node.name() in _VIEWS:
                there = place if math.prod(given) == math.prod(shape) else None
            elif axis is not None and node.name() in _FOLLOW:
                found = _FOLLOW[node.name()](node, axis, n, shape, which, given)
                there = None if found is None else _place(found, given)
            # What is not followed may be shared by the samples or mix them: no call may be behind it.
            after = (following, index)
            if after not in places:
                places[after] = there
                waiting.append(after)
            elif places[after] != there:
                return None
    return scattered
