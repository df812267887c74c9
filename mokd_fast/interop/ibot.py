"""The loss of bytedance/ibot on the fused operator."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.distill import check_temperature
from .shared import (
    check_prototypes,
    cross_view_loss,
    masked_weights,
    patch_loss,
    split_views,
    temperature_at,
    temperature_table,
    updated_center,
)


class iBOTLoss(nn.Module):
    """`iBOTLoss` of bytedance/ibot `main_ibot.py` (commit da316d8).

    Change this import:
        from main_ibot import iBOTLoss
        from mokd_fast.interop.ibot import iBOTLoss

    The [CLS] cross-entropy over all pairs of different views plus the cross-entropy of the masked
    patches of the global views. Both centres move after the loss, inside forward, in eval mode and
    under no_grad too, the patch centre by all patches and not only the masked ones.

    Args:
        out_dim, patch_out_dim: prototypes K of the [CLS] and K' of the patch head.
        ngcrops, nlcrops: global and local views.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs: the teacher's [CLS]
            temperature rises linearly over the warm-up epochs, then stays, for nepochs in all.
        warmup_teacher_temp2, teacher_temp2: likewise for the patches, from mim_start_epoch on.
        student_temp, center_momentum, center_momentum2: as named, 2 for the patches.
        lambda1, lambda2: factors of the [CLS] and the patch term.
    State: `center` [1, K], `center2` [1, 1, K'].
    Raises ValueError for a warm-up longer than nepochs or a temperature <= 0.
    Unlike the original it needs no process group.
    """

    center: Tensor
    center2: Tensor

    def __init__(
        self,
        out_dim: int,
        patch_out_dim: int,
        ngcrops: int,
        nlcrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp2: float,
        teacher_temp2: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_momentum2: float = 0.9,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        mim_start_epoch: int = 0,
    ) -> None:
        super().__init__()
        check_temperature("student_temp", student_temp)
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.center_momentum2 = center_momentum2
        self.ngcrops = ngcrops
        self.nlcrops = nlcrops
        self.ncrops = ngcrops + nlcrops
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("center2", torch.zeros(1, 1, patch_out_dim))
        self.lambda1 = lambda1
        self.lambda2 = lambda2
        warmup = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = temperature_table(
            warmup_teacher_temp, teacher_temp, warmup, nepochs
        )
        self.teacher_temp2_schedule = temperature_table(
            warmup_teacher_temp2, teacher_temp2, warmup, nepochs, delay=mim_start_epoch
        )

    def forward(
        self,
        student_output: tuple[Tensor, Tensor],
        teacher_output: tuple[Tensor, Tensor],
        student_local_cls: Tensor | None,
        student_mask: Sequence[Tensor],
        epoch: int,
    ) -> dict[str, Tensor]:
        """The terms `cls` and `patch`, scaled, and `loss`, their sum: [] each, fp32.

        Args:
            student_output, teacher_output: [CLS] logits [ngcrops * B, K] and patch logits
                [ngcrops * B, N, K'] of the global views.
            student_local_cls: [CLS] logits [nlcrops * B, K] of the local views, or None.
            student_mask: for each global view a mask [B, H, W], H * W = N, boolean or 0 and 1.
            epoch: IndexError past nepochs.
        ValueError for rows that do not divide, another K, no masks or masks of another size.
        """
        student_cls, student_patch = student_output
        teacher_cls, teacher_patch = teacher_output
        self._check("student_output", student_output)
        self._check("teacher_output", teacher_output)
        if student_local_cls is not None:
            prototypes = self.center.shape[-1]
            check_prototypes("student_local_cls", student_local_cls, "out_dim", prototypes)
            student_cls = torch.cat([student_cls, student_local_cls])
        cls = cross_view_loss(
            split_views("[CLS] logits of the student", student_cls, self.ncrops),
            split_views("[CLS] logits of the teacher", teacher_cls, self.ngcrops),
            self.center,
            self.student_temp,
            temperature_at(self.teacher_temp_schedule, epoch),
            self.lambda1,
        )
        mask = self._flat(student_mask)  # [ngcrops * B, N]
        patch = patch_loss(
            student_patch.flatten(0, 1),
            teacher_patch.flatten(0, 1),
            masked_weights(mask, student_patch).flatten(),
            len(mask),
            self.student_temp,
            center=self.center2,
            teacher_temp=temperature_at(self.teacher_temp2_schedule, epoch),
            weight=self.lambda2,
        )
        self.update_center(teacher_cls, teacher_patch)
        return {"cls": cls, "patch": patch, "loss": cls + patch}

    def _check(self, name: str, output: tuple[Tensor, Tensor]) -> None:
        """The K of both heads."""
        check_prototypes(f"{name}[0]", output[0], "out_dim", self.center.shape[-1])
        check_prototypes(f"{name}[1]", output[1], "patch_out_dim", self.center2.shape[-1])

    def _flat(self, student_mask: Sequence[Tensor]) -> Tensor:
        """The masks of the global views as one [ngcrops * B, N]."""
        if student_mask is None:
            raise ValueError(
                "student_mask must list a mask [B, H, W] for each global view, got None"
            )
        return torch.cat([mask.flatten(-2) for mask in student_mask[: self.ngcrops]])

    @torch.no_grad()
    def update_center(self, teacher_cls: Tensor, teacher_patch: Tensor) -> None:
        """Moves both centres: teacher_cls [rows, K], teacher_patch [rows, N, K'], all patches."""
        self.center = updated_center(self.center, teacher_cls, self.center_momentum)
        self.center2 = updated_center(self.center2, teacher_patch, self.center_momentum2)
