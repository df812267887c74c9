"""Triton's interpreter made as exact as a GPU, and quicker: for the files of values, which run in a
process of their own."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True, scope="session")
def _bfloat16_rounds_to_nearest():
    """As on every GPU; the interpreter cuts the digits off."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding(builder, source, to):
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(source.data).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        return cast(builder, source, to)

    interpreter.InterpreterBuilder.cast_impl = rounding
    yield
    interpreter.InterpreterBuilder.cast_impl = cast


@pytest.fixture(autouse=True, scope="session")
def _patched_once():
    """The interpreter puts its own functions into triton.language at every call of a device
    function, and takes them out again. They are the same each time: once is enough."""
    patch, scope = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", None)
    if scope is None or os.environ.get("TRITON_INTERPRET") != "1":  # another Triton, or a GPU
        yield
        return
    names = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    once = patch(names)
    interpreter._patch_lang = lambda function: scope()
    yield
    interpreter._patch_lang = patch
    once.restore()
