"""For every test: one thread, for on a busy machine the barriers of tiny operators cost far more;
a process that can be forked; a cache folder of its own; no GPU but for those that want one. The
command line in this process."""

import os
import re
import sys

import pytest
import torch

from mokd_fast import cli


def pytest_configure(config):
    """Without `-m gpu` a GPU stays out of sight, of other processes too: most tests are of what a
    machine without one does, and of bits that a GPU does not keep."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """The longest first, and to one process: another that needed its builds would wait for them."""
    items.sort(key=lambda item: item.path.name != "test_build.py")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _forks_can_train():
    """A FakeTensorMode tells torch of a GPU that is not there, and the first backward pass after it
    starts threads for that one: a forked child could not train then. So one comes first."""
    torch.ones((), requires_grad=True).backward()


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    """What is known of the tests' pictures stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOKD_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def run(capfd, monkeypatch):
    """The command line in this process: (exit code, stdout, stderr in one line)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mokd-fast", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capfd.readouterr()
        return code, out.out, " ".join(out.err.split())

    return call
