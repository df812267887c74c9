"""Build mokd_fast: CMakeLists.txt makes the native module `mokd_fast._C`, the rest is pure Python.

MOKD_FAST_BUILD chooses what is built:
    auto  (default) the native module where it can be built, with CUDA where nvcc is found, else
          pure Python; a word on what was not built and why;
    cpu   the native module without CUDA, or an error;
    cuda  the native module with CUDA, or an error;
    off   pure Python.
MOKD_FAST_CUDA_ARCHS chooses the architectures of CUDA machine code, "80;90a;100" without it; PTX
for the others is always there. nvcc is that of CUDACXX, PATH or CUDA_HOME; no GPU is needed.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# What a failed build says in CMake's words, and in ours.
ADVICE = {
    "No CMAKE_CXX_COMPILER could be found": "no C++ compiler was found (install g++, or set CXX)",
    "missing: Python_INCLUDE_DIRS": "Python's headers were not found (install python3-dev)",
}


class BuildError(Exception):
    """The native module could not be built; the message says why in a few words."""


def build_mode() -> str:
    """MOKD_FAST_BUILD, checked."""
    mode = os.environ.get("MOKD_FAST_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "off"):
        raise SystemExit(f"MOKD_FAST_BUILD={mode}: choose auto, cpu, cuda or off.")
    return mode


def cuda_archs() -> str:
    """MOKD_FAST_CUDA_ARCHS, checked: CMake and nvcc would complain of a wrong one at length."""
    archs = os.environ.get("MOKD_FAST_CUDA_ARCHS") or "80;90a;100"
    if not re.fullmatch(r"\d{2,3}[af]?(;\d{2,3}[af]?)*", archs):
        raise SystemExit(f"MOKD_FAST_CUDA_ARCHS={archs}: give architectures like 80;90a;100.")
    return archs


def nvcc() -> str | None:
    """Path of nvcc, if there is one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(os.environ.get("CUDACXX") or "nvcc") or shutil.which(f"{home}/bin/nvcc")


def tool(name: str) -> str:
    """Path of a build tool, which an environment that is not activated keeps beside its Python."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise BuildError(f"{name} was not found (pip install {name})")
    return path


def run(*command: str, failure: str) -> None:
    """Run a build step and show its output as it comes; a failure raises BuildError, with the
    words of ADVICE or else `failure`."""
    log = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log += line
    if process.returncode:
        advice = (text for sign, text in ADVICE.items() if sign in log)
        raise BuildError(next(advice, f"{failure} (`pip install -v` shows why)"))


def say(sentence: str) -> None:
    """Tell the user once: on the terminal if there is one, since pip hides what a build prints."""
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(f"\n{sentence}\n")
    except OSError:
        print(sentence, file=sys.stderr)


class Build(build):
    """Never reuse `build/`: its CMake cache names the ninja of an isolated environment that is gone
    by the next build, and a module deleted since would still reach the wheel."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self._fresh = tempfile.TemporaryDirectory(prefix="mokd_fast-build-")
        self.build_base = self._fresh.name


class BuildExt(build_ext):
    """Leave the extension to CMake."""

    def run(self) -> None:
        mode = build_mode()
        try:
            super().run()
        except BuildError as error:
            if mode != "auto":
                raise SystemExit(f"MOKD_FAST_BUILD={mode}: {error}.") from None
            say(f"mokd_fast is built without native kernels: {error}.")
            self.extensions = self.distribution.ext_modules = []

    def build_extension(self, ext: Extension) -> None:
        mode, compiler = build_mode(), nvcc()
        if mode == "cpu" or (mode == "auto" and compiler is None):
            return self.cmake(ext, "cpu", failure="the C++ build failed")
        archs = cuda_archs()
        try:
            if compiler is None:
                raise BuildError("nvcc was not found (install the CUDA toolkit, or set CUDACXX)")
            self.cmake(
                *(ext, "cuda", "-DMOKD_FAST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={compiler}"),
                f"-DMOKD_FAST_CUDA_ARCHS={archs}",
                failure="the CUDA build failed",
            )
        except BuildError as error:
            if mode == "cuda":
                raise
            self.cmake(ext, "cpu", failure="the C++ build failed")
            say(f"mokd_fast is built without CUDA kernels: {error}.")

    def cmake(self, ext: Extension, folder: str, *options: str, failure: str) -> None:
        try:
            import pybind11
        except ImportError:
            raise BuildError("pybind11 was not found (pip install pybind11)") from None
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / ext.name / folder
        run(
            *(tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(work)),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *options,
            failure=failure,
        )
        run(tool("cmake"), "--build", str(work), failure=failure)
        if not module.exists():
            raise BuildError(f"the C++ build did not make {module.name}")


class BdistWheel(bdist_wheel):
    """Build first, tag afterwards: only the build knows whether there is native code."""

    def run(self) -> None:
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


if __name__ == "__main__":
    native = build_mode() != "off" and sys.platform == "linux"
    if build_mode() in ("cpu", "cuda") and not native:
        raise SystemExit(f"MOKD_FAST_BUILD={build_mode()}: the native kernels build on Linux only.")
    # Folders of the top level that are installed inside the package. The benchmarks import each
    # other as `bench`, from the folder above theirs: that holds nothing else that can be imported.
    inside = {
        "mokd_fast.kernels": "kernels",
        "mokd_fast.benchmarks.scripts.bench": "bench",
        "mokd_fast.benchmarks.scripts.bench.baseline": "bench/baseline",
    }
    setup(
        packages=[*find_packages(include=["mokd_fast", "mokd_fast.*"]), *inside],
        package_dir=inside,
        package_data={"mokd_fast": ["py.typed", "recipes/*.yaml", "report/*.html"]},
        include_package_data=False,
        ext_modules=[Extension("mokd_fast._C", sources=[])] if native else [],
        cmdclass={
            "build": Build,
            "build_ext": BuildExt,
            "bdist_wheel": BdistWheel,
        },
    )
