"""ibot.iBOTLoss: its dictionary, its two tables and centres, bad input."""

import numpy as np
import pytest
import torch

from mokd_fast.interop import ibot
from tests.interop import oracle

B, N, K, K_PATCH = 3, 4, 7, 5  # N = 2 x 2


def batch(local: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * 2

    cls, patch = [draw(2 * B, K) for _ in range(2)], [draw(2 * B, N, K_PATCH) for _ in range(2)]
    masks = [torch.rand(B, 2, 2, generator=g) < 0.5 for _ in range(2 + local)]
    masks[0][1] = False
    student_local = draw(local * B, K) if local else None
    return (cls[0], patch[0]), (cls[1], patch[1]), student_local, masks


@pytest.mark.parametrize("local", [0, 3])
def test_terms_and_both_centers(local):
    """The terms carry their factors; the patch centre moves by all patches."""
    loss = ibot.iBOTLoss(
        K, K_PATCH, 2, local, 0.04, 0.06, 0.05, 0.07, 2, 5, 0.2, 0.8, 0.7, 0.5, 2.0
    ).double()
    center, center2 = torch.zeros(K).double(), torch.zeros(K_PATCH).double()
    for epoch, (tau, tau2) in enumerate([(0.04, 0.05), (0.06, 0.07), (0.06, 0.07)]):
        student, teacher, far, masks = batch(local, epoch)
        out = loss(student, teacher, far, masks, epoch)
        views = student[0] if far is None else torch.cat([student[0], far])
        cls = oracle.dino(
            views.chunk(2 + local), teacher[0].chunk(2), center, tau, student_temp=0.2
        )
        mask = torch.cat(masks[:2]).flatten(1)
        patch = oracle.patches(student[1], teacher[1], mask, center2, tau2, student_temp=0.2)
        assert list(out) == ["cls", "patch", "loss"]
        torch.testing.assert_close(out["cls"], 0.5 * cls)
        torch.testing.assert_close(out["patch"], 2 * patch)
        torch.testing.assert_close(out["loss"], 0.5 * cls + 2 * patch)
        center = oracle.moved(center, teacher[0], 0.8)
        center2 = oracle.moved(center2, teacher[1], 0.7)
        torch.testing.assert_close(loss.center, center.view(1, K))
        torch.testing.assert_close(loss.center2, center2.view(1, 1, K_PATCH))


def test_the_gradient_of_the_sum_reaches_cls_patches_and_local_views():
    student, teacher, far, masks = batch(3)
    leaves = [x.requires_grad_() for x in (*student, far)]
    loss = ibot.iBOTLoss(K, K_PATCH, 2, 3, 0.04, 0.04, 0.04, 0.04, 0, 1).double()
    loss(student, teacher, far, masks, 0)["loss"].backward()
    views = torch.cat([student[0], far]).chunk(5)
    mask = torch.cat(masks[:2]).flatten(1)
    total = oracle.dino(views, teacher[0].chunk(2), 0, 0.04) + oracle.patches(
        student[1], teacher[1], mask, 0, 0.04
    )
    for leaf, gradient in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_the_patch_temperature_waits_for_mim_start_epoch():
    loss = ibot.iBOTLoss(K, K_PATCH, 2, 0, 0.04, 0.07, 0.05, 0.08, 2, 6, mim_start_epoch=3)
    np.testing.assert_allclose(loss.teacher_temp_schedule, [0.04] + [0.07] * 5)
    np.testing.assert_allclose(loss.teacher_temp2_schedule, [0.05] * 4 + [0.08] * 2)


def test_a_step_without_masked_patches():
    """0 and a zero gradient for the patches."""
    student, teacher, far, masks = batch(1)
    student[1].requires_grad_()
    loss = ibot.iBOTLoss(K, K_PATCH, 2, 1, 0.04, 0.04, 0.04, 0.04, 0, 1).double()
    out = loss(student, teacher, far, [mask & False for mask in masks], 0)
    out["loss"].backward()
    assert out["patch"] == 0
    assert not student[1].grad.any()
    assert out["loss"] == out["cls"]


def test_bad_input():
    arguments = (K, K_PATCH, 2, 3, 0.04, 0.04, 0.04, 0.04)
    student, teacher, far, masks = batch(3)
    loss = ibot.iBOTLoss(*arguments, 0, 1).double()
    with pytest.raises(ValueError, match="student must hold 5 views"):
        loss(student, teacher, far[1:], masks, 0)
    with pytest.raises(ValueError, match="student must hold 5 views"):  # 6 rows for 5 views
        loss(student, teacher, None, masks, 0)
    with pytest.raises(ValueError, match="does the mask mark exactly the patches"):
        loss(student, teacher, far, [mask[:, :1] for mask in masks], 0)
    with pytest.raises(IndexError, match="epoch 1 is past"):
        loss(student, teacher, far, masks, 1)
    with pytest.raises(ValueError, match="warms up for 4 epochs, longer than the 3"):
        ibot.iBOTLoss(*arguments, 1, 3, mim_start_epoch=3)
