"""The loss of facebookresearch/dino, the same as the official MOKD's, on the fused operator."""

import torch
from torch import Tensor, nn

from ..ops.distill import check_temperature
from .shared import (
    check_prototypes,
    cross_view_step,
    split_views,
    temperature_at,
    temperature_table,
    updated_center,
)


class DINOLoss(nn.Module):
    """`DINOLoss` of facebookresearch/dino `main_dino.py` (commit 7c446df) and of skyoux/mokd.

    Change this import:
        from main_dino import DINOLoss
        from mokd_fast.interop.dino import DINOLoss

    The mean cross-entropy of the two teacher views with all student views but their own; the centre
    moves after the loss, inside forward, in eval mode and under no_grad too.

    Args:
        out_dim: prototypes K.
        ncrops: student views V, the two global ones first.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs: the teacher's
            temperature rises linearly over the warm-up epochs, then stays, for nepochs in all.
        student_temp, center_momentum: as named.
    State: `center` [1, K].
    Raises ValueError for a warm-up longer than nepochs or a temperature <= 0.
    Unlike the original it needs no process group, is fp32 for 16-bit logits without autocast
    too, and says what is wrong with ragged views.
    """

    center: Tensor
    _argument = "out_dim"  # what the user calls K

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        check_temperature("student_temp", student_temp)
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.ncrops = ncrops
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_temp_schedule = temperature_table(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        """student_output [ncrops * B, K] and teacher_output [2 * B, K] -> loss [], fp32.

        ValueError for rows that do not divide or another K; IndexError for an epoch past nepochs.
        """
        prototypes = self.center.shape[-1]
        check_prototypes("student_output", student_output, self._argument, prototypes)
        check_prototypes("teacher_output", teacher_output, self._argument, prototypes)
        loss, mean = cross_view_step(
            self,
            _UPDATE_CENTER,
            split_views("student_output", student_output, self.ncrops),
            split_views("teacher_output", teacher_output, 2),
            temperature_at(self.teacher_temp_schedule, epoch),
        )
        if mean is None:
            self.update_center(teacher_output)
        else:
            momentum = self.center_momentum
            self.center = updated_center(self.center, teacher_output, momentum, mean)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Moves the centre towards the mean of teacher_output [rows, K] over all ranks."""
        self.center = updated_center(self.center, teacher_output, self.center_momentum)


_UPDATE_CENTER = DINOLoss.update_center  # another in its place, in a subclass too, is called
