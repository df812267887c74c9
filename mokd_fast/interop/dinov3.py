"""The [CLS] loss of DINOv3 on the fused operator."""

import math
from typing import Any

import torch
from torch import Tensor

from ..ops import Target, cross_view_pairs, distill_cross_entropy
from .lazy import LazyCenterLoss


class DINOLoss(LazyCenterLoss):
    """`DINOLoss` of facebookresearch/dinov3 `dinov3/loss/dino_clstoken_loss.py` (commit 6876159).

    Change this import:
        from dinov3.loss import DINOLoss
        from mokd_fast.interop.dinov3 import DINOLoss

    The mean over all pairs of student and teacher crops, with or without the same crops. The centre
    moves at the softmax after `update_center`.

    Args:
        out_dim: prototypes K.
        student_temp, center_momentum: as named.
    State: `center` [1, K]; a pending update is applied by `state_dict()`, not lost.

    As in DINOv3 the centre is NaN until `init_weights()` or a loaded state. There, the loss is then
    NaN; here `softmax_center_teacher` raises RuntimeError. (Zeros would train, but not as the
    original does where a state was meant to be loaded and was not.)
    `process_group` stands for DINOv3's global process subgroup: None, all ranks, or set it.
    """

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__(torch.full((1, out_dim), math.nan), student_temp, center_momentum)
        self._known_finite = False  # so that the device is asked once, not every step

    def init_weights(self) -> None:
        """Sets the centre to 0."""
        self.center.zero_()
        self._known_finite = True

    def _load_from_state_dict(self, *args: Any) -> None:
        self._known_finite = False
        super()._load_from_state_dict(*args)

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_output: Tensor, teacher_temp: float, update_centers: bool = True
    ) -> Tensor:
        """softmax((logits [..., K] - center) / teacher_temp), fp32, after a pending update.

        update_centers: False leaves the update pending.
        RuntimeError when the centre was neither initialised nor loaded; under torch.compile the
        result is NaN then, as DINOv3's.
        """
        # A compiled step cannot branch on a value.
        if not self._known_finite and not torch.compiler.is_compiling():
            if self.center.isnan().any():
                raise RuntimeError(
                    "the centre of this DINOLoss is NaN: call init_weights() or load a state first"
                )
            self._known_finite = True
        if update_centers:
            return super().softmax_center_teacher(teacher_output, teacher_temp)
        return self._softmax(teacher_output, teacher_temp)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3
    ) -> Tensor:
        """Probabilities [B, K], fp32, of logits [B, K] that Sinkhorn-Knopp assigns together.

        In the log domain, so that no logits overflow. ValueError for n_iterations < 1.
        """
        return self._sinkhorn(teacher_output, teacher_temp, n_iterations)

    def forward(
        self, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False
    ) -> Tensor:
        """student_logits [S, B, K], teacher_probs [T, B, K] -> loss [], fp32.

        ignore_diagonal: leaves out the pairs s == t. ValueError when no pair is left.
        """
        crops, rows = len(student_logits), len(teacher_probs)
        pairs = (
            cross_view_pairs(rows, crops)
            if ignore_diagonal
            else ((1 / max(rows * crops, 1),) * crops,) * rows
        )
        target = Target(pairs, probs=teacher_probs)
        return distill_cross_entropy(student_logits, [target], temperature=self.student_temp)[0]
