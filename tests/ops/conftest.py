"""The CUDA kernels for tests with tensors on the CPU: on a GPU if there is one, else emulated."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
import torch
from mokd_fast.kernels import configs

from mokd_fast.ops import cpu, cuda, distill, search
from tests.shared import once

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")


def pytest_collection_modifyitems(items):
    """Marks what runs the CUDA kernels."""
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params.values()
        called = "cuda" in [p for p in params or () if isinstance(p, str)]
        if Path(__file__).parent in item.path.parents and (
            called or "cuda_kernels" in getattr(item, "fixturenames", ())
        ):
            item.add_marker("gpu")


def emulate(folder):
    """_C.so, all processors at work: the other processes of the tests may wait for it."""
    include = pybind11.get_include(), sysconfig.get_path("include"), ROOT / "tests/ops"
    sources = (
        "bindings.cpp",
        "cpu/level.cpp",
        "cpu/augment.cpp",
        "cpu/batch_norm.cpp",
        "cpu/block.cpp",
        "cpu/clip.cpp",
        "cpu/distill.cpp",
        "cpu/search.cpp",
        "cpu/search_backward.cpp",
        "cpu/prototype_linear_fp32.cpp",
        "cpu/prototypes.cpp",
        "cpu/update.cpp",
        "cuda/distill.cu",
        "cuda/search.cu",
    )
    options = [
        *("-x", "c++", "-std=c++17"),
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wno-unknown-pragmas",
        *('-DMOKD_CUDA="sm_80 sm_90a compute_80"', "-DMOKD_LEVEL=baseline"),
        '-DMOKD_FAST_BUILD_TYPE="emulated"',
        *(f"-I{place}" for place in include),
    ]

    def nvcc(*words):
        build = subprocess.run(list(map(str, [NVCC, *words])), capture_output=True, text=True)
        assert build.returncode == 0, build.stdout + build.stderr

    def compiled(source):
        out = folder / f"{source.replace('/', '_')}.o"
        how = ("-O0",)  # the others run elsewhere
        if source.startswith("cuda/"):
            # a * b + c is rounded once, as nvcc has it, where this processor can: digits may hang
            # on that. And an address that a GPU does not take ends the process.
            how = "-O2", "-Xcompiler=-march=native,-ffp-contract=fast"
            how += ("-Xcompiler=-fsanitize=alignment,-fsanitize-undefined-trap-on-error",)
        nvcc(*options, *how, "-c", ROOT / "csrc" / source, "-o", out)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    nvcc("-shared", "-cudart", "none", "-o", folder / "_C.so", *objects)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The native module with the CUDA kernels compiled for the host (emulator.h)."""
    if NVCC is None:
        pytest.skip("needs the headers of the CUDA toolkit")
    module = once(tmp_path_factory, "emulated", emulate) / "_C.so"
    # Another name than mokd_fast._C, which pybind11 would answer with the module loaded already.
    spec = importlib.util.spec_from_file_location("emulated._C", module)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    return native


class OnGpu:
    """The kernels of `cuda` for tensors on the CPU, which travel there and back."""

    def why_not(self, *args):
        return cuda.why_not(*args)

    def search_why_not(self, *args):
        return cuda.search_why_not(*args)

    def __getattr__(self, name):
        """What returns tensors: distill_forward, and all of the search."""
        kernel = getattr(cuda, name)
        return lambda *args: tuple(out.cpu() for out in kernel(*map(to_gpu, args)))

    def distill_backward(self, *args, out=None):
        found = cuda.distill_backward(*map(to_gpu, args))
        return found.cpu() if out is None else out.copy_(found)

    class ForwardChunks(cuda.ForwardChunks):
        def add(self, *args):
            super().add(*map(to_gpu, args))
            if not self._left:
                self.outputs = tuple(out.cpu() for out in self.outputs)


def to_gpu(value):
    if isinstance(value, list):
        return [to_gpu(item) for item in value]
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.fixture
def cuda_kernels(request, monkeypatch):
    """Backend "cuda" takes tensors on the CPU, when MOKD_FAST_BACKEND asks for it."""
    if torch.cuda.is_available() and hasattr(cpu.native, "cuda_versions"):
        for module in (distill, search):
            kernels = module._kernels
            on_gpu = lambda name, others=kernels: OnGpu() if name == "cuda" else others(name)  # noqa: E731
            monkeypatch.setattr(module, "_kernels", on_gpu)
    else:
        monkeypatch.setattr(cpu, "native", request.getfixturevalue("emulated"))
        monkeypatch.setattr(cuda, "_place", lambda tensor: (0, 0))
        monkeypatch.setattr(configs, "gpu", lambda index: (90, 132))
    real = cuda.why_not
    monkeypatch.setattr(
        cuda,
        "why_not",
        lambda *args: None if os.environ.get("MOKD_FAST_BACKEND") == "cuda" else real(*args),
    )


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request, monkeypatch):
    """Each backend in turn, forced."""
    if request.param == "cuda":
        request.getfixturevalue("cuda_kernels")
    if request.param == "cpu" and cpu.native is None:
        pytest.skip("the native module was not built")
    monkeypatch.setenv("MOKD_FAST_BACKEND", request.param)
    return request.param


@pytest.fixture(params=["baseline", "v3", "v4", "cuda"])
def kernels(request, monkeypatch):
    """The kernels of each x86-64 level that this processor has, and of CUDA, forced."""
    if request.param == "cuda":
        request.getfixturevalue("cuda_kernels")
    elif request.param not in levels():
        pytest.skip(f"no native module here with kernels of level {request.param}")
    else:
        monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", request.param)
    monkeypatch.setenv("MOKD_FAST_BACKEND", "cuda" if request.param == "cuda" else "cpu")
    return request.param


def levels() -> list[str]:
    found = []
    for name in cpu.LEVELS if cpu.native is not None else ():
        try:
            found.append(cpu.native.cpu_level(name))
        except ValueError:
            continue  # this processor does not have it
    return found
