"""The [CLS] and the patch loss of DINOv2 on the fused operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import Target, distill_cross_entropy
from .lazy import LazyCenterLoss
from .shared import check_mask, masked_weights, patch_loss, stack_views


class DINOLoss(LazyCenterLoss):
    """`DINOLoss` of facebookresearch/dinov2 `dinov2/loss/dino_clstoken_loss.py` (commit b8931f7).

    Change this import:
        from dinov2.loss import DINOLoss, iBOTPatchLoss
        from mokd_fast.interop.dinov2 import DINOLoss, iBOTPatchLoss

    The sum, not the mean, over all pairs of the student's list with the teacher's; the caller pairs
    and scales. The centre moves at the softmax after `update_center`.

    Args:
        out_dim: prototypes K.
        student_temp, center_momentum: as named.
    State: `center` [1, K]; a pending update is applied by `state_dict()`, not lost.
    """

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__(torch.zeros(1, out_dim), student_temp, center_momentum)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3
    ) -> Tensor:
        """Probabilities [B, K], fp32, of logits [B, K] that Sinkhorn-Knopp assigns together.

        In the log domain, so that no logits overflow. ValueError for n_iterations < 1.
        """
        return self._sinkhorn(teacher_output, teacher_temp, n_iterations)

    def forward(
        self,
        student_output_list: Sequence[Tensor] | Tensor,
        teacher_out_softmaxed_centered_list: Sequence[Tensor] | Tensor,
    ) -> Tensor:
        """Student logits and teacher probabilities, lists of [B, K] or [views, B, K] -> loss [].

        ValueError for an empty list (the original returns the integer 0) or different shapes.
        """
        student = stack_views("student_output_list", student_output_list)
        teacher = stack_views(
            "teacher_out_softmaxed_centered_list", teacher_out_softmaxed_centered_list
        )
        pairs = ((1.0,) * len(student),) * len(teacher)
        target = Target(pairs, probs=teacher)
        return distill_cross_entropy(student, [target], temperature=self.student_temp)[0]


class iBOTPatchLoss(LazyCenterLoss):
    """`iBOTPatchLoss` of facebookresearch/dinov2 `dinov2/loss/ibot_patch_loss.py` (b8931f7).

    Change this import:
        from dinov2.loss import DINOLoss, iBOTPatchLoss
        from mokd_fast.interop.dinov2 import DINOLoss, iBOTPatchLoss

    The cross-entropy of the masked patches, averaged over the masked patches of an image and then
    over the images; those without a mask count. The centre moves at the softmax after
    `update_center`.

    Args:
        patch_out_dim: prototypes K.
        student_temp, center_momentum: as named.
    State: `center` [1, 1, K]; a pending update is applied by `state_dict()`, not lost.
    Unlike the original it needs no process group, and a step without a masked patch leaves the
    centre alone (it became NaN).
    """

    _names = "teacher_patch_tokens", "patch_out_dim"

    def __init__(
        self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__(torch.zeros(1, 1, patch_out_dim), student_temp, center_momentum)

    # The same as for [CLS], under the argument's name in the original.
    def softmax_center_teacher(self, teacher_patch_tokens: Tensor, teacher_temp: float) -> Tensor:
        """Applies a pending update; softmax((logits [1, M, K] - center) / teacher_temp), fp32."""
        return super().softmax_center_teacher(teacher_patch_tokens, teacher_temp)

    def update_center(self, teacher_patch_tokens: Tensor) -> None:
        """Starts the update by the mean of all logits [1, M, K]; the next call replaces it."""
        super().update_center(teacher_patch_tokens)

    def reduce_center_update(self, teacher_patch_tokens: Tensor) -> None:
        """What `update_center` calls."""
        super().reduce_center_update(teacher_patch_tokens)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor,
        n_iterations: int = 3,
    ) -> Tensor:
        """Probabilities [M, K], fp32, of logits [M, K] that Sinkhorn-Knopp assigns together.

        n_masked_patches_tensor cancels out in Sinkhorn-Knopp; it is neither read nor changed (the
        original sums it over the ranks in place). ValueError for n_iterations < 1.
        """
        return self._sinkhorn(teacher_output, teacher_temp, n_iterations)

    def forward(
        self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor
    ) -> Tensor:
        """All patches: student logits, teacher probabilities [B, N, K], mask [B, N] -> loss []."""
        return patch_loss(
            student_patch_tokens.flatten(0, 1),
            teacher_patch_tokens.flatten(0, 1),
            masked_weights(student_masks_flat, student_patch_tokens).flatten(),
            len(student_masks_flat),
            self.student_temp,
        )

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """The masked patches alone: student logits and teacher probabilities [M, K] -> loss [].

        Args:
            student_masks_flat: boolean [B, N]; B divides the sum.
            n_masked_patches: how many of the M rows are patches; those after them are padding.
            masks_weight: [n_masked_patches], by default 1 / (masked patches of the image).
        ValueError when the weights are not as many as the rows, and for a mask that is not boolean
        where the weights are made of it (as an index, 0 and 1 would be two images).
        """
        if masks_weight is None:
            check_mask("student_masks_flat", student_masks_flat, "BN")
            weights = masked_weights(student_masks_flat, student_patch_tokens_masked)
            masks_weight = weights[student_masks_flat]
        return patch_loss(
            student_patch_tokens_masked[:n_masked_patches],
            teacher_patch_tokens_masked[:n_masked_patches],
            masks_weight,
            len(student_masks_flat),
            self.student_temp,
        )
