"""The oracle of distill_cross_entropy's tests: its formula as a loop over pairs, in float64."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mokd_fast.ops import Target, distill_cross_entropy

Result = tuple[Tensor, Tensor, Tensor]  # loss, terms, gradient


def dense(t: int, v: int) -> tuple[tuple[float, ...], ...]:
    """A weight for every pair, none like another."""
    return tuple(tuple((1 + i + 2 * j) / (t * v) ** 2 for j in range(v)) for i in range(t))


def run(student: Tensor, targets: Sequence[Target], temperature=0.1, backend=None) -> Result:
    leaf = student.detach().requires_grad_()
    loss, terms = distill_cross_entropy(leaf, targets, temperature=temperature, backend=backend)
    return loss.detach(), terms, torch.autograd.grad(loss, leaf)[0]


def official(student: Tensor, targets: Sequence[Target], temperature=0.1) -> Result:
    """-q log p of one pair after the other, as the official losses add them up."""
    leaf, terms = student.detach().double().requires_grad_(), []
    for target in map(double, targets):
        q, term = target.probs, leaf.sum() * 0
        if target.logits is not None:
            center = 0 if target.center is None else target.center
            q = ((target.logits - center) / target.temperature).softmax(-1)
        row = 1 if target.row_weight is None else target.row_weight
        for t, weights in enumerate(target.pairs):
            for v, weight in enumerate(weights):
                if weight:
                    log_p = (leaf[v] / temperature).log_softmax(-1)
                    term = term + weight * (row * -(q[t] * log_p).sum(-1)).sum()
        terms.append(term / max(leaf.shape[1], 1))
    loss = sum(term * target.weight for term, target in zip(terms, targets, strict=True))
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), torch.stack(terms).detach(), gradient


def double(target: Target) -> Target:
    names = ("logits", "probs", "center", "row_weight")
    tensors = {name: getattr(target, name) for name in names}
    return replace(target, **{n: x.double() for n, x in tensors.items() if x is not None})


def check(student: Tensor, targets: Sequence[Target], temperature=0.1) -> Result:
    """The forced backend is no worse than the reference in the same dtype, both against `official`.

    Tolerance: 1e-6 (fp64: 1e-13) of the largest value, and 1e-8 for a loss of 0 (one column).
    """
    exact = official(student, targets, temperature)
    rough = run(student, targets, temperature, "reference")
    mine = run(student, targets, temperature)
    assert mine[2].dtype == student.dtype and mine[2].shape == student.shape
    share = 1e-13 if student.dtype == torch.float64 else 1e-6
    for have, allowed, truth in zip(mine, rough, exact, strict=True):
        assert truth.isfinite().all() and have.dtype == allowed.dtype
        if truth.numel():
            error, limit = ((x.double() - truth).abs().max() for x in (have, allowed))
            assert error <= limit + share * truth.abs().max() + 1e-8 * share / 1e-6
    return mine
