"""The checks of `bench/gpu_check.py` for feature_search, joint_attention and a T-Head's search."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.baseline.official import THead as Official
from bench.device import captured
from mokd_fast.nn.heads import THead
from mokd_fast.ops import feature_search, joint_attention

if TYPE_CHECKING:
    from bench.gpu_check import Where

Shape = tuple[int, int, int, int, int]  # Q, B, H, N, d
# Widths of few powers of two: Triton compiles five kernels for each, in each dtype.
SMALL: list[Shape] = [(1, 1, 1, 1, 24), (3, 2, 2, 9, 24), (2, 1, 3, 6, 64), (7, 1, 1, 4, 24)]
FULL: list[Shape] = [*SMALL, (8, 4, 6, 196, 64), (70, 2, 3, 49, 40), (2, 1, 2, 4096, 24)]
FULL += [(8, 2, 6, 65, 128), (196, 2, 6, 197, 64)]
OPERATORS = (feature_search, joint_attention)
# Weights are rounded to 16 bits before they meet the values, as every fused attention does it; the
# CUDA kernels keep them in fp32, and so does the reference.
ROUNDED = {torch.float16: 2**-10, torch.bfloat16: 2**-7}


def call(
    at: "Where", operator: Any, shape: Shape, dtype: torch.dtype, scale: float = 1.0
) -> list[Tensor]:
    """x, k, v, or q, k, v, q_x, k_x, v_x, with the strides that a linear layer gives them."""
    Q, B, H, N, d = shape
    maps = at.randn(B, N, 3, H, d, dtype=dtype, scale=scale).permute(2, 0, 3, 1, 4)
    asking = at.randn(Q, B, 3, H, d, dtype=dtype, scale=scale).movedim(2, 0)
    return [*maps, *asking] if operator is joint_attention else [asking[0], *maps[1:]]


def run(
    operator: Any, tensors: list[Tensor], backend: str, rounded: torch.dtype = torch.float32
) -> list[Tensor]:
    """Results, and gradients for the same cotangents in every dtype: what `rounded` can hold."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    found = operator(*leaves, backend=backend)
    found = found if isinstance(found, tuple) else (found,)
    g = torch.Generator(tensors[0].device).manual_seed(1)
    given = [torch.randn(f.shape, generator=g, device=f.device) for f in found]
    given = [x.to(rounded).to(f.dtype) for x, f in zip(given, found, strict=True)]
    return [*(f.detach() for f in found), *torch.autograd.grad(found, leaves, given)]


def agree(at: "Where", operator: Any, tensors: list[Tensor], times: float = 1.0) -> list[Tensor]:
    """Against float64, no error is larger than the reference's in the same dtype, up to 2e-6 of the
    largest value (1e-12 in fp64; for Triton, the rounding of 16-bit weights)."""
    dtype = tensors[0].dtype
    exact = run(operator, [t.double() for t in tensors], "reference", dtype)
    rough, mine = (run(operator, tensors, b, dtype) for b in ("reference", at.backend))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    if at.backend == "triton":
        tolerance = ROUNDED.get(dtype, tolerance)
    for i, (m, r, e) in enumerate(zip(mine, rough, exact, strict=True)):
        error, allowed = (m - e).abs().max(), (r - e).abs().max()
        top = e.abs().max().clamp(min=1)
        assert top.isfinite() and m.dtype == dtype
        assert error <= times * allowed + tolerance * top, (
            f"{operator.__name__} {dtype} {list(tensors[0].shape)}, result {i}: error {error:.3g}, "
            f"the reference's {allowed:.3g}, largest value {top:.3g}"
        )
    return mine


def search(at: "Where") -> None:
    for dtype in at.dtypes:
        for shape in SMALL if at.small else FULL:
            for operator in OPERATORS:
                agree(at, operator, call(at, operator, shape, dtype))


def search_bad(at: "Where") -> None:
    """Large scores, no queries, a NaN that stays in its row, and the same bits twice."""
    for operator in OPERATORS:
        agree(at, operator, call(at, operator, (3, 1, 2, 6, 64), torch.float32, 75.0), times=3)
        tensors = call(at, operator, (0, 2, 2, 5, 16), torch.float32)
        found, plain = (run(operator, tensors, backend) for backend in (at.backend, "reference"))
        assert all(map(torch.equal, found, plain))
        tensors = call(at, operator, (3, 2, 2, 9, 16), torch.float32)
        first, again = (run(operator, tensors, at.backend) for _ in range(2))
        assert all(map(torch.equal, first, again))
        tensors[-3 if operator is joint_attention else 0][1, 0, 1, 3] = torch.nan
        *_, rows = tuple_of(operator(*tensors, backend=at.backend))
        assert rows[1, 0, 1].isnan().all() and rows.isnan().sum() == 16
    x, k, v = call(at, feature_search, (3, 2, 2, 33, 24), torch.float32)
    pairs = [feature_search(x, k, v, weights=True, backend=b) for b in (at.backend, "reference")]
    torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-6)


