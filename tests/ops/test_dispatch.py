"""Which backend runs, and the sentence why another does not."""

import subprocess
import sys

import pytest
import torch

from mokd_fast.ops import dispatch


@pytest.fixture(autouse=True)
def operator(monkeypatch):
    monkeypatch.setattr(dispatch, "_BACKENDS", {})
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.register("op", "reference", lambda x: "slow")
    dispatch.register("op", "cuda", lambda x: "fast", lambda x: "x is not on a GPU" if x else None)


def test_priority_and_fall_through():
    assert dispatch.pick("op", 0).name == "cuda"
    assert dispatch.pick("op", 1).name == "reference"
    assert dispatch.explain("op", 1) == "cuda: x is not on a GPU\nreference: chosen"
    assert dispatch.explain("op", 0) == "cuda: chosen\nreference: can run too"


def test_a_forced_backend_runs_or_says_why_not(monkeypatch):
    assert dispatch.pick("op", 0, backend="reference").name == "reference"
    with pytest.raises(RuntimeError, match="backend=cuda was asked for but x is not on a GPU"):
        dispatch.pick("op", 1, backend="cuda")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    assert dispatch.pick("op", 0).name == "reference"
    assert dispatch.pick("op", 0, backend="cuda").name == "cuda"  # the argument wins
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cuda")
    with pytest.raises(RuntimeError, match="MOKD_FAST_BACKEND=cuda was asked for but x is not"):
        dispatch.pick("op", 1)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")  # which this operator does not have
    assert dispatch.pick("op", 0).name == "cuda"
    assert "which op does not have, so the choice is automatic" in dispatch.explain("op", 0)
    with pytest.raises(ValueError, match=r"op: backend=triton .* no backend 'triton'; it has cuda"):
        dispatch.pick("op", 0, backend="triton")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "abacus")
    assert "which is no backend, so every call raises" in dispatch.explain("op", 0)
    with pytest.raises(ValueError, match=r"MOKD_FAST_BACKEND=abacus .*; it has cuda, reference"):
        dispatch.pick("op", 0)
    with pytest.raises(ValueError, match="no operator 'other'"):
        dispatch.explain("other")
    with pytest.raises(ValueError, match="the names are"):
        dispatch.register("op", "fastest", lambda: None)


def test_the_order_does_not_depend_on_who_registers_first():
    for name in ("cpu", "fused-linear", "fused", "xformers", "sdpa", "triton"):
        dispatch.register("op", name, lambda x: None)
    lines = dispatch.explain("op", 0).splitlines()
    assert tuple(line.split(":")[0] for line in lines) == dispatch.PRIORITY


def test_explain_takes_keywords_as_the_operator_does():
    assert dispatch.explain("op", x=1) == dispatch.explain("op", 1)
    assert dispatch.explain("op", x=0) == dispatch.explain("op", 0)


def test_one_that_is_avoided_runs_when_it_is_forced():
    dispatch.register("op", "triton", lambda x: "worse", avoid=lambda x: "but it is slow" * x)
    assert dispatch.pick("op", 1).name == "reference"
    assert dispatch.pick("op", 1, backend="triton").run(1) == "worse"
    lines = ["cuda: x is not on a GPU", "triton: can run, but it is slow", "reference: chosen"]
    assert dispatch.explain("op", 1) == "\n".join(lines)
    assert "triton: can run too" in dispatch.explain("op", 0)


def test_when_none_can_run_every_reason_is_said():
    dispatch.register("gpu_op", "triton", lambda: None, lambda: "there is no GPU")
    dispatch.register("gpu_op", "cuda", lambda: None, lambda: "it was not built")
    with pytest.raises(RuntimeError, match="cuda: it was not built\ntriton: there is no GPU"):
        dispatch.pick("gpu_op")


def test_the_operators_import_torch_alone():
    code = "import sys, mokd_fast.ops; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    # torch itself imports Dynamo, and with it Triton, only when something compiles.
    heavy = {"timm", "torchvision", "pydantic", "PIL", "rich", "triton", "torch._dynamo"}
    assert not heavy & set(loaded)


def test_a_function_is_marked_constant_as_torch_does_it():
    ours, theirs = dispatch.constant(lambda: 0), torch.compiler.assume_constant_result(lambda: 0)
    assert vars(ours) == vars(theirs) != {}
