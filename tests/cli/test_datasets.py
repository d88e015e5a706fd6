"""The IDX reader and the demo's data, on files that the tests write."""

import gzip

import numpy as np
import pytest
from cli.idx_files import TYPES, idx

from hvpfast.cli.datasets import digits, mnist, read_idx
from hvpfast.cli.errors import UserError


def arrays(train=7, test=3, side=4):
    rng = np.random.default_rng(0)
    return {
        "train-images{}idx3-ubyte": rng.integers(0, 256, (train, side, side), dtype=np.uint8),
        "train-labels{}idx1-ubyte": rng.integers(0, 10, (train,), dtype=np.uint8),
        "t10k-images{}idx3-ubyte": rng.integers(0, 256, (test, side, side), dtype=np.uint8),
        "t10k-labels{}idx1-ubyte": rng.integers(0, 10, (test,), dtype=np.uint8),
    }


def write(folder, joint="-", packed=False, **changes):
    made = {**arrays(), **changes}
    for name, array in made.items():
        raw = idx(array)
        path = folder / (name.format(joint) + (".gz" if packed else ""))
        path.write_bytes(gzip.compress(raw) if packed else raw)
    return made


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_idx(tmp_path, kind):
    array = (np.arange(24).reshape(2, 3, 4) - (0 if kind is np.uint8 else 7)).astype(kind)
    (tmp_path / "x").write_bytes(idx(array))
    found = read_idx(tmp_path / "x")
    assert found.dtype == array.dtype and found.dtype.isnative
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_files(tmp_path, joint, packed):
    made = write(tmp_path, joint, packed)
    found = mnist(tmp_path)
    assert found.x_train.shape == (7, 16) and found.x_test.shape == (3, 16)
    train = made["train-images{}idx3-ubyte"].reshape(7, 16) / 255
    np.testing.assert_allclose(found.x_train.numpy(), train - train.mean(0), atol=1e-6)
    test = made["t10k-images{}idx3-ubyte"].reshape(3, 16) / 255
    np.testing.assert_allclose(found.x_test.numpy(), test - train.mean(0), atol=1e-6)
    np.testing.assert_array_equal(found.y_train.numpy(), made["train-labels{}idx1-ubyte"])
    (tmp_path / "again").mkdir()
    write(tmp_path / "again")
    assert mnist(tmp_path / "again").digest == found.digest


def test_malformed_files_say_what_is_wrong(tmp_path):
    good = idx(np.zeros((2, 3), np.uint8))
    cases = {
        b"": "starts with nothing",
        b"\x89PNG....": "no IDX magic number",
        b"\0\0\x07\x01....": "no IDX magic number",
        good[:7]: "within its header",
        good[:-1]: r"17 bytes for shape \(2, 3\), which needs 18; the file is truncated",
        good + b"x": "too long",
        gzip.compress(good)[:-9]: "cannot be read",
        b"\x1f\x8bnot gzip at all": "cannot be read",
    }
    for raw, text in cases.items():
        (tmp_path / "file").write_bytes(raw)
        with pytest.raises(UserError, match=text):
            read_idx(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(tmp_path / "absent")


def test_a_folder_that_is_not_mnist(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        mnist(tmp_path / "absent")
    with pytest.raises(UserError, match="train-images-idx3-ubyte is missing"):
        mnist(tmp_path)
    write(tmp_path, **{"train-labels{}idx1-ubyte": np.zeros(6, np.uint8)})
    with pytest.raises(UserError, match="7 train images but 6 labels"):
        mnist(tmp_path)
    write(tmp_path, **{"t10k-images{}idx3-ubyte": np.zeros((3, 5, 5), np.uint8)})
    with pytest.raises(UserError, match="differ in size"):
        mnist(tmp_path)
    write(tmp_path, **{"t10k-images{}idx3-ubyte": np.zeros((3, 16), np.uint8)})
    with pytest.raises(UserError, match="must have 3 axes"):
        mnist(tmp_path)


def test_digits():
    pytest.importorskip("sklearn")
    found = digits()
    assert found.x_train.shape == (1297, 64) and found.x_test.shape == (500, 64)
    assert float(found.x_train.mean(0).abs().max()) < 1e-6
    assert found.digest == digits().digest and set(found.y_test.tolist()) == set(range(10))
