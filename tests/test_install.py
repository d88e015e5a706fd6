"""Wheel, sdist, editable and plain installs, each imported from outside the checkout; requested builds fail loudly.

Everything is built from a copy of the checkout. The environments see the packages of the one that runs the tests, so
that torch is not installed again; only the isolated build asks the package index for anything (setuptools, pybind11).
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.install

ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
NO_NVCC = {"HVPFAST_NVCC": "/nonexistent/nvcc"}
FAST = {"HVPFAST_CXXFLAGS": "-O1", **NO_NVCC}

GRAM = """
import torch, hvpfast as hf
x = torch.randn(65, 17)
with hf.backend("cpu"):
    torch.testing.assert_close(hf.ops.gram(x), x.T @ x)
print(hf.__file__)
"""


def run(*command: object, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Run with a clean set of hvpfast's variables; the output goes into the failure."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HVPFAST_", "TRITON_")) and k != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env={**kept, **env}, capture_output=True, text=True)
    if check and done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done


def copy_of_checkout(target: Path) -> Path:
    """What a commit of the working tree would hold."""
    listed = run("git", "ls-files", "-coz", "--exclude-standard", cwd=ROOT, check=False)
    if listed.returncode:
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so", "_build.json"))
        return target
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """A copy in which several builds may share their objects."""
    return copy_of_checkout(tmp_path_factory.mktemp("install") / "tree")


@pytest.fixture(scope="session")
def sdist(tree) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tree.parent / "sdist", cwd=tree)
    return next((tree.parent / "sdist").glob("*.tar.gz"))


@pytest.fixture(scope="session")
def isolated_wheel(sdist) -> Path:
    """From the sdist, in pip's isolated build environment: no torch there."""
    folder = sdist.parent / "wheel"
    run(
        *PIP, "wheel", "--no-deps", "--no-cache-dir", "-w", folder, sdist, cwd=sdist.parent, **FAST, HVPFAST_BUILD="cpu"
    )
    return next(folder.glob("*.whl"))


@pytest.fixture
def environment(tmp_path) -> Path:
    """The Python of a new environment that also sees the packages beside this one, but not their editable installs."""
    builder = venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt")
    builder.create(tmp_path / "venv")
    python = Path(builder.ensure_directories(tmp_path / "venv").env_exe)
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    Path(own, "beside.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def install(python: Path, *what: object, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    options = ("install", "--no-deps", "--ignore-installed", "--no-cache-dir", "--no-build-isolation")
    return run(sys.executable, "-m", "pip", "--python", python, *options, *what, cwd=cwd, check=check, **env)


def backends(python: Path, cwd: Path) -> dict[str, str]:
    code = "import hvpfast as hf, json; print(json.dumps({w: r for n, w, r in hf.backends() if n == 'gram'}))"
    return json.loads(run(python, "-c", code, cwd=cwd).stdout)


def test_sdist_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "constraints.txt", "kernels/native.py"):
        assert needed in names
    sources = {
        str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".hpp", ".cu", ".cuh")
    }
    assert sources <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]


