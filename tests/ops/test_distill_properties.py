"""distill_cross_entropy against the official double loop in float64, as Hypothesis calls it.

Loss, terms and gradient for any shapes, pairs, types, strides, centres, weights and temperatures.
Examples are the same in every run.
"""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mokd_fast.ops import Target

from .oracle import check, official, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# The fixture forces kernels, the same for all examples.
few = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
columns = st.one_of(st.integers(1, 70), st.sampled_from([96, 255, 1024, 2049, 2080, 8224]))
taus = st.integers(1, 64).map(lambda n: n / 32)  # the same number in fp32 and fp64


def tensor(draw, rows, b, k, dtype):
    """Logits [rows, B, K] in one of the layouts that a model may hand over."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, b, k, generator=g) * draw(st.sampled_from([0.1, 3.0, 30.0]))
    layout = draw(st.sampled_from(["dense", "images first", "columns first", "cut", "one image"]))
    if layout == "images first":
        return x.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "columns first":
        return x.to(dtype).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if layout == "cut":
        wide = torch.full((rows, b + 1, k + 3), torch.nan, dtype=dtype)
        wide[:, 1:, 1:-2] = x
        return wide[:, 1:, 1:-2]
    return x[:, :1].to(dtype).expand(rows, b, k) if layout == "one image" and b else x.to(dtype)


def target(draw, v, b, k):
    t = draw(st.integers(1, 6))
    weight = st.sampled_from([0.0, 0.0, 0.25, 1.0, 3.5])
    pairs = draw(st.lists(st.lists(weight, min_size=v, max_size=v), min_size=t, max_size=t))
    pairs[draw(st.integers(0, t - 1))][draw(st.integers(0, v - 1))] = 0.5  # something to pair
    rows = tensor(draw, t, b, k, draw(st.sampled_from(DTYPES)))
    row_weight = torch.linspace(0, 2, b) if draw(st.booleans()) else None
    options = {"weight": draw(st.sampled_from([1.0, 0.0, 0.3])), "row_weight": row_weight}
    pairs = tuple(map(tuple, pairs))
    if draw(st.booleans()):
        return Target(pairs, probs=rows.double().softmax(-1).to(rows.dtype), **options)
    center = tensor(draw, 1, 1, k, torch.float32)[0, 0] if draw(st.booleans()) else None
    return Target(pairs, rows, temperature=draw(taus), center=center, **options)


@st.composite
def calls(draw):
    """Student, targets, temperature."""
    v, b, k = draw(st.integers(1, 6)), draw(st.integers(0, 3)), draw(columns)
    student = tensor(draw, v, b, k, draw(st.sampled_from(DTYPES)))
    return student, [target(draw, v, b, k) for _ in range(draw(st.integers(1, 3)))], draw(taus)


@few
@given(calls())
def test_kernels(kernels, call):
    check(*call)


@few
@given(calls())
def test_reference(call):
    student, targets, temperature = call
    results, _ = official(student, targets, temperature)
    mine = run(student.double(), targets, temperature, "reference")
    for have, exact in zip(mine, results, strict=True):
        torch.testing.assert_close(have, exact, rtol=1e-11, atol=1e-14)
