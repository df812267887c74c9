"""The checks of `bench/gpu_check.py` for linear_distill_cross_entropy, chunks and products."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import captured
from mokd_fast.ops import (
    LinearTarget,
    Target,
    cross_view_pairs,
    linear_distill_cross_entropy,
    matched_pairs,
)

if TYPE_CHECKING:
    from bench.gpu_check import Where

Targets = list[LinearTarget | Target]


def run(at: "Where", x: Tensor, w: Tensor, targets: Targets, backend: str = "", **options: Any):
    """Loss, terms and the gradients of features and prototypes."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss, terms = linear_distill_cross_entropy(
        x, w, targets, backend=backend or at.backend, **options
    )
    return [loss.detach(), terms, *torch.autograd.grad(loss, (x, w))]


def call(
    at: "Where", v: int, t: int, b: int, k: int, d: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Targets]:
    """DINO's: normalised features and prototypes, a teacher's target with a centre; a second one of
    the student's own prototypes, with row weights; and one of given probabilities."""
    x, h, w, other = (
        F.normalize(torch.randn(*shape, device=at.device), dim=-1).to(dtype)
        for shape in ((v, b, d), (t, b, d), (k, d), (k, d))
    )
    targets = [
        LinearTarget(cross_view_pairs(t, v), h, other, 0.04, at.randn(k, scale=0.1)),
        LinearTarget(matched_pairs(v, 1), x[1:], w, 0.07, None, 0.3, at.randn(b).abs()),
        Target(((0.5,) * v,), probs=0.7 * at.randn(1, b, k).softmax(-1), weight=0.1),
    ]
    return x, w, targets


def wide(target: LinearTarget | Target) -> LinearTarget | Target:
    found = {n: x.double() for n, x in vars(target).items() if isinstance(x, Tensor)}
    return replace(target, **found)


def agree(at: "Where", x: Tensor, w: Tensor, targets: Targets, chunk: int | None) -> None:
    """Against float64, no error is larger than twice the reference's in the same dtype, up to 1e-6
    of the largest value (1e-12 in fp64): the products of chunks are added up in another order."""
    exact = run(at, x.double(), w.double(), [wide(t) for t in targets], "reference")
    rough, mine = run(at, x, w, targets, "reference"), run(at, x, w, targets, chunk=chunk)
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-6
    for name, m, r, e in zip(("loss", "terms", "dX", "dW"), mine, rough, exact, strict=True):
        error, allowed, top = (m - e).abs().max(), (r - e).abs().max(), e.abs().max()
        assert top.isfinite() and m.dtype == r.dtype
        assert error <= 2 * allowed + tolerance * top, (
            f"{name} of {x.dtype} {list(x.shape)}, {len(w)} prototypes, chunks of {chunk}: error "
            f"{error:.3g}, the reference's {allowed:.3g}, largest value {top:.3g}"
        )


def linear(at: "Where") -> None:
    """Three chunks, the last one shorter, and one; prototypes of the products' type and of fp32."""
    for dtype in at.dtypes:
        x, w, targets = call(at, 3, 2, 2, 520, 16, dtype)
        agree(at, x, w, targets, None)
        agree(at, x, w.float(), targets, 256)
        if not at.small:
            agree(at, *call(at, 10, 2, 64, 65536, 256, dtype), None)


def linear_bad(at: "Where") -> None:
    """NaN stays in its image, no images give zeros, and two calls give the same bits."""
    x, w, targets = call(at, 3, 2, 2, 520, 16, torch.float32)
    first, again = (run(at, x, w, targets, chunk=256) for _ in range(2))
    assert all(map(torch.equal, first, again))
    x[1, 1, 3] = torch.nan
    loss, _, dx, _ = run(at, x, w, targets[:1], chunk=256)
    assert loss.isnan() and dx[1, 1].isnan().all() and dx[:, 0].isfinite().all()
    loss, _, dx, dw = run(at, *call(at, 3, 2, 0, 520, 16, torch.float32), chunk=256)
    assert loss == 0 and dx.shape == (3, 0, 16) and not dw.any()


def linear_graph(at: "Where") -> None:
    """Nothing waits for the device, and a captured step follows what changes between replays."""
    x, w, targets = call(at, 4, 2, 3, 1300, 64, torch.bfloat16)
    tau = torch.tensor(0.04, device=at.device)
    moving: Targets = [replace(targets[0], temperature=tau)]

    def step() -> list[Tensor]:
        with torch.autocast(at.device, torch.bfloat16):
            return run(at, x, w.float(), moving, chunk=512)

    step()  # compiles; the pairs travel to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    recorded: list[Tensor] = []  # of the last run, which is the one that is captured
    replay = captured(lambda: recorded.__setitem__(slice(None), step()), "cuda")
    seen = []
    for number in (0.04, 0.05, 0.07):
        tau.fill_(number)
        replay()
        assert all(map(torch.equal, recorded, step()))
        seen.append(recorded[0].item())
    assert len(set(seen)) == 3


CHECKS, ON_GPU = (linear, linear_bad), (linear_graph,)
