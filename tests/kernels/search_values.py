"""Values of the Triton feature search: run by test_search.py, interpreted or on a GPU."""

import pytest
import torch

from mokd_fast.ops import feature_search
from tests.ops.test_search import OPERATORS, case, check, run

from .interpreter import _quick  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Weights are rounded to 16 bits before they meet the values, as every fused attention does it.
WITHIN = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPES = [(1, 1, 1, 1, 16), (3, 2, 2, 49, 24), (17, 1, 1, 70, 40), (2, 1, 1, 70, 128)]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(operator, dtype, shape):
    for strided in (False, True):
        tensors = [t.to(DEVICE) for t in case(operator, shape, dtype, strided=strided)]
        check(operator, tensors, "triton", within=WITHIN[dtype])


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_queries(operator):
    tensors = [t.to(DEVICE) for t in case(operator, (0, 2, 2, 5, 16))]
    for mine, theirs in zip(
        run(operator, tensors, backend="triton"),
        run(operator, tensors, backend="reference"),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("operator", OPERATORS)
def test_large_scores(operator):
    tensors = [t.to(DEVICE) for t in case(operator, (3, 1, 2, 70, 64), scale=75.0)]
    check(operator, tensors, "triton", times=3)


def test_weights_come_with_the_result():
    tensors = [t.to(DEVICE) for t in case(feature_search, (3, 2, 2, 130, 24))]
    out, weights = feature_search(*tensors, weights=True, backend="triton")
    expected = feature_search(*tensors, weights=True, backend="reference")
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out, expected[0])
