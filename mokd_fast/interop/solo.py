"""The DINO loss of solo-learn on the fused operator: DINO's, called in another way."""

from torch import Tensor

from . import dino


class DINOLoss(dino.DINOLoss):
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

    _argument = "num_prototypes"

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
        super().__init__(
            num_prototypes,
            num_large_crops,
            warmup_teacher_temp,
            teacher_temp,
            warmup_teacher_temp_epochs,
            num_epochs,
            student_temp,
            center_momentum,
        )
        self.epoch = 0
        self.num_large_crops = num_large_crops

    def forward(self, student_output: Tensor, teacher_output: Tensor) -> Tensor:  # type: ignore
        """student_output [num_large_crops * B, K], teacher_output [2 * B, K] -> loss [], fp32.

        ValueError for rows that do not divide or another K; IndexError for an `epoch` past
        num_epochs.
        """
        return super().forward(student_output, teacher_output, self.epoch)
