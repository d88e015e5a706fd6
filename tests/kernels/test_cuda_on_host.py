"""The CUDA kernels' own source, compiled for the host (on_host/) and held against the references: places, ranges of rows,
barriers, the ones column and the blending are then right before a GPU has seen them."""

import importlib.util
import math
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hvpfast.kernels import native

from hvpfast import ops, testing

ROOT = Path(__file__).parents[2]
LAUNCH = re.compile(r"(\w+)<<<([^,]+), (\w+|dim3\([^)]*\)), 0, stream>>>\((.*?)\);", re.DOTALL)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    compiler = shutil.which("g++")
    pybind11 = pytest.importorskip("pybind11")
    if compiler is None:
        pytest.skip("there is no g++")
    folder, source = tmp_path_factory.mktemp("on_host"), ROOT / "csrc" / "cuda"
    text, launches = LAUNCH.subn(r"launch(\2, \3, [=] { \1(\4); });", (source / "gram.cu").read_text())
    assert launches == 2
    (folder / "gram.cpp").write_text(text)
    includes = [Path(__file__).with_name("on_host"), source, pybind11.get_include(), sysconfig.get_path("include")]
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", *(f"-I{path}" for path in includes), "-o", "_cuda.so"]
    command += ["gram.cpp", str(source / "bindings.cpp"), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if "barrier" in done.stderr and "No such file" in done.stderr:
        pytest.skip("this g++ has no C++20 <barrier>")
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("_cuda", folder / "_cuda.so")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, width, splits, layout",
    [(0, 5, 1, "contiguous"), (3, 17, 2, "offset"), (70, 136, 3, "contiguous"), (70, 129, 1, "transposed")],
)
def test_gram(module, monkeypatch, rows, width, splits, layout, dtype):
    monkeypatch.setattr(native, "_load", lambda device: module)
    monkeypatch.setattr(native, "_cuda_splits", lambda *_: splits)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    fresh = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *a, **k: fresh(x, *a, **k).fill_(math.nan))  # poisoned
    x = testing.laid_out(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype), layout)
    plain = native.cuda_gram(x)
    testing.assert_accurate(plain, ops.gram, x)
    assert torch.equal(plain, plain.T)
    before = torch.randn(width + 1, width + 1, generator=torch.Generator().manual_seed(1))  # not symmetric
    blend = {"alpha": 0.3, "beta": 0.7, "ones_column": True}
    out = native.cuda_gram(x, out=before.clone(), **blend)
    testing.assert_accurate(out, ops.gram, x, out=before, **blend)
