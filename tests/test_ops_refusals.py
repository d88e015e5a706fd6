"""What every op refuses: each with the op's name, what was got, and what is needed."""

from __future__ import annotations

import pytest
import torch

from hvpfast import dispatch, ops

A, G = torch.zeros(4, 2, 5), torch.zeros(8, 2, 3)
PAIRED = (
    "sample_grads", "sample_norms_squared", "sample_dots", "weighted_grad", "second_moment", "rotated_second_moment",
    "sample_gram", "sample_statistics",
)  # fmt: skip
RZ = torch.zeros(5, dtype=torch.float64)
O, I, V = torch.zeros(3, 3), torch.zeros(5, 5), torch.zeros(3, 5)
THIRD = {
    "sample_dots": (torch.zeros(3, 5),),
    "weighted_grad": (torch.zeros(8),),
    "sample_statistics": (torch.zeros(8),),
    "rotated_second_moment": (torch.zeros(5, 5), torch.zeros(3, 3)),
}
IMAGE = torch.zeros(2, 4, 6, 6)
LOOKUP = torch.zeros(4, 2, dtype=torch.int64)
BAD: list[tuple[str, tuple, dict, type[Exception], str]] = [
    ("gram", ([[1.0]],), {}, TypeError, "x is a list; it must be a torch.Tensor"),
    ("gram", (torch.zeros(2, 3, dtype=torch.int64),), {}, TypeError, "x is torch.int64; .* convert it first"),
    ("gram", (torch.zeros(2, 3, dtype=torch.complex64),), {}, TypeError, "x is torch.complex64"),
    ("gram", (torch.tensor(1.0),), {}, ValueError, "x is a scalar"),
    ("gram", (A,), {"beta": 0.5}, ValueError, "beta is 0.5 but there is no out"),
    ("gram", (A,), {"mirror": False}, ValueError, "mirror is False but there is no out"),
    ("gram", (A,), {"out": torch.zeros(6, 6)}, ValueError, r"out has shape \(6, 6\); it must be \(5, 5\)"),
    ("gram", (A,), {"out": torch.zeros(5, 5), "ones_column": True}, ValueError, r"it must be \(6, 6\)"),
    ("gram", (A,), {"out": torch.zeros(5, 5).double()}, TypeError, "out is torch.float64; results for torch.float32"),
    ("gram", (A,), {"out": torch.zeros(5, 5, device="meta")}, ValueError, "out is on meta but the inputs are on cpu"),
    ("gram", (A.to("meta"),), {"out": torch.zeros(5, 5)}, ValueError, "out is on cpu but the inputs are on meta"),
    ("gram", (A,), {"out": torch.zeros(1, 5).expand(5, 5)}, ValueError, "out is an expanded view"),
    ("gram", (A,), {"out": [0.0]}, TypeError, "out is a list; it must be a torch.Tensor"),
    ("conv_gram", (torch.zeros(4, 6), 3), {}, ValueError, r"x has shape \(4, 6\); it must be \(N, C, \*spatial\)"),
    ("conv_gram", (IMAGE.int(), 3), {}, TypeError, "x is torch.int32; it must be a real floating dtype"),
    ("conv_gram", (IMAGE, 3), {"groups": 3}, ValueError, "x has 4 channels and groups is 3; groups must divide"),
    ("conv_gram", (IMAGE, 3), {"kfac_approx": "mean"}, ValueError, "kfac_approx is 'mean'; it must be 'expand' or"),
    ("conv_gram", (IMAGE, 3), {"beta": 1.0}, ValueError, "beta is 1.0 but there is no out"),
    ("conv_gram", (IMAGE, 3), {"out": torch.zeros(4, 4)}, ValueError, r"out has shape \(4, 4\); it must be \(36, 36\)"),
    ("sample_grads", (A, G), {"out": torch.zeros(4, 3, 5)}, ValueError, r"it must be \(8, 3, 5\)"),
    ("second_moment", (A, G), {"out": torch.zeros(5, 3)}, ValueError, r"it must be \(3, 5\)"),
    ("sample_dots", (A, G, torch.zeros(5, 3)), {}, ValueError, r"w has shape \(5, 3\); .*\(3, 5\)"),
    ("sample_dots", (A, G, torch.zeros(15)), {}, ValueError, r"w has shape \(15,\)"),
    ("sample_dots", (A, G, torch.zeros(3, 5).double()), {}, TypeError, "a is torch.float32 but w is torch.float64"),
    ("weighted_grad", (A, G, torch.zeros(4)), {}, ValueError, r"c has shape \(4,\); .* with M = 8"),
    ("weighted_grad", (A, G, torch.zeros(8, 1, 1)), {}, ValueError, r"c has shape \(8, 1, 1\)"),
    (
        "sample_statistics",
        (A, G, torch.zeros(8, 1)),
        {},
        ValueError,
        r"c has shape \(8, 1\); it must be \(M,\) with M = 8",
    ),
    ("rotated_second_moment", (A, G, O, O), {}, ValueError, r"qa has shape \(3, 3\); it must be \(5, 5\)"),
    ("rotated_second_moment", (A, G, I, I), {}, ValueError, r"qg has shape \(5, 5\); it must be \(3, 3\)"),
    ("rotated_second_moment", (A, G, I.half(), O), {}, TypeError, "a is torch.float32 but qa is torch.float16"),
    ("rotated_second_moment", (A, G, I, O), {"out": I}, ValueError, r"it must be \(3, 5\)"),
    ("matmul", (A, V), {}, ValueError, r"x has shape \(4, 2, 5\) and w \(3, 5\); .*\(R, I\) and \(I, O\): flatten"),
    ("matmul", (V, I), {"bias": O[0]}, ValueError, r"bias has shape \(3,\); it must be \(5,\)"),
    ("matmul", (V, I.double()), {}, TypeError, "x is torch.float32 but w is torch.float64"),
    ("convolve", (IMAGE, V), {}, ValueError, r"w \(3, 5\); they must be \(N, C, \*size\)"),
    (
        "convolve",
        (IMAGE, IMAGE[:, :3, :3, :3]),
        {},
        ValueError,
        "x has 4 channels but w, .* takes 3; groups are not taken",
    ),
    ("convolve", (IMAGE, IMAGE), {"padding": "same"}, ValueError, "padding is 'same'; it must be an int"),
    ("convolve", (IMAGE, IMAGE), {"bias": O[0]}, ValueError, r"bias has shape \(3,\); it must be \(2,\)"),
    ("convolve", (IMAGE, IMAGE.mT), {"size": (6, 6)}, ValueError, "x has 4 channels but w, .* takes 2"),
    ("convolve", (IMAGE[:, :2], IMAGE), {"size": (6,)}, ValueError, r"size is \(6,\); it must have 2 extents"),
    (
        "convolve",
        (IMAGE[:, :2], IMAGE),
        {"size": (12, 12)},
        ValueError,
        r"\(12, 12\) has \(7, 7\) positions but x has \(6, 6\)",
    ),
    ("linear_rop", (A, V, A, V), {}, ValueError, r"x has shape \(4, 2, 5\) and w \(3, 5\); .* flatten leading axes"),
    ("linear_rop", (I, V, I[:2], V), {}, ValueError, r"dx has shape \(2, 5\); .*= \(5, 5\)"),
    ("linear_rop", (I, V, I[None], V), {}, ValueError, r"dw has shape \(3, 5\); it must be \(1, 3, 5\)"),
    ("linear_rop", (I, V, I, V), {"db": I[0]}, ValueError, r"db has shape \(5,\); it must be \(3,\)"),
    ("linear_rop", (I, V, I, V.double()), {}, TypeError, "x is torch.float32 but dw is torch.float64"),
    ("activation_rop", (I, I, I), {"activation": "relu"}, ValueError, "activation is 'relu'; it must be one of gelu, "),
    ("norm_rop", (A, A, I[0]), {"c": A}, ValueError, r"x has shape \(4, 2, 5\); it must be \(P, I\): flatten"),
    ("sample_gram", (A, G, A), {}, ValueError, "only one of a2 and g2 is given"),
    ("sample_gram", (A, G, A[..., :4], G), {}, ValueError, "5 and 3 features but a2 and g2 4 and 3"),
    ("sample_gram", (A, G, A.double(), G.double()), {}, TypeError, "a is torch.float32 but a2 is torch.float64"),
    ("kron_apply", (I, V, I), {}, ValueError, r"left has shape \(5, 5\) for v \(3, 5\); it must be \(3, 3\)"),
    ("kron_apply", (O, V[0], I), {}, ValueError, r"v has shape \(5,\); it must be \(O, I\) or \(K, O, I\)"),
    ("kron_apply", ([O], [V], I), {}, ValueError, "left 1, v 1, right one tensor; give one tensor each, or lists"),
    ("kron_apply", ([O], [V, V], [I]), {}, ValueError, "left 1, v 2, right 1"),
    ("kron_apply", ([], [], []), {}, ValueError, "the lists are empty"),
    ("kron_apply", (O, V.double(), I), {}, TypeError, "v is torch.float64 but left is torch.float32"),
    ("kron_solve", (V, O, I, V.T, 0.1), {}, ValueError, r"eigenvalues has shape \(5, 3\); it must be \(3, 5\)"),
    ("kron_solve", (V, O, O, V, 0.1), {}, ValueError, r"qa has shape \(3, 3\)"),
    ("kron_solve", ([V], [O], [I], [V], [0.1, 0.2]), {}, ValueError, "damping has 2 entries"),
    ("softmax_hvp", (A, torch.zeros(4, 2, 6)), {}, ValueError, r"logits have shape \(4, 2, 5\) and v \(4, 2, 6\)"),
    ("softmax_hvp", (A, torch.zeros(5)), {}, ValueError, r"v \(5,\)"),
    ("softmax_hvp", (torch.tensor(1.0), torch.tensor(1.0)), {}, ValueError, r"logits have shape \(\)"),
    ("softmax_hvp", (A, A), {"weight": torch.zeros(4)}, ValueError, r"weight has shape \(4,\); it must be \(4, 2\)"),
    ("softmax_hvp", (A, A.half()), {}, TypeError, "logits is torch.float32 but v is torch.float16"),
    ("softmax_hvp", (A, A.to("meta")), {}, ValueError, "logits is on cpu but v is on meta"),
    (
        "reorthogonalize",
        (A, A),
        {},
        ValueError,
        r"w has shape \(4, 2, 5\) and basis \(4, 2, 5\); .* \(n,\) and \(k, n\)",
    ),
    ("cg_update", (V, V, V, V, RZ.float()), {}, TypeError, r"rz is torch.float32 \(5,\); it must be a float64 tensor"),
    ("cg_update", (V, V, V, V, RZ[:4]), {}, ValueError, r"x has shape \(3, 5\); its last axis must be rz's 4 columns"),
    (
        "cg_update",
        (V, V, O, V, RZ),
        {},
        ValueError,
        r"shapes \(3, 5\), \(3, 5\), \(3, 3\), \(3, 5\); they must be the same",
    ),
    ("cg_update", ([V], [V], [V, V], [V], RZ), {}, ValueError, "four lists as long as one another and not empty"),
    ("cg_update", ([], [], [], [], RZ), {}, ValueError, "four lists as long as one another and not empty"),
    ("reorthogonalize", ([A[0, 0]], [V, V]), {}, ValueError, "two lists as long as one another and not empty"),
    ("reorthogonalize", ([], []), {}, ValueError, "two lists as long as one another and not empty"),
    ("reorthogonalize", ([A[0, 0], A[0, 0]], [V, V[:2]]), {}, ValueError, "the tensors of basis have 3, 2 rows"),
    ("reorthogonalize", ([A[0]], [V]), {}, ValueError, r"w has shape \(2, 5\) and basis \(3, 5\)"),
    ("cg_update", (V, V, V, V.double(), RZ), {}, TypeError, "x is torch.float32 but q is torch.float64"),
    (
        "cg_update",
        (V.half(),) * 4 + (RZ,),
        {"inplace": True},
        TypeError,
        "x is torch.float16; only float32 and float64",
    ),
    ("reorthogonalize", (A[0, 0], V[:, :4]), {}, ValueError, r"w has shape \(5,\) and basis \(3, 4\)"),
    ("reorthogonalize", (A[0, 0], V.double()), {}, TypeError, "w is torch.float32 but basis is torch.float64"),
    ("softmax_root", (A, torch.zeros(4, 2, 6)), {}, ValueError, r"logits have shape \(4, 2, 5\) and v \(4, 2, 6\)"),
    ("softmax_root", (A, A), {"weight": torch.zeros(4)}, ValueError, r"weight has shape \(4,\); it must be \(4, 2\)"),
    ("softmax_sample", (A, A[..., 0].long()), {}, TypeError, "uniform is torch.int64"),
    ("softmax_sample", (A, A[..., 0].to("meta")), {}, ValueError, "logits are on cpu but uniform is on meta"),
    ("softmax_sample", (A, A), {}, ValueError, r"logits have shape \(4, 2, 5\) and uniform \(4, 2, 5\)"),
    ("softmax_sample", (A, A[0, 0, 0]), {}, ValueError, r"uniform \(\); they must be"),
    ("softmax_sample", (A, A[..., 0]), {"weight": A}, ValueError, r"weight has shape \(4, 2, 5\); it must be \(4, 2\)"),
    ("norm_sample_stats", (A, G), {}, ValueError, "x has 5 features but g has 3"),
    ("norm_sample_stats", (A, A[:3]), {}, ValueError, "a has 4 rows but g has 3"),
    ("norm_sample_stats", (A, A), {"kind": "batch"}, ValueError, "kind is 'batch'; it must be None, 'layer' or 'rms'"),
    ("norm_sample_stats", (A, A), {"kind": "rms", "rstd": A}, ValueError, "rstd is given and kind is 'rms'"),
    ("norm_sample_stats", (A, A), {"mean": A[0]}, ValueError, r"mean has shape \(2, 5\); it must be \(4, 2, 5\), or 1"),
    ("norm_sample_stats", (A, A), {"rstd": A.half()}, TypeError, "x is torch.float32 but rstd is torch.float16"),
    ("bias_sample_stats", (A[0],), {}, ValueError, r"g has shape \(2, 5\); it must be \(M, T, O\)"),
    ("bias_sample_stats", (A.long(),), {}, TypeError, "g is torch.int64"),
    *(
        (name, (g, indices, *rest), {}, kind, message)
        for name, rest in (("embedding_sample_norms", ()), ("embedding_second_moment", (7,)))
        for g, indices, kind, message in (
            (G, A[:, :, 0], TypeError, "indices is torch.float32; it must be a tensor of an integer dtype"),
            (G, [[0, 1]], TypeError, "indices is list"),
            (G, LOOKUP.to("meta"), ValueError, "g is on cpu but indices is on meta"),
            (G, LOOKUP[:, :1], ValueError, r"g has shape \(8, 2, 3\) and indices \(4, 1\); they must be \(M, T, D\)"),
            (G, LOOKUP[:3], ValueError, r"indices \(3, 2\); M must be a multiple of N"),
            (G.long(), LOOKUP, TypeError, "g is torch.int64"),
        )
    ),
    ("embedding_second_moment", (G, LOOKUP, -1), {}, ValueError, "rows is -1"),
    *(
        (name, arguments, {"out": torch.zeros(width, width), label: value}, TypeError, f"{name}: {label} is {message}")
        for name, arguments, width in (("gram", (A,), 5), ("conv_gram", (A, 3), 6))
        for label in ("alpha", "beta")
        for value, message in (
            ("a", "'a', a str; it must be a real number"),
            (None, "None, a NoneType"),
            (1 + 2j, r"\(1\+2j\), a complex"),
            ([1.0], r"\[1.0\], a list"),
            (torch.ones(2), r"a tensor of torch.float32, \(2,\); it must be one real number"),
            (torch.tensor(1j), r"a tensor of torch.complex64, \(\)"),
        )
    ),
    *(
        (name, (*pair, *THIRD.get(name, ())), {}, kind, f"{name}: {message}")
        for name in PAIRED
        for pair, kind, message in (
            ((A, torch.zeros(6, 2, 3)), ValueError, r"a has 4 rows but g has 6; .*g\[m\] pairs with a\[m % N\]"),
            ((torch.zeros(0, 2, 5), G), ValueError, "a has 0 rows but g has 8"),
            ((A[:, 0], G), ValueError, r"a has shape \(4, 5\) .*unsqueeze\(1\)"),
            ((A, torch.zeros(8, 3, 3)), ValueError, "a has T = 2 positions but g has 3"),
            ((A, G.double()), TypeError, "a is torch.float32 but g is torch.float64; convert one"),
            ((A, G.long()), TypeError, "g is torch.int64; it must be a real floating dtype"),
            ((A, G.to("meta")), ValueError, "a is on cpu but g is on meta; move one of them"),
            ((A, None), TypeError, "g is a NoneType"),
        )
    ),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "kind", "message"), BAD)
def test_bad_input_is_named(name, args, kwargs, kind, message):
    op = getattr(ops, name)
    for call in (op, op.on("reference"), op.choose, *(op.on(backend) for backend in op.backends)):
        with pytest.raises(kind, match=message) as caught:
            call(*args, **kwargs)
        assert str(caught.value).startswith(f"{name}: ")


def test_every_op_has_bad_input_tested():
    assert {name for name, *_ in BAD} == set(dispatch.OPS)
