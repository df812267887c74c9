"""Every drop-in loss with its own calling convention, on the same student and teacher logits.

The student has V = 4 views, the teacher T = 2, both of B = 6 images and K prototypes. A patch loss
takes the first two views as 2 images of N = 6 patches, of which MASK marks some.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mokd_fast.interop import dino, dinov2, dinov3, ibot, lightly, mokd, solo
from tests.interop import oracle

V, T, B, K = 4, 2, 6, 13
TAU, TAU_PATCH = 0.0625, 0.09375  # fp32 holds them exactly, as it must in lightly's constructor
MASK = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()  # [2, B]


@dataclass
class Case:
    name: str
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor], Tensor]
    formula: Callable[[Tensor, Tensor, Tensor], Tensor]  # (student, teacher, center [K])
    state: dict[str, tuple[int, ...]]
    center: str | None  # the entry of the state dict that belongs to the formula


def logits(step: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    both = torch.randn(V + T, B, K, generator=g, dtype=torch.float64) * 2
    return both[:V].to(dtype), (both[V:] + 0.5).to(dtype)


def center_of(case: Case, loss: nn.Module) -> Tensor:
    return torch.zeros(K) if case.center is None else loss.state_dict()[case.center].flatten()


def _cat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _dinov2(loss, student, teacher):
    """As DINOv2's trainer scales its local and global terms."""
    local = V - 2
    # The trainer hands the teacher's views over in the order B, A: that pairs A with B.
    swapped = teacher.flip(0)
    probs = loss.softmax_center_teacher(_cat(swapped), TAU).view(T, -1, K)
    loss.update_center(_cat(swapped))
    far = loss(student[2:].unbind(), probs) / (2 + 2 * local)
    near = loss([_cat(student[:2])], [_cat(probs)]) * 2 / (2 + 2 * local)
    return far + near


def _dinov3(loss, student, teacher):
    """As DINOv3's trainer weighs its local and global terms."""
    near, far = 2, T * (V - 2)
    probs = loss.softmax_center_teacher(_cat(teacher), TAU).view(T, -1, K)
    loss.update_center(_cat(teacher))
    total = loss(student[:2], probs, ignore_diagonal=True) * near
    return (total + loss(student[2:], probs) * far) / (near + far)


def _ibot(term: str):
    def call(loss, student, teacher):
        masks = [row.view(1, 2, 3) for row in MASK]
        return loss(
            (_cat(student[:2]), student[:2]),
            (_cat(teacher), teacher),
            _cat(student[2:]),
            masks,
            0,
        )[term]

    return call


def _dinov2_patch(loss, student, teacher):
    # [1, M, K], as the trainer calls it
    rows = teacher[MASK].unsqueeze(0)
    probs = loss.softmax_center_teacher(rows, TAU_PATCH).squeeze(0)
    loss.update_center(rows)
    return loss.forward_masked(student[:2][MASK], probs, MASK)


def _dinov3_build():
    loss = dinov3.DINOLoss(K)
    loss.init_weights()
    return loss


def _ibot_build():
    return ibot.iBOTLoss(K, K, 2, V - 2, TAU, TAU, TAU_PATCH, TAU_PATCH, 0, 9)


def _dino(student, teacher, center):
    return oracle.dino(student, teacher, center, TAU)


def _patches(student, teacher, center):
    return oracle.patches(student[:2], teacher, MASK, center, TAU_PATCH)


ONE = {"center": (1, K)}
IBOT = {"center": (1, K), "center2": (1, 1, K)}
CASES = [
    Case(
        "dino",
        lambda: dino.DINOLoss(K, V, TAU, TAU, 0, 9),
        lambda loss, s, t: loss(_cat(s), _cat(t), 0),
        _dino,
        ONE,
        "center",
    ),
    Case(
        "mokd search",
        lambda: mokd.CTSearchLoss(TAU, TAU, 0, 9),
        lambda loss, s, t: loss(_cat(s[:2]), _cat(t), 0),
        lambda s, t, c: oracle.dino([_cat(t) * 0, _cat(s[:2])], [_cat(t)], c, TAU),
        {},
        None,
    ),
    Case(
        "solo",
        lambda: solo.DINOLoss(K, TAU, TAU, 0, 9, num_large_crops=V),
        lambda loss, s, t: loss(_cat(s), _cat(t)),
        _dino,
        ONE,
        "center",
    ),
    Case(
        "lightly",
        lambda: lightly.DINOLoss(K, teacher_temp=TAU),
        lambda loss, s, t: loss(t.unbind(), s.unbind()),
        _dino,
        {"center": (1, 1, K)},
        "center",
    ),
    Case(
        "lightly patch",
        lambda: lightly.IBOTPatchLoss(K, TAU_PATCH),
        lambda loss, s, t: loss(t[MASK], s[:2][MASK], MASK.view(2, 2, 3)),
        _patches,
        {"center.center": (1, K)},
        "center.center",
    ),
    Case("ibot cls", _ibot_build, _ibot("cls"), _dino, IBOT, "center"),
    Case("ibot patch", _ibot_build, _ibot("patch"), _patches, IBOT, "center2"),
    Case("dinov2", lambda: dinov2.DINOLoss(K), _dinov2, _dino, ONE, "center"),
    Case(
        "dinov2 patch",
        lambda: dinov2.iBOTPatchLoss(K),
        _dinov2_patch,
        _patches,
        {"center": (1, 1, K)},
        "center",
    ),
    Case("dinov3", _dinov3_build, _dinov3, _dino, ONE, "center"),
]
MASKED_ROWS_ONLY = {"lightly patch", "dinov2 patch"}  # ibot's centre moves by all patches
