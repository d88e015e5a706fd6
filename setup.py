"""Builds the native kernels: `_cpu` (C++, any compiler) and, where nvcc is found, `_cuda`.

`HVPFAST_BUILD` chooses: `auto` (default: what this machine can build; a failure falls back and is remembered),
`none`, `cpu`, `cuda` (both). A build that was asked for by name and fails is an error. The outcome is written to
`hvpfast/kernels/_build.json`, which `hvpfast doctor` reads. No torch is needed: the kernels take raw pointers.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
REQUEST = os.environ.get("HVPFAST_BUILD", "auto")
# SASS for A100-class and Hopper (wgmma needs the "a" target), PTX for everything newer.
CUDA_TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80")


def sources(folder, *suffixes):
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).iterdir() if p.suffix in suffixes)


def headers():
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".hpp", ".cuh", ".h"))


def find_nvcc():
    if "HVPFAST_NVCC" in os.environ:  # this one or none
        return shutil.which(os.environ["HVPFAST_NVCC"])
    candidates = []
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        candidates.append(os.path.join(home, "bin", "nvcc") if home else None)
    candidates.append(shutil.which("nvcc"))
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


class BuildKernels(build_ext):
    """Compiles each extension if it was requested or can be, and records what happened."""

    def run(self):
        if REQUEST not in ("auto", "none", "cpu", "cuda"):
            raise SystemExit(f"HVPFAST_BUILD is {REQUEST!r}; it must be one of auto, none, cpu, cuda")
        for device in ("cpu", "cuda"):
            if REQUEST in (device, "cuda") and self.skip_reason(device) is not None:  # before minutes of compilation
                raise SystemExit(f"HVPFAST_BUILD={REQUEST} was requested, but {self.skip_reason(device)}")
        self.report = {"request": REQUEST, "python": sys.version.split()[0]}
        super().run()

    def build_extension(self, ext):
        device = ext.name.rsplit("._", 1)[1]
        required = REQUEST == "cuda" or REQUEST == device
        reason = self.skip_reason(device)
        if reason is None:
            try:
                self.build_cuda(ext) if device == "cuda" else self.build_cpu(ext)
            except Exception as error:  # any failure is a reason here; a requested build re-raises it
                if required:  # SystemExit: setuptools turns a compiler's error in an optional extension into a warning
                    raise SystemExit(
                        f"HVPFAST_BUILD={REQUEST} was requested, but building {ext.name} failed: {error}"
                    ) from error
                reason = f"the build failed: {str(error).strip() or type(error).__name__}"
        self.report[device] = "built" if reason is None else reason
        built = Path(self.get_ext_fullpath(ext.name))
        # An editable installation compiles elsewhere and copies the extensions alone into the sources.
        folder = ROOT / "kernels" if getattr(self, "editable_mode", False) else built.parent
        if reason is not None:
            print(f"hvpfast: {ext.name} is left out: {reason}", file=sys.stderr)
            for stale in (built, folder / built.name):
                stale.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(self.report, indent=1) + "\n")

    def skip_reason(self, device):
        if REQUEST == "none" or (REQUEST == "cpu" and device == "cuda"):
            return f"HVPFAST_BUILD={REQUEST}"
        if device == "cuda" and find_nvcc() is None:
            if "HVPFAST_NVCC" in os.environ:
                return f"HVPFAST_NVCC is {os.environ['HVPFAST_NVCC']!r}, which is not a program that can be run"
            return "nvcc was not found (set CUDA_HOME, or HVPFAST_NVCC to its path)"
        return None

    def build_cpu(self, ext):
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args = ["/O2", "/std:c++17", "/openmp"]
        else:
            ext.extra_compile_args = ["-O3", "-std=c++17", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
            ext.extra_compile_args += os.environ.get("HVPFAST_CXXFLAGS", "").split()
            ext.extra_link_args = os.environ.get("HVPFAST_LDFLAGS", "").split()
            # libgomp.so.1 is the library that torch has loaded already: one shared pool of threads.
            if self.accepts("-fopenmp"):
                ext.extra_compile_args.append("-fopenmp")
                ext.extra_link_args.append("-fopenmp")
        super().build_extension(ext)

    def build_cuda(self, ext):
        nvcc = find_nvcc()
        objects = []
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        for source in [s for s in ext.sources if s.endswith(".cu")]:
            target = folder / (Path(source).stem + ".o")
            command = [nvcc, "-c", source, "-o", str(target), "-O3", "-std=c++17", "-Icsrc/include", "--cudart=static"]
            command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-Werror=all-warnings", "-lineinfo"]
            command += [part for t in CUDA_TARGETS for part in ("-gencode", t)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            objects.append(str(target))
        home = Path(os.path.realpath(nvcc)).parents[1]
        places = [*home.glob("lib64"), *home.glob("lib"), *home.glob("targets/*/lib")]
        cudart = next((p / "libcudart_static.a" for p in places if (p / "libcudart_static.a").exists()), None)
        if cudart is None:
            raise RuntimeError(f"libcudart_static.a was not found beside {nvcc}")
        bare = Extension(ext.name, [s for s in ext.sources if not s.endswith(".cu")], include_dirs=ext.include_dirs)
        bare.extra_compile_args = ["-O2", "-std=c++17", "-fvisibility=hidden", "-g0"]
        bare.extra_objects = [*objects, str(cudart)]
        bare.extra_link_args = ["-ldl", "-lrt", "-lpthread"]
        bare._full_name, bare._links_to_dynamic, bare._needs_stub = ext._full_name, False, False
        super().build_extension(bare)

    def accepts(self, flag):
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n")
            try:
                objects = self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=[flag])
            except Exception:  # the compiler has no OpenMP: one thread then
                return False
        return True


def extension(device, suffixes):
    include = ["csrc/include"]
    try:
        import pybind11

        include.append(pybind11.get_include())
    except ImportError:  # `setup.py --version` and the like; the build requires it
        include.append(sysconfig.get_path("include"))
    files = sources(device, *suffixes)
    return Extension(
        f"hvpfast.kernels._{device}", files, include_dirs=include, language="c++", depends=headers(), optional=True
    )


setup(
    ext_modules=[extension("cpu", (".cpp",)), extension("cuda", (".cu", ".cpp"))],
    cmdclass={"build_ext": BuildKernels},
)
