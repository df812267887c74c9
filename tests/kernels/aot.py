"""What Triton would compile for a GPU that is not there: the one place that uses its internals."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class _Driver:
    """A GPU of a compute capability, as far as compiling asks; also its own device number."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compile_only(capability: int) -> Iterator[dict]:
    """Launches inside compile for `capability`, as for these very arguments, and run nothing.

    Arguments may be tensors on the CPU. Yields the compiled kernels by name.
    """
    kernels = {}
    run, before = JITFunction.run, driver._active  # its reset_active() wants a GPU

    def compile_it(self, *args, grid, warmup, **options):
        kernels[self.fn.__name__] = run(self, *args, grid=grid, warmup=True, **options)

    driver.set_active(_Driver(capability))
    JITFunction.run = compile_it
    try:
        yield kernels
    finally:
        JITFunction.run = run
        driver._active = before


def resources(kernel, folder: Path) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a compiled kernel, as cuobjdump reports them."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [os.fspath(CUOBJDUMP), "-res-usage", os.fspath(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = (field.split(":") for field in report.split() if field.count(":") == 1)
    return {name: int(value) for name, value in fields if value.isdigit()}
