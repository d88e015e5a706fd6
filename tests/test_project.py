"""Rules of the project that a reader would otherwise have to hold by hand."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hvpfast"

# Each level may import those before it, and itself only within one part; see the layout in the README.
LEVELS = (
    ("kernels",),
    ("autocast", "heap", "untouchable"),
    ("arguments", "dispatch", "patches"),
    ("ops",),
    ("testing",),
    ("space",),
    ("capture",),
    ("operators",),
    ("probes",),
    ("optim", "landscape", "geometry", "dynamics", "laplace"),
    ("integrations", "plot"),
    ("cli",),
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
MOST_LINES = 420
MACHINE_PATHS = ("/" + "work/", "/" + "tmp/env", "/" + "root/", "/" + "home/")


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows, else (in an unpacked sdist) those that are there."""
    done = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]
    skipped = (".git", ".venv", "build", "dist")
    globs = patterns or ("*",)
    found = {path for glob in globs for path in ROOT.rglob(glob) if path.is_file()}
    return sorted(p for p in found if not any(part in skipped for part in p.relative_to(ROOT).parts))


def part_of(path: Path) -> str:
    """hvpfast/capture/data.py -> capture; kernels/gram.py -> kernels; hvpfast/__init__.py -> ''."""
    folder = path.relative_to(ROOT).parts
    if folder[0] == "kernels":
        return "kernels"
    name = folder[1].removesuffix(".py")
    return "" if name in ("__init__", "__main__") else name


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, absolute name) of every import of hvpfast in a file, relative and deferred ones too."""
    within = ("hvpfast", *path.relative_to(ROOT if path.is_relative_to(ROOT / "kernels") else PACKAGE).parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*within[: -node.level], *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "hvpfast"]


def offences(path: Path) -> list[str]:
    own, wrong = part_of(path), []
    if not own:
        return wrong  # the package itself, which is above them all
    for line, name in imported(path):
        other = name.split(".")[1] if "." in name else ""
        if other == "__version__" or other == own:
            continue
        if not other or other not in LEVEL:
            fine = own == "cli"  # the command line stands on the public API
        else:
            fine = LEVEL[other] < LEVEL[own] and own != "kernels"
        if own == "dispatch" and other == "kernels":
            fine = False  # by name and lazily only, so that hvpfast imports without its kernels
        if not fine:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}: {own} may not")
    return wrong


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def test_every_part_has_a_level():
    assert {part_of(path) for path in sources()} - {""} <= set(LEVEL)


def test_imports_point_down_only():
    assert [line for path in sources() for line in offences(path)] == []


def test_the_rule_on_imports_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "hvpfast")
    for name, line, allowed in (
        ("hvpfast/ops/factors.py", "from hvpfast.dispatch import op", True),
        ("hvpfast/ops/factors.py", "from hvpfast import capture", False),
        ("hvpfast/capture/data.py", "from ..operators import GGN", False),
        ("hvpfast/capture/data.py", "from .errors import StateError", True),
        ("hvpfast/capture/data.py", "def f():\n    import hvpfast.operators.ggn", False),
        ("hvpfast/operators/ggn.py", "import hvpfast", False),
        ("hvpfast/landscape/a.py", "from hvpfast.dynamics import b", False),
        ("hvpfast/dispatch.py", "from hvpfast import kernels", False),
        ("hvpfast/cli/probe.py", "import hvpfast as hf", True),
        ("kernels/gram.py", "from .tiles import dot", True),
        ("kernels/gram.py", "from hvpfast import ops", False),
        ("kernels/gram.py", "from .. import ops", False),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line)
        assert (offences(path) == []) == allowed, (name, line)


def test_importing_hvpfast_needs_none_of_the_extras():
    """Neither plots, the command line's parts, SciPy nor Triton are loaded before they are used."""
    code = "import sys, hvpfast; print([m for m in sys.argv[1].split() if m in sys.modules])"
    names = "matplotlib sklearn scipy triton hvpfast.kernels hvpfast.cli hvpfast.plot pytest"
    done = subprocess.run([sys.executable, "-c", code, names], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_package_folder_is_listed():
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'"([\w.]+)"', text[text.index("packages = [") : text.index("package-dir")]))
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("*.py")}
    inner = {"hvpfast." + ".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "kernels").rglob("*.py")}
    assert listed == folders | inner
    for name in listed - {"hvpfast.kernels"}:
        assert (ROOT / name.replace(".", "/") / "__init__.py").exists(), f"{name} has no __init__.py"


def test_kernels_refuse_to_be_imported_from_the_top():
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "not a package named 'kernels'" in done.stderr
    assert "pip install -e ." in done.stderr


def test_files_stay_readable():
    counted = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in tracked("*.py", "*.cpp", "*.hpp", "*.cu")
    }
    assert {name: lines for name, lines in counted.items() if lines > MOST_LINES} == {}


def test_no_file_names_a_machine():
    wrong = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        wrong += [f"{path.relative_to(ROOT)}: {found}" for found in MACHINE_PATHS if found in text]
    assert wrong == []


def test_every_test_asserts_something():
    silent = []
    for path in tracked("tests/*.py", "tests/**/*.py"):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        holding: set[str] = set()
        while more := {f.name for f in functions if f.name not in holding and _asserts(f, holding)}:
            holding |= more
        silent += [
            f"{path.relative_to(ROOT)}:{f.lineno} {f.name}"
            for f in functions
            if f.name.startswith("test_") and f.name not in holding
        ]
    assert silent == []


def _asserts(function: ast.FunctionDef, holding: set[str]) -> bool:
    """Whether a function can fail: it asserts, expects an error, runs a checked process, or calls one that does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            checked = any(k.arg == "check" and getattr(k.value, "value", None) is True for k in node.keywords)
            if checked or name in holding or "assert" in name or name in ("raises", "warns", "fail"):
                return True
    return False


# README ---------------------------------------------------------------------------------------------------------------


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_the_readme_runs(tmp_path):
    """All Python blocks, in order, in one process outside the checkout."""
    blocks = snippets()
    assert len(blocks) >= 3
    script = tmp_path / "readme.py"
    script.write_text("\n".join(f"print('block {i}', flush=True)\n{block}" for i, block in enumerate(blocks)))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_names_files_that_exist():
    names = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", (ROOT / "README.md").read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", ".ci/run"))
def test_the_usual_files_are_there(name):
    assert (ROOT / name).stat().st_size > 0
