"""Is a run collapsing? The diagnostics of a step."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.mokd import MOKD, HeadRows, StepLosses, Temperatures

BLOCK = 1 << 20  # numbers: 4 MiB, and as much for each thing that is made of them


@torch.no_grad()
def diagnose(
    out: StepLosses, mokd: MOKD, temperatures: Sequence[Temperatures]
) -> dict[str, Tensor]:
    """What tells a collapse, 0-d fp32 tensors on the device.

    For each head h of mlp_1, t_1, mlp_2, t_2, with z the N = 2B teacher rows [N, K], c its centre
    before this step's update, q = softmax((z - c) / temperature of its self loss), and p the
    student's softmax of the same N views:

        teacher_entropy_h   mean_n -sum_k q log q                    nats, 0..ln K
        student_entropy_h   mean_n -sum_k p log p                    nats, 0..ln K
        kl_h                self_h - teacher_entropy_h               nats, >= 0 up to rounding
        center_norm_h       |c|                                      of logits
        prototypes_used_h   distinct argmax_k q over n / min(K, N)   0..1

    self_h is a cross-entropy, CE(q, p) = H(q) + KL(q | p), averaged over pairs of views in which
    each teacher row has the same weight, as it has in the mean. For each model i, with f its
    teacher's pooled features [N, C] scaled to length 1:

        feature_std_i       sqrt(C) * mean_c std_n f                 0 constant, 1 all directions
    """
    found = {}
    for head, rows in out.teachers.items():
        center = mokd.centers[head]
        temperature = temperatures[int(head[-1]) - 1].self
        entropies, winners = [], []
        for z in _blocks(rows):
            z = (z.float() - center) / temperature
            entropies.append(_entropy(z))
            winners.append(z.argmax(dim=-1))
        entropy, winner = torch.cat(entropies).mean(), torch.cat(winners)
        used = torch.zeros_like(center).index_fill_(0, winner, 1).sum()
        found[f"teacher_entropy_{head}"] = entropy
        student = HeadRows(out.students[head], mokd.student_prototypes(head), None)
        entropies = [_entropy(s.float() / mokd.student_temperature) for s in _blocks(student)]
        found[f"student_entropy_{head}"] = torch.cat(entropies).mean()
        found[f"kl_{head}"] = out.terms[f"self_{head}"] - entropy
        found[f"center_norm_{head}"] = center.norm()
        found[f"prototypes_used_{head}"] = used / min(len(center), len(winner))
    for i, pooled in enumerate(out.teacher_features, start=1):
        f = F.normalize(pooled.float(), dim=-1)  # [N, C]
        found[f"feature_std_{i}"] = f.std(dim=0, correction=0).mean() * f.shape[1] ** 0.5
    return found


def _blocks(rows: HeadRows) -> Iterator[Tensor]:
    """The logits, some rows [n, K] at a time: so many must not be stored."""
    step = max(1, BLOCK // len(rows.prototypes))
    if rows.logits is not None:
        yield from rows.logits.flatten(0, 1).split(step)
        return
    assert isinstance(rows.prototypes, Tensor)
    for features in rows.features.flatten(0, 1).to(rows.prototypes.dtype).split(step):
        yield F.linear(features, rows.prototypes)


def _entropy(z: Tensor) -> Tensor:
    """Of each row's softmax: [n, K] -> [n], nats."""
    return torch.special.entr(F.softmax(z, dim=-1)).sum(dim=-1)
