"""The teacher side of the DINOv2 and DINOv3 losses: a centre that moves one call later."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import sinkhorn_center
from ..ops.center import moved_center, rank_mean
from ..ops.distill import check_temperature
from .shared import check_prototypes, reduce_ranks


class LazyCenterLoss(nn.Module):
    """Teacher probabilities by centring or by Sinkhorn-Knopp, as DINOv2 and DINOv3 have them.

    `update_center` starts the all-reduce and returns; the centre moves when it is needed next: in
    `softmax_center_teacher`, or, where the originals lose the update, in `state_dict()`, `.to()`, a
    copy or a pickle. Loading a state drops what was pending: it belongs to the centre that is
    replaced. ValueError for teacher logits of another K and for a temperature <= 0, the student's
    at construction.

    process_group: the ranks to reduce over, None for all; an attribute, set it before the first
    call. Attributes as in the originals: student_temp, center_momentum, updated, reduce_handle,
    async_batch_center (here [K + 1]: the mean, then how many ranks have one).
    """

    center: Tensor
    _names = "teacher_output", "out_dim"  # of the logits and of K, for the user's errors

    def __init__(self, center: Tensor, student_temp: float, center_momentum: float) -> None:
        super().__init__()
        check_temperature("student_temp", student_temp)
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", center)
        self.process_group: dist.ProcessGroup | None = None
        self.updated = True
        self.reduce_handle: dist.Work | None = None
        self.async_batch_center: Tensor | None = None

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        """Applies a pending update, then softmax((logits - center) / teacher_temp), fp32.

        teacher_output: [..., K], broadcast with the centre.
        """
        self.apply_center_update()
        return self._softmax(teacher_output, teacher_temp)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Starts the update by the mean of teacher_output [..., K]; the next call replaces it."""
        self.reduce_center_update(teacher_output)

    @torch.no_grad()
    def reduce_center_update(self, teacher_output: Tensor) -> None:
        """What `update_center` calls."""
        self._check(teacher_output)
        self.updated = False
        self.async_batch_center = rank_mean(teacher_output)
        self.reduce_handle = reduce_ranks(self.async_batch_center, self.process_group, wait=False)

    def apply_center_update(self) -> None:
        """Moves the centre if an update is pending. Nothing to do otherwise."""
        if self.async_batch_center is not None:
            if self.reduce_handle is not None:
                self.reduce_handle.wait()
            self.center = moved_center(self.center, self.async_batch_center, self.center_momentum)
        self._drop_update()

    def _check(self, teacher_output: Tensor, teacher_temp: float = 1.0) -> None:
        name, argument = self._names
        check_prototypes(name, teacher_output, argument, self.center.shape[-1])
        check_temperature("teacher_temp", teacher_temp)

    def _softmax(self, logits: Tensor, teacher_temp: float) -> Tensor:
        self._check(logits, teacher_temp)
        return F.softmax((logits - self.center) / teacher_temp, dim=-1)

    def _sinkhorn(self, logits: Tensor, teacher_temp: float, n_iterations: int) -> Tensor:
        """Rows [..., K] assigned together, over all ranks; their probabilities, fp32."""
        rows = logits.reshape(1, -1, logits.shape[-1])
        center = sinkhorn_center(rows, teacher_temp, n_iterations, group=self.process_group)
        return F.softmax((logits - center) / teacher_temp, dim=-1)

    def _drop_update(self) -> None:
        self.updated, self.reduce_handle, self.async_batch_center = True, None, None

    def _apply(self, *args: Any, **options: Any) -> Any:  # what is pending lies on the old device
        self.apply_center_update()
        return super()._apply(*args, **options)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.apply_center_update()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._drop_update()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles: a handle has neither
        self.apply_center_update()
        return self.__dict__
