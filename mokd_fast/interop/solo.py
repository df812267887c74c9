"""The DINO loss of solo-learn on the fused operator."""

import torch
from torch import Tensor, nn

from ..ops.distill import _check_temperature
from .shared import (
    check_prototypes,
    cross_view_loss,
    split_views,
    temperature_at,
    temperature_table,
    updated_center,
)


class DINOLoss(nn.Module):
    """`DINOLoss` of vturrisi/solo-learn `solo/losses/dino.py` (commit 9187ea3).

    Change this import:
        from solo.losses.dino import DINOLoss
        from mokd_fast.interop.solo import DINOLoss

    DINO's loss with two teacher views; the trainer sets the attribute `epoch` (0 at first). The
    centre moves after the loss, inside forward, in eval mode and under no_grad too.

    Args:
        num_prototypes: K.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, num_epochs: the teacher's
            temperature rises linearly over the warm-up epochs, then stays, for num_epochs in all.
        student_temp, center_momentum: as named.
        num_large_crops: student views V.
    State: `center` [1, K].
    Raises ValueError for a warm-up longer than num_epochs or a temperature <= 0.
    """

    center: Tensor

    def __init__(
        self,
        num_prototypes: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        num_epochs: int,
        student_temp: float = 0.1,
        num_large_crops: int = 2,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.epoch = 0
        _check_temperature("student_temp", student_temp)
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.num_large_crops = num_large_crops
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        self.teacher_temp_schedule = temperature_table(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, num_epochs
        )

    def forward(self, student_output: Tensor, teacher_output: Tensor) -> Tensor:
        """student_output [num_large_crops * B, K], teacher_output [2 * B, K] -> loss [], fp32.

        ValueError for rows that do not divide or another K; IndexError for an `epoch` past
        num_epochs.
        """
        prototypes = self.center.shape[-1]
        check_prototypes("student_output", student_output, "num_prototypes", prototypes)
        check_prototypes("teacher_output", teacher_output, "num_prototypes", prototypes)
        loss = cross_view_loss(
            split_views("student_output", student_output, self.num_large_crops),
            split_views("teacher_output", teacher_output, 2),
            self.center,
            self.student_temp,
            temperature_at(self.teacher_temp_schedule, self.epoch),
        )
        self.update_center(teacher_output)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Moves the centre towards the mean of teacher_output [rows, K] over all ranks."""
        self.center = updated_center(self.center, teacher_output, self.center_momentum)
