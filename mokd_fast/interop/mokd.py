"""The losses of the official MOKD code (skyoux/mokd) on the fused operator."""

from torch import Tensor, nn

from ..ops import Target, distill_cross_entropy
from ..ops.distill import check_temperature
from .dino import DINOLoss
from .shared import temperature_at, temperature_table


class CTSearchLoss(nn.Module):
    """`CTSearchLoss` of skyoux/mokd `models/mokd.py` (commit f7b1386).

    Change this import:
        from models.mokd import DINOLoss, CTSearchLoss
        from mokd_fast.interop.mokd import DINOLoss, CTSearchLoss

    The mean cross-entropy between rows that belong together, without a centre.

    Args:
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs: the teacher's
            temperature rises linearly over the warm-up epochs, then stays, for nepochs in all.
        student_temp: as named.
    State: none. Raises ValueError for a warm-up longer than nepochs or a temperature <= 0.
    Unlike the original the teacher never gets a gradient (its caller detached it).
    """

    def __init__(
        self,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
    ) -> None:
        super().__init__()
        check_temperature("student_temp", student_temp)
        self.student_temp = student_temp
        self.teacher_temp_schedule = temperature_table(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )

    def forward(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        """student and teacher logits [rows, K] -> loss [], fp32.

        ValueError for different shapes; IndexError for an epoch past nepochs.
        """
        if student.ndim != 2 or student.shape != teacher.shape:
            raise ValueError(
                "student and teacher must be logits [rows, K] of one shape, "
                f"got {list(student.shape)} and {list(teacher.shape)}"
            )
        temperature = temperature_at(self.teacher_temp_schedule, epoch)
        target = Target(((1.0,),), teacher.unsqueeze(0), temperature=temperature)
        rows = student.unsqueeze(0)  # [V = 1, rows, K]
        return distill_cross_entropy(rows, [target], temperature=self.student_temp)[0]


__all__ = ["CTSearchLoss", "DINOLoss"]
