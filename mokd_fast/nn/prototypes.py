"""Prototypes, and a loss for other people's code that owns a student's and a teacher's.

Letters: V student views, T teacher rows, B images, K prototypes, D features.
"""

import torch
from torch import Tensor, nn

from ..ops import Center, LinearTarget, cross_view_pairs, ema_update_, prototype_loss
from ..ops.center import LinearLogits
from ..ops.distill import Pairs
from ..ops.linear_distill import product_dtype
from ..ops.prototype_linear import prototype_linear
from ..ops.weight_norm import WeightNormed


class Prototypes(nn.Module):
    """Weight-normed linear layer without bias: logits = x @ (g * v / |v|).T. [.., D] -> [.., K]

    Key names, start (g = 1, v as nn.Linear's weight) and the frozen g are DINO's `last_layer`.
    """

    def __init__(self, dim: int, prototypes: int, *, train_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(nn.Linear(dim, prototypes, bias=False).weight.detach())

    def matrix(self, like: Tensor | None = None) -> Tensor:
        """g * v / |v|, [K, D]. Made anew at every call: call it once a step.

        With features `like` [.., D] it has the dtype that a product with them takes here, that of
        autocast where it is on.
        """
        dtype = None if like is None else product_dtype(like)
        return self.normed().matrix(dtype)

    def normed(self, seen: dict[Tensor, Tensor] | None = None) -> WeightNormed:
        """The same, not made yet: products may do without. `seen`: as of `WeightNormed`."""
        return WeightNormed(self.weight_v, self.weight_g, seen)

    def forward(self, x: Tensor) -> Tensor:
        return prototype_linear(x, self.normed(), product_dtype(x))


class PrototypeLoss(nn.Module):
    """DINO's loss together with the prototype layers of student and teacher.

    It takes the features that a DINO head ends in before its `last_layer`, L2-normalised or not,
    so that the logits need not be stored (see `mokd_fast.ops.prototype_loss`). The prototypes
    belong to the optimizer: pass `parameters()`; the teacher's are their EMA.

    Args:
        dim: D of the features.
        prototypes: K.
        student_temperature, teacher_temperature: > 0.
        center_momentum: of the moving mean of the teacher's logits.
        train_norm: train the norms g of the prototypes, which else stay 1 (DINO's
            norm_last_layer=True).
        backend: "fused", "fused-linear", "reference" or None, as for `prototype_loss`.

    `student` and `teacher` are `Prototypes` with the keys of DINO's last_layer, `center` a
    `Center`. Nothing changes in `forward`: it can be checkpointed, compiled, called several times a
    step and wrapped in DistributedDataParallel.

    Example:
        >>> import torch
        >>> loss = PrototypeLoss(dim=16, prototypes=32)
        >>> student, teacher = torch.randn(4, 8, 16), torch.randn(2, 8, 16)
        >>> loss(student, teacher).backward()
        >>> loss.update(teacher, momentum=0.996)  # after the optimizer's step
    """

    def __init__(
        self,
        dim: int,
        prototypes: int,
        *,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
        train_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.student = Prototypes(dim, prototypes, train_norm=train_norm)
        self.teacher = Prototypes(dim, prototypes, train_norm=train_norm)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.center = Center(prototypes, center_momentum)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.backend = backend

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        teacher_temperature: float | Tensor | None = None,
        pairs: Pairs | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-d fp32 (fp64 for fp64), with gradients for `student` and its prototypes.

        Args:
            student: features of the student's views [V, B, D], the teacher's views first.
            teacher: features of the teacher's views [T, B, D].
            teacher_temperature: in place of the constructor's; a 0-d tensor when it changes in a
                compiled step.
            pairs: T rows of V weights; None for every teacher view with every other student view.
            row_weight: [B], the weight of each image; None for 1.

        Raises ValueError for what `linear_distill_cross_entropy` does not take.
        """
        tau = self.teacher_temperature if teacher_temperature is None else teacher_temperature
        target = LinearTarget(
            cross_view_pairs(len(teacher), len(student)) if pairs is None else pairs,
            teacher,
            self.teacher.matrix(teacher),
            tau,
            self.center.value,
            row_weight=row_weight,
        )
        loss, _ = prototype_loss(
            student,
            self.student.normed(),
            [target],
            temperature=self.student_temperature,
            backend=self.backend,
        )
        return loss

    @torch.no_grad()
    def update(
        self, teacher: Tensor, momentum: float | Tensor, *, skip: Tensor | None = None
    ) -> None:
        """Moves the centre and the teacher's prototypes; once, after the optimizer's step.

        Args:
            teacher: its features [..., D] of this step; with gradient accumulation those of all
                micro-batches (torch.cat).
            momentum: of the teacher's EMA, the same as for the rest of the teacher.
            skip: 0-d bool on the device: where it is set, the centre stays as it is.
        """
        self.center.update(LinearLogits(teacher, self.teacher.matrix(teacher)), skip=skip)
        ema_update_(list(self.teacher.parameters()), list(self.student.parameters()), momentum)
