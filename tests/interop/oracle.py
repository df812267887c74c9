"""The peers' formulas as plain loops in our own words: what the drop-in losses are compared with.

Shapes: student [V, B, K], teacher logits [T, B, K], centre [K].
"""

import torch
from torch import Tensor


def cross_entropy(q: Tensor, student: Tensor, temperature: float) -> Tensor:
    """One number a row."""
    return -(q * (student / temperature).log_softmax(-1)).sum(-1)


def dino(student, teacher, center, teacher_temp, student_temp=0.1) -> Tensor:
    """Mean over the pairs of different views of the mean over the images."""
    terms = []
    for t, rows in enumerate(teacher):
        q = ((rows - center) / teacher_temp).softmax(-1)
        terms += [cross_entropy(q, s, student_temp).mean() for v, s in enumerate(student) if v != t]
    return torch.stack(terms).mean()


def patches(student, teacher, mask, center, teacher_temp, student_temp=0.1) -> Tensor:
    """[B, N, K] each, mask [B, N]: mean over the masked patches of an image, then over images."""
    images = []
    for s, t, chosen in zip(student, teacher, mask, strict=True):
        q = ((t - center) / teacher_temp).softmax(-1)
        rows = cross_entropy(q, s, student_temp)[chosen]
        images.append(rows.sum() / max(len(rows), 1))
    return torch.stack(images).mean()


def sinkhorn(logits, temperature, iterations=3) -> Tensor:
    """[B, K]: prototypes and samples get the same mass in turn, in float64."""
    q = (logits.double() / temperature).exp()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * len(q)


def moved(center, logits, momentum=0.9) -> Tensor:
    """The centre after these logits [..., K]."""
    return momentum * center + (1 - momentum) * logits.flatten(0, -2).mean(0)
