"""Values of linear_distill_cross_entropy by the Triton kernels against float64: the tests of all
backends, for the types that it takes. `test_triton.py` runs this file as `distill_values.py`."""

import pytest
import torch
from mokd_fast.kernels import distill as kernels

from mokd_fast.ops import LinearTarget, linear_chunks

from ..ops import test_linear_distill as tests
from ..ops.oracle import dense
from .distill_values import DEVICE, DTYPES
from .interpreter import _bfloat16_rounds_to_nearest, _quick  # noqa: F401

# What 16 bits add to fp32, the casts, is in the tests of all DTYPES; the rest is for the slow run.
FP32_FIRST = [DTYPES[0], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])]


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("MOKD_FAST_BACKEND", "triton")
    monkeypatch.setattr(linear_chunks, "KEEP_BYTES", 0)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("dtype", FP32_FIRST)
@pytest.mark.parametrize(("k", "chunk"), [(5, 1), (97, 32), (97, 96), (97, 97), (97, 98)])
def test_chunks(k, chunk, dtype):
    tests.check(*tests.dino(k=k, dtype=dtype), chunk=chunk)


@pytest.mark.parametrize("dtype", FP32_FIRST)
def test_more_than_one_tile_a_chunk(dtype):
    tests.check(*tests.dino(k=4097, d=256, dtype=dtype), chunk=1500)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unnormalised_features_of_large_norm(dtype):
    tests.test_unnormalised_features_of_large_norm(dtype)


@pytest.mark.parametrize("b", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_of_every_kind_in_one_pass(dtype, b):
    tests.test_targets_of_every_kind_in_one_pass(dtype, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_chunk_is_the_operator_on_stored_logits(dtype):
    tests.test_one_chunk_is_the_operator_on_stored_logits(dtype)


@pytest.mark.parametrize("what", ["finite", "nan", "inf", "offset"])
@pytest.mark.parametrize("split", tests.SPLITS[2:], ids=["two", "four"])
def test_chunks_of_any_sizes_give_what_the_whole_gives(split, what):
    tests.test_chunks_of_any_sizes_give_what_the_whole_gives("triton", split, what)


def test_not_finite_comes_through():
    tests.test_not_finite_comes_through()


def test_the_same_call_gives_the_same_bits():
    tests.test_the_same_call_gives_the_same_bits()


def test_the_operators_are_sound():
    tests.test_the_operators_are_sound(60, b=1)


def test_compiles_whole():
    tests.test_compiles_whole("aot_eager")


def test_pairs_that_one_chunk_knows_the_next_knows_too():
    """The table of pairs is copied to the device once for all chunks and both passes."""
    x, w, targets = tests.four()
    kernels._table.cache_clear()
    tests.run(x, w, targets, chunk=40)
    assert kernels._table.cache_info().misses == 1


def test_more_rows_than_it_takes_are_named():
    x, w, _ = tests.dino()
    target = LinearTarget(dense(25, tests.V), tests.unit(25, tests.B, tests.D), w)
    with pytest.raises(RuntimeError, match="it takes 24 teacher rows"):
        tests.run(x, w, [target])
