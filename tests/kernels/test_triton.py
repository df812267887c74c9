"""The values of all Triton kernels: in the interpreter, and on a GPU if there is one.

They are in the files *_values.py, which run in a process of their own: Triton looks at its
environment once. It is one process for all, since the start takes as long as a file.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
VALUES = sorted(Path(__file__).parent.glob("*_values.py"))


def test_in_the_interpreter():
    run_values("interpreter", "not slow", *VALUES)


@pytest.mark.slow
def test_in_the_interpreter_what_takes_long():
    run_values("interpreter", "slow", *VALUES)


@pytest.mark.gpu
@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_on_a_gpu(path):  # a file at a time: there it is compiling that takes long
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    run_values("cuda", "gpu or not gpu", path)  # all, and the GPU in sight


def run_values(device: str, marked: str, *values: Path) -> None:
    interpreted = "01"[device == "interpreter"]
    environment = {"TRITON_INTERPRET": interpreted, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked]
    command += map(str, values)
    environment = {**os.environ, **environment}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and "skipped" not in ended.stdout, ended.stdout + ended.stderr
