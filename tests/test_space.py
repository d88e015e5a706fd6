"""Named tensors as one flat vector and back: every form, as views where it can be, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvpfast.space import Space

NAMED = {"w": torch.zeros(2, 3), "b": torch.zeros(2), "scale": torch.zeros(()), "none": torch.zeros(0, 4)}
SPACE = Space(NAMED)
SHAPES = {name: tuple(x.shape) for name, x in NAMED.items()}


def flat(k: int | None = None) -> torch.Tensor:
    return torch.arange(9.0) if k is None else torch.arange(9.0 * k).reshape(9, k)


def named(v: torch.Tensor) -> dict[str, torch.Tensor]:
    """The oracle: cut by hand, row-major."""
    tail = v.shape[1:]
    return {
        "w": v[:6].reshape(2, 3, *tail),
        "b": v[6:8].reshape(2, *tail),
        "scale": v[8].reshape(tail),
        "none": v[:0].reshape(0, 4, *tail),
    }


def test_facts():
    assert SPACE.size == 9 and SPACE.names == ("w", "b", "scale", "none") and SPACE.sizes == (6, 2, 1, 0)
    assert SPACE.dtype is torch.float32 and SPACE.device.type == "cpu"
    mixed = Space({"x": torch.zeros(2, dtype=torch.bfloat16), "y": torch.zeros(1, dtype=torch.float16)})
    assert mixed.dtype is torch.float32
    assert Space({"x": torch.zeros(2), "y": torch.zeros(1).double()}).dtype is torch.float64


@pytest.mark.parametrize("k", (None, 1, 3))
@pytest.mark.parametrize("form", ("flat", "dict", "reversed dict", "list", "tuple"))
def test_forms_round_trip(form, k):
    v = flat(k)
    parts = named(v)
    given = {
        "flat": v,
        "dict": parts,
        "reversed dict": dict(reversed(list(parts.items()))),
        "list": list(parts.values()),
        "tuple": tuple(parts.values()),
    }[form]
    rows, restore = SPACE.rows(given, "A @ v")
    assert rows.shape == (k or 1, 9)
    assert torch.equal(rows, v[None] if k is None else v.T)
    back = restore(2 * rows)
    if form == "flat":
        assert back.shape == v.shape and torch.equal(back, 2 * v)
        return
    assert type(back) is (dict if "dict" in form else type(given))
    items = back if isinstance(back, dict) else dict(zip(SPACE.names, back, strict=True))
    assert list(items) == list(SPACE.names)
    for name, part in parts.items():
        assert items[name].shape == part.shape and torch.equal(items[name], 2 * part), name


@pytest.mark.parametrize("k", (1, 3))
def test_split_and_join_are_inverse(k):
    rows = torch.randn(k, 9, generator=torch.Generator().manual_seed(0))
    parts = SPACE.split(rows)
    assert [tuple(p.shape) for p in parts] == [(k, *shape) for shape in SHAPES.values()]
    assert torch.equal(SPACE.join(parts, k, rows.dtype), rows)
    parts[0].zero_()
    assert not rows[:, :6].any() and rows[:, 6:].any()  # the parts are views
    assert torch.equal(SPACE.join([None, *parts[1:]], k, torch.float64)[:, :6], torch.zeros(k, 6).double())


def test_split_gives_each_tensor_its_dtype():
    space = Space({"x": torch.zeros(2, dtype=torch.bfloat16), "y": torch.zeros(1).double()})
    rows = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    x, y = space.split(rows)
    assert (x.dtype, y.dtype) == (torch.bfloat16, torch.float64)
    assert torch.equal(space.join([x, y], 1, torch.float64), rows)


def test_vectors_are_taken_without_their_history():
    v = flat().requires_grad_()
    rows, restore = SPACE.rows(v, "A @ v")
    assert not rows.requires_grad and not restore(rows).requires_grad
    assert SPACE.rows(v, "A @ v")[0].data_ptr() == v.data_ptr()
    strided = flat(2)[:, 1]
    assert torch.equal(SPACE.rows(strided, "A @ v")[0][0], strided)


@pytest.mark.parametrize(
    ("v", "kind", "message"),
    (
        (torch.zeros(8), ValueError, r"the vector has shape \(8,\); it must be \(P,\) or \(P, K\) with P = 9"),
        (torch.zeros(3, 9), ValueError, r"has shape \(3, 9\)"),
        (torch.zeros(9, 1, 1), ValueError, r"has shape \(9, 1, 1\)"),
        (torch.tensor(1.0), ValueError, r"has shape \(\)"),
        (torch.zeros(9, dtype=torch.int64), TypeError, "the vector is torch.int64; it must be a real floating dtype"),
        (torch.zeros(9, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(9, device="meta"), ValueError, "the vector is on meta but the parameters are on cpu"),
        (np.zeros(9), TypeError, "got a ndarray; it must be a tensor"),
        (1.0, TypeError, "got a float"),
        ([flat()], ValueError, "got 1 tensors; there are 4 parameters"),
        ([1.0, 2.0, 3.0, 4.0], TypeError, "the list holds a float"),
        ({"w": NAMED["w"]}, ValueError, r"missing \['b', 'none', 'scale'\], unknown none"),
        ({**NAMED, "extra": flat()}, ValueError, r"missing none, unknown \['extra'\]"),
        ({**NAMED, "b": torch.zeros(3)}, ValueError, r"the tensor for 'b' has shape \(3,\); it must be \(2,\)"),
        ({**NAMED, "b": torch.zeros(2, 3)}, ValueError, r"the tensor for 'b' has shape \(2, 3\)"),
        ({**NAMED, "b": torch.zeros(2, device="meta")}, ValueError, "on meta"),
    ),
)
def test_what_does_not_fit_is_named(v, kind, message):
    with pytest.raises(kind, match=message) as caught:
        SPACE.rows(v, "A @ v")
    assert str(caught.value).startswith("A @ v: ")