def test_wheel_holds_the_package_and_nothing_else(isolated_wheel):
    with zipfile.ZipFile(isolated_wheel) as archive:
        names = archive.namelist()
        report = json.loads(archive.read("hvpfast/kernels/_build.json"))
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {name.split("/")[0] for name in names} == {"hvpfast", "hvpfast-0.1.0.dist-info"}
    python = {str(p.relative_to(ROOT)) for p in (ROOT / "hvpfast").rglob("*.py")}
    python |= {f"hvpfast/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == python
    assert len([name for name in names if name.startswith("hvpfast/kernels/_cpu.")]) == 1
    assert report["cpu"] == "built" and report["cuda"] == "HVPFAST_BUILD=cpu"
    needed = {line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line}
    assert needed == {"Requires-Dist: torch>=2.8", "Requires-Dist: numpy>=1.24"}


def test_wheel_runs_outside_the_checkout(isolated_wheel, environment, tmp_path):
    install(environment, "--no-index", isolated_wheel, cwd=tmp_path)
    assert str(environment.parents[1]) in run(environment, "-c", GRAM, cwd=tmp_path).stdout
    table = backends(environment, tmp_path)
    assert table["cpu"] is None and table["reference"] is None
    assert table["cuda"] == "not built: HVPFAST_BUILD=cpu"
    shown = run(environment, "-m", "hvpfast", "--version", cwd=tmp_path).stdout
    assert shown.strip() == "hvpfast 0.1.0"
    script = environment.with_name("hvpfast.exe" if os.name == "nt" else "hvpfast")
    assert run(script, "--version", cwd=tmp_path).stdout == shown


def test_extension_needs_no_torch_library(isolated_wheel, tmp_path):
    if shutil.which("ldd") is None:
        pytest.skip("ldd is not here")
    with zipfile.ZipFile(isolated_wheel) as archive:
        name = next(n for n in archive.namelist() if "/_cpu." in n)
        linked = run("ldd", archive.extract(name, tmp_path), cwd=tmp_path).stdout
    assert "libtorch" not in linked and "libc10" not in linked and "libcud" not in linked


def test_without_any_build(tree, environment, tmp_path):
    copy = copy_of_checkout(tmp_path / "tree")
    install(environment, copy, cwd=tmp_path, HVPFAST_BUILD="none")
    table = backends(environment, tmp_path)
    assert table["cpu"] == table["cuda"] == "not built: HVPFAST_BUILD=none"
    code = "import torch, hvpfast as hf; x = torch.eye(3); assert hf.ops.gram(x).equal(x); print(hf.ops.gram.choose(x))"
    assert run(environment, "-c", code, cwd=tmp_path).stdout.startswith("runs: reference\nnot cpu: not built")
    forced = run(environment, "-c", GRAM, cwd=tmp_path, check=False)
    assert forced.returncode == 1 and "cannot run: not built: HVPFAST_BUILD=none" in forced.stderr
    assert "HVPFAST_BUILD=none" in run(environment, "-m", "hvpfast", "doctor", cwd=tmp_path).stdout


def test_editable(environment, tmp_path):
    copy = copy_of_checkout(tmp_path / "tree")
    install(environment, "-e", copy, cwd=tmp_path, **FAST, HVPFAST_BUILD="cpu")
    for place in (tmp_path, copy):
        assert run(environment, "-c", GRAM, cwd=place).stdout.strip() == str(copy / "hvpfast" / "__init__.py")
    (copy / "kernels" / "later.py").write_text("found = True\n")
    run(environment, "-c", "from hvpfast.kernels.later import found", cwd=tmp_path)
    table = backends(environment, copy)
    assert table["cpu"] is None and table["cuda"] == "not built: HVPFAST_BUILD=cpu"


def test_auto_falls_back_and_remembers_why(environment, tmp_path):
    copy = copy_of_checkout(tmp_path / "tree")
    install(environment, copy, cwd=tmp_path, **NO_NVCC, HVPFAST_BUILD="auto", CXX="/bin/false", CC="/bin/false")
    table = backends(environment, tmp_path)
    assert "not built: the build failed: " in table["cpu"] and "/bin/false" in table["cpu"]
    assert "HVPFAST_NVCC is '/nonexistent/nvcc', which is not a program" in table["cuda"]


@pytest.mark.parametrize(
    ("env", "message"),
    (
        ({"HVPFAST_BUILD": "bogus"}, "HVPFAST_BUILD is 'bogus'; it must be one of auto, none, cpu, cuda"),
        (
            {"HVPFAST_BUILD": "cpu", "CXX": "/bin/false", "CC": "/bin/false"},
            "HVPFAST_BUILD=cpu was requested, but building hvpfast.kernels._cpu failed",
        ),
        (
            {"HVPFAST_BUILD": "cuda", **NO_NVCC},
            "HVPFAST_BUILD=cuda was requested, but HVPFAST_NVCC is '/nonexistent/nvcc'",
        ),
        (
            {"HVPFAST_BUILD": "cuda", **FAST, "HVPFAST_NVCC": "/bin/false"},
            "HVPFAST_BUILD=cuda was requested, but building hvpfast.kernels._cuda failed",
        ),
    ),
    ids=("unknown", "no compiler", "no nvcc", "nvcc fails"),
)
def test_a_requested_build_that_fails_is_an_error(tree, tmp_path, env, message):
    if env.get("CXX"):
        tree = copy_of_checkout(tmp_path / "tree")  # nothing built in it that could be taken instead
    done = run(
        *PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree, cwd=tmp_path, check=False, **env
    )
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))
