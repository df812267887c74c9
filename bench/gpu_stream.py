"""The checks of `bench/gpu_check.py` that need a GPU: streams, graphs, no synchronisation, size."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mokd_fast.interop.dino import DINOLoss

if TYPE_CHECKING:
    from bench.gpu_check import Where


def asynchronous(at: "Where") -> None:
    """Forward and backward never wait for the device, new temperatures and weights included; nor
    does the drop-in loss with its centre."""
    student, target = at.dino(4, 2, 2, 4097)
    drop_in = DINOLoss(4097, 4, 0.04, 0.07, 2, 4).to(at.device)

    def step(**options: Any) -> None:
        at.run(student, replace(target, **options), temperature=2 * options["temperature"])
        leaf = student.flatten(0, 1).requires_grad_()
        drop_in(leaf, target.logits.flatten(0, 1), 0).backward()

    step(temperature=0.05)  # compiles; the pairs travel to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(temperature=0.05)
        step(temperature=0.07, weight=0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def own_stream(at: "Where") -> None:
    """On a side stream the kernels see what that stream wrote before them: it is held up first."""
    student, target = at.dino(4, 2, 2, 4097)
    expected = at.run(student, target)
    late, side = torch.zeros_like(student), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles
        late.copy_(student)
        mine = at.run(late, target)
    torch.cuda.synchronize()
    assert all(map(torch.equal, mine, expected))


def graph(at: "Where") -> None:
    """A captured step follows temperatures, weights and logits that change between its replays."""
    student, target = at.dino(4, 2, 2, 4097, torch.bfloat16)
    scalars = torch.tensor([0.1, 0.05, 1.0], device=at.device)
    moving = replace(target, temperature=scalars[1], weight=scalars[2])

    def step() -> list[Tensor]:
        return at.run(student, moving, temperature=scalars[0])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch.cuda.graph asks for
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        captured = step()
    seen = []
    for numbers in ((0.1, 0.05, 1.0), (0.2, 0.05, 1.0), (0.1, 0.07, 1.0), (0.1, 0.05, 0.5)):
        scalars.copy_(torch.tensor(numbers))
        student.copy_(at.randn(*student.shape))
        recorded.replay()
        assert all(map(torch.equal, captured, step()))
        seen.append(captured[0].item())
    assert len(set(seen)) == 4


def far(at: "Where") -> None:
    """More than 2^31 student logits: the last images get the gradient that they get alone."""
    v, t, b, k = 10, 2, 3300, 65536
    assert v * b * k > 2**31
    student = torch.empty(v, b, k, device=at.device, dtype=torch.bfloat16).normal_(std=0.2)
    _, target = at.dino(v, t, b, k, torch.bfloat16)
    loss, _, gradient = at.run(student, target)
    last = replace(target, logits=target.logits[:, -4:].contiguous())
    alone = at.run(student[:, -4:].contiguous(), last)[2]
    assert loss.isfinite()
    mine = gradient[:, -4:].float() * (b / 4)
    torch.testing.assert_close(mine, alone.float(), rtol=0.01, atol=1e-6)  # bf16


CHECKS = (asynchronous, own_stream, graph, far)