def tuple_of(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def heads(at: "Where") -> tuple[THead, THead, Official, tuple[Tensor, tuple[int, int], Tensor]]:
    """A joint and a cross T-Head and the official one of the same weights, with what they take."""
    side, dim, count = (2, 32, 2) if at.small else (7, 384, 6)
    grid = (side, side)
    joint, cross = (
        THead(2 * dim, 8, dim=dim, grid=grid, stem=True, heads=count, search=mode)  # type: ignore
        for mode in ("joint", "cross")
    )
    official = Official(2 * dim, dim, 8, grid, num_heads=count, stem=True)
    for head in (cross, official):
        head.load_state_dict(joint.state_dict())
    official.last_layer = torch.nn.Identity()  # type: ignore[assignment]
    for head in (joint, cross, official):
        head.to(at.device).requires_grad_(False)
    tokens, queries = (at.randn(*s, scale=1.0) for s in ((2, side**2, 2 * dim), (3, 2, dim)))
    return joint, cross, official, (tokens, grid, queries)


def search_head(at: "Where") -> None:
    """A whole search by the kernels of this backend (the environment forces it): joint against the
    official form, cross against plain operators; in fp32 and under autocast, where a student's stem
    gives queries of 16 bits."""
    joint, cross, official, (tokens, grid, queries) = heads(at)
    expected = official(tokens.repeat(3, 1, 1), grid, queries.flatten(0, 1))[0].unflatten(0, (3, 2))
    torch.testing.assert_close(joint.search(tokens, grid, queries), expected, rtol=1e-4, atol=1e-4)
    with at.forcing("reference"):
        plain = cross.search(tokens, grid, queries)
    torch.testing.assert_close(cross.search(tokens, grid, queries), plain, rtol=1e-4, atol=1e-4)
    for half in (t for t in at.dtypes if t.itemsize == 2):
        with torch.autocast(at.device, half):
            for head, whole in ((joint, expected), (cross, plain)):
                for asked in (queries, queries.to(half)):
                    error = (head.search(tokens, grid, asked) - whole).norm() / whole.norm()
                    assert error <= 0.02, (head.mode, half, asked.dtype, float(error))


def search_graph(at: "Where") -> None:
    """Nothing waits for the device, and a captured step follows what changes between replays."""
    for operator in OPERATORS:
        tensors = call(at, operator, (8, 2, 6, 49, 64), torch.float16)

        def step(operator: Any = operator, tensors: list[Tensor] = tensors) -> list[Tensor]:
            leaves = [t.detach().requires_grad_() for t in tensors]
            found = tuple_of(operator(*leaves, backend=at.backend))
            given = [torch.ones_like(f) for f in found]
            return [*found, *torch.autograd.grad(found, leaves, given)]

        step()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        recorded: list[Tensor] = []  # of the last run, which is the one that is captured
        replay = captured(lambda run=step, to=recorded: to.__setitem__(slice(None), run()), "cuda")
        seen = []
        for _ in range(3):
            tensors[0].copy_(at.randn(*tensors[0].shape))
            replay()
            assert all(map(torch.equal, recorded, step()))
            seen.append(recorded[0].float().sum().item())
        assert len(set(seen)) == 3


@torch.no_grad()
def search_far(at: "Where") -> None:
    """More than 2^31 numbers of tokens: the last image gets what it gets alone."""
    shape = (128, 16, 8, 1089, 128)
    assert 128 * 16 * 8 * 1089 * 128 > 2**31
    tensors = call(at, joint_attention, shape, torch.float16)
    tokens, query = joint_attention(*tensors, backend=at.backend)
    last = [t[-1:] for t in tensors[:3]] + [t[:, -1:] for t in tensors[3:]]
    alone = joint_attention(*last, backend=at.backend)
    torch.testing.assert_close((tokens[:, -1:], query[:, -1:]), alone)


CHECKS, ON_GPU = (search, search_bad, search_head), (search_graph, search_far)
