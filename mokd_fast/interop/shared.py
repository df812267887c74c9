"""What the drop-in losses have in common. Letters: V views, T teacher rows, B images, K prototypes.

The traps of the originals are dealt with here once: no process group is needed, every rank counts
the same, 16-bit logits are averaged in fp32, a step without rows leaves the centre alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import Target, column_mean, cross_view_pairs, distill_cross_entropy
from ..ops.center import moved_center, rank_mean
from ..ops.distill import distill_with_mean
from ..ops.reference import accumulation_dtype


def check_prototypes(name: str, logits: Tensor, argument: str, prototypes: int) -> None:
    """ValueError for logits [..., K] of another K than the constructor was given as `argument`."""
    if logits.shape[-1:] != (prototypes,):
        raise ValueError(
            f"{name} must have {argument} = {prototypes} prototypes in its last dimension, "
            f"got shape {list(logits.shape)}"
        )


def check_mask(name: str, mask: Tensor, letters: str = "BHW") -> None:
    """ValueError for anything but a boolean mask, [B, H, W] or what the letters say."""
    wanted = f"{name} must be a boolean mask [{', '.join(letters)}]"
    if not isinstance(mask, Tensor):
        raise ValueError(f"{wanted}, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.ndim != len(letters):
        raise ValueError(f"{wanted}, got {mask.dtype} of shape {list(mask.shape)}")


def split_views(name: str, logits: Tensor, views: int) -> Tensor:
    """View-major logits [views * B, K] as [views, B, K], without a copy. ValueError if ragged."""
    if logits.ndim != 2 or views < 1 or len(logits) % views:
        raise ValueError(
            f"{name} must hold {views} views of equally many images, [{views} * B, K], "
            f"got shape {list(logits.shape)}"
        )
    return logits.view(views, len(logits) // views, logits.shape[-1])


def stack_views(name: str, views: Tensor | Sequence[Tensor]) -> Tensor:
    """A list of views [B, K] as [V, B, K]; a stacked tensor stays what it is."""
    if isinstance(views, Tensor):
        stacked = views
    elif not views or any(view.shape != views[0].shape for view in views):
        shapes = [list(view.shape) for view in views]
        raise ValueError(f"{name} must list views of one shape [B, K], got {shapes}")
    else:
        stacked = views[0].unsqueeze(0) if len(views) == 1 else torch.stack(list(views))
    if stacked.ndim != 3:
        raise ValueError(f"{name} must list views [B, K], got {list(stacked.shape[1:])}")
    return stacked


def temperature_table(
    warmup: float, final: float, warmup_epochs: int, epochs: int, delay: int = 0
) -> np.ndarray:
    """Teacher temperature of each epoch: `delay` at `warmup`, a linear warm-up, then `final`."""
    constant = epochs - warmup_epochs - delay
    if constant < 0:
        raise ValueError(
            f"the teacher temperature warms up for {delay + warmup_epochs} epochs, "
            f"longer than the {epochs} epochs of training"
        )
    ramp = np.linspace(warmup, final, warmup_epochs)
    table = np.concatenate((np.full(delay, warmup), ramp, np.full(constant, final)))
    if (table <= 0).any():
        raise ValueError(f"teacher temperatures must be > 0, got {warmup} to {final}")
    return table


def temperature_at(table: np.ndarray, epoch: int) -> float | Tensor:
    """The temperature of `epoch`; IndexError past the table, as the originals raise.

    Of a compiled step a 0-d tensor: it would be frozen to the value of a float.
    """
    if epoch >= len(table):
        raise IndexError(
            f"epoch {epoch} is past the temperature table, which has {len(table)} epochs"
        )
    return torch.as_tensor(table)[epoch] if torch.compiler.is_compiling() else float(table[epoch])


def cross_view_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float | Tensor,
    weight: float = 1.0,
) -> Tensor:
    """DINO's mean over all pairs of different views: student [V, B, K], teacher logits [T, B, K].

    center: any shape of K numbers.
    """
    target = cross_view_target(student, teacher, center, teacher_temp, weight)
    return distill_cross_entropy(student, [target], temperature=student_temp)[0]


def cross_view_target(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    teacher_temp: float | Tensor,
    weight: float = 1.0,
) -> Target:
    pairs = cross_view_pairs(len(teacher), len(student))
    return Target(pairs, teacher, None, teacher_temp, center.flatten(), weight)


def cross_view_step(
    module: Any, update: Any, student: Tensor, teacher: Tensor, teacher_temp: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    """`cross_view_loss` of a module with center and student_temp, and the mean [K] of the teacher
    logits, by one read of them.

    None where somebody has put another method in the place of `update`, the module's update_center
    as written, and where the student's arithmetic is another than the teacher's.
    """
    center, temp = module.center, module.student_temp
    replaced = type(module).update_center is not update or "update_center" in vars(module)
    if replaced or accumulation_dtype(student) != accumulation_dtype(teacher):
        return cross_view_loss(student, teacher, center, temp, teacher_temp), None
    target = cross_view_target(student, teacher, center, teacher_temp)
    return distill_with_mean(student, target, temperature=temp)


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


def patch_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    images: int,
    student_temp: float,
    *,
    center: Tensor | None = None,
    teacher_temp: float | Tensor = 1.0,
    weight: float = 1.0,
) -> Tensor:
    """sum_m weights[m] CE(teacher[m], student[m]) / images, for M patches: [M, K] each.

    teacher: logits with a center, probabilities without one. No patch gives 0 and a zero gradient.
    """
    if weights.shape != (len(student),):
        raise ValueError(
            f"{len(student)} patch rows need as many weights, got {list(weights.shape)}: "
            "does the mask mark exactly the patches that were passed?"
        )
    # The operator divides by its rows.
    row_weight = weights.to(accumulation_dtype(student)) * (len(student) / max(images, 1))
    rows = teacher.unsqueeze(0)
    target = (
        Target(((1.0,),), probs=rows, weight=weight, row_weight=row_weight)
        if center is None
        else Target(((1.0,),), rows, None, teacher_temp, center.flatten(), weight, row_weight)
    )
    return distill_cross_entropy(student.unsqueeze(0), [target], temperature=student_temp)[0]


def masked_weights(mask: Tensor, logits: Tensor) -> Tensor:
    """1 / (masked patches of the image) where masked, else 0: [B, N] like the mask, in the
    arithmetic's type for these logits."""
    mask = mask.to(accumulation_dtype(logits))
    return mask / mask.sum(dim=-1, keepdim=True).clamp(min=1.0)


def reduce_ranks(
    mean: Tensor, group: dist.ProcessGroup | None = None, wait: bool = True
) -> dist.Work | None:
    """Sums `rank_mean` over the group in place, where there is one; the work if not waited for."""
    if _has_ranks():
        return dist.all_reduce(mean, group=group, async_op=not wait)
    return None


def updated_center(
    center: Tensor, logits: Tensor, momentum: float, mean: Tensor | None = None
) -> Tensor:
    """The centre after these teacher logits [..., K], averaged over the ranks. mean [K]: theirs,
    where it is known."""
    if not _has_ranks():  # three operations instead of eight
        if logits.numel() == 0:
            return center
        mean = (column_mean(logits) if mean is None else mean).view_as(center)
        # Modes that would change nothing are not entered, which takes time as well.
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return center * momentum + mean * (1 - momentum)
        moved = center * momentum + mean * (1 - momentum)
        return moved.detach() if moved.requires_grad else moved
    means = rank_mean(logits, mean)
    reduce_ranks(means)
    return moved_center(center, means, momentum)
