"""The DINO and iBOT losses of lightly on the fused operator. The teacher comes first."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.distill import check_temperature
from .shared import (
    check_mask,
    check_prototypes,
    cross_view_step,
    masked_weights,
    patch_loss,
    stack_views,
    updated_center,
)


class DINOLoss(nn.Module):
    """`lightly.loss.DINOLoss` (1.5.21 to 1.6.0).

    Change this import:
        from lightly.loss import DINOLoss
        from mokd_fast.interop.lightly import DINOLoss

    The mean cross-entropy of all teacher views with all student views but their own; the centre
    moves after the loss, inside forward, in eval mode and under no_grad too.

    Args:
        output_dim: prototypes K.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: the teacher's temperature for
            callers that pass an epoch rises linearly over the warm-up epochs, then stays.
        student_temp, center_momentum: as named.
        center_mode: "mean", the only one.
    State: `center` [1, 1, K]. Raises ValueError for another center_mode or student_temp <= 0.
    Unlike the original the teacher never gets a gradient and the loss is fp32 under autocast.
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
    ) -> None:
        super().__init__()
        _check_mode(center_mode)
        self.teacher_temp = teacher_temp
        check_temperature("student_temp", student_temp)
        self.student_temp = student_temp
        self.register_buffer("center", torch.zeros(1, 1, output_dim))
        self.center_momentum = center_momentum
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = torch.linspace(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs
        )

    def forward(
        self,
        teacher_out: Sequence[Tensor],
        student_out: Sequence[Tensor],
        teacher_temp: float | Tensor | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """Lists of logits [B, K] -> loss [], fp32.

        The temperature is teacher_temp, else that of the epoch, else the constructor's.
        ValueError for views of different shapes or another K, and for one view of each: nothing to
        pair.
        """
        if teacher_temp is None:
            teacher_temp = self.teacher_temp if epoch is None else self._temperature_at(epoch)
        teacher = stack_views("teacher_out", teacher_out)
        student = stack_views("student_out", student_out)
        check_prototypes("teacher_out", teacher, "output_dim", self.center.shape[-1])
        check_prototypes("student_out", student, "output_dim", self.center.shape[-1])
        loss, mean = cross_view_step(self, _UPDATE_CENTER, student, teacher, teacher_temp)
        if mean is None:
            self.update_center(teacher)
        else:
            self.center.data = updated_center(self.center, teacher, self.center_momentum, mean)
        return loss

    def _temperature_at(self, epoch: int) -> float | Tensor:
        """Of a compiled step 0-d, from one table with the value after the warm-up that it indexes
        for every epoch; fp64, that teacher_temp keeps its digits."""
        warmup = self.teacher_temp_schedule.double()
        at = min(epoch, self.warmup_teacher_temp_epochs)
        if not torch.compiler.is_compiling():
            return float([*warmup.tolist(), self.teacher_temp][at])
        after = torch.full((1,), self.teacher_temp, dtype=warmup.dtype)
        return torch.cat([warmup, after])[at]

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """Moves the centre towards the mean of teacher_out [V, B, K] over all ranks."""
        self.center.data = updated_center(self.center, teacher_out, self.center_momentum)


_UPDATE_CENTER = DINOLoss.update_center  # another in its place, in a subclass too, is called


class IBOTPatchLoss(nn.Module):
    """`lightly.loss.IBOTPatchLoss` (1.6.0).

    Change this import:
        from lightly.loss import IBOTPatchLoss
        from mokd_fast.interop.lightly import IBOTPatchLoss

    The cross-entropy of the masked patches, averaged over the masked patches of an image and then
    over the images; those without a mask count. The centre moves after the loss, inside forward.

    Args:
        output_dim: prototypes K.
        teacher_temp, student_temp, center_momentum: as named.
        center_mode: "mean", the only one.
    State: `center.center` [1, K]. Raises ValueError for another center_mode or student_temp <= 0.
    Unlike the original the teacher never gets a gradient, and a step without a masked patch leaves
    the centre alone (it became NaN).
    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        _check_mode(center_mode)
        self.teacher_temp = teacher_temp
        check_temperature("student_temp", student_temp)
        self.student_temp = student_temp
        self.center = _Center(output_dim, center_momentum)

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor,
        teacher_temp: float | Tensor | None = None,
    ) -> Tensor:
        """Logits [M, K] of the M patches that the boolean mask [B, H, W] marks -> loss [], fp32.

        teacher_temp: instead of the constructor's. ValueError when the mask marks another number
        or is not boolean [B, H, W], and for another K.
        """
        check_mask("mask", mask)
        prototypes = self.center.value.shape[-1]
        check_prototypes("teacher_out", teacher_out, "output_dim", prototypes)
        check_prototypes("student_out", student_out, "output_dim", prototypes)
        loss = patch_loss(
            student_out,
            teacher_out,
            masked_weights(mask.flatten(1), student_out)[mask.flatten(1)],
            len(mask),
            self.student_temp,
            center=self.center.value,
            teacher_temp=self.teacher_temp if teacher_temp is None else teacher_temp,
        )
        self.center.update(teacher_out)
        return loss


class _Center(nn.Module):
    """The buffer `center` [1, K] under the name that lightly's checkpoints have for it."""

    center: Tensor

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, prototypes))

    @property
    def value(self) -> Tensor:
        """The centre [1, K]."""
        return self.center

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Moves the centre towards the mean of x [rows, K] over all ranks."""
        self.center = updated_center(self.center, x, self.momentum)


def _check_mode(mode: str) -> None:
    if mode != "mean":
        raise ValueError(f"center_mode must be 'mean', the only one, got {mode!r}")
