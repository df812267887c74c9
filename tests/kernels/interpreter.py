"""Triton's interpreter made as exact as a GPU, and quicker: for the files of values, which run in a
process of their own."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

if triton.__version__.startswith("3.6."):
    # It takes int() of arrays of one element, which NumPy 2.4 refuses (triton-lang/triton#9171).
    _patch_tensor = interpreter._patch_lang_tensor

    def _with_index(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _with_index


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
def _quick():
    """A third of the time, and the same values. The interpreter puts its own functions into
    triton.language at every call of a device function, and takes them out again: once is enough. It
    makes a table of all types for each that it looks up. And it computes all integers once more in
    64 bits, to see an overflow, but looks at what it has found in its debug mode alone."""
    patch, scope = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", None)
    if scope is None or os.environ.get("TRITON_INTERPRET") != "1":  # another Triton, or a GPU
        yield
        return
    once = patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    builder, numpy_type, known = interpreter.interpreter_builder, interpreter._get_np_dtype, {}

    def remembered(type):
        if type.name not in known:
            known[type.name] = numpy_type(type)
        return known[type.name]

    with pytest.MonkeyPatch.context() as quick:
        quick.setattr(interpreter, "_patch_lang", lambda function: scope())
        quick.setattr(interpreter, "_get_np_dtype", remembered)
        if not builder.options.debug:
            options = replace(builder.options, sanitize_overflow=False)
            quick.setattr(builder, "options", options)
        yield
    once.restore()
