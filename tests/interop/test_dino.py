"""dino.DINOLoss, mokd.CTSearchLoss and solo.DINOLoss: temperature tables, attributes, bad input."""

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from mokd_fast.interop import dino, mokd, solo
from tests.interop import oracle
from tests.interop.cases import B, K, T, V, logits


def flat(dtype=torch.float32):
    student, teacher = logits(dtype=dtype)
    return student.flatten(0, 1), teacher.flatten(0, 1)


def test_the_temperature_warms_up_by_epoch_and_the_numbers_may_change_later():
    table = [0.04, 0.055, 0.07, 0.07, 0.07]
    losses = dino.DINOLoss(K, V, 0.04, 0.07, 3, 5), solo.DINOLoss(K, 0.04, 0.07, 3, 5, 0.1, V)
    student, teacher = logits(dtype=torch.float32)
    for loss in losses:
        np.testing.assert_allclose(loss.teacher_temp_schedule, table, rtol=1e-12)
        loss.center_momentum, loss.student_temp = 1.0, 0.2  # users change them; 1 keeps the centre
    for epoch, tau in enumerate(table):
        expected = oracle.dino(student, teacher, torch.zeros(K), tau, 0.2)
        losses[1].epoch = epoch
        torch.testing.assert_close(losses[0](*flat(), epoch), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(losses[1](*flat()), expected, rtol=1e-5, atol=0)
    assert not losses[0].center.any()


def test_the_search_loss_follows_its_table_too():
    loss = mokd.CTSearchLoss(0.04, 0.08, 2, 3, student_temp=0.3)
    student, teacher = (x[: T * B] for x in flat())
    for epoch, tau in enumerate([0.04, 0.08, 0.08]):
        expected = oracle.cross_entropy((teacher / tau).softmax(-1), student, 0.3).mean()
        torch.testing.assert_close(loss(student, teacher, epoch), expected, rtol=1e-5, atol=0)


def test_a_center_that_was_replaced_is_not_written_to():
    """The original assigns a new tensor: who kept the old one keeps its numbers."""
    loss = dino.DINOLoss(K, V, 0.04, 0.04, 0, 1)
    before = loss.center
    loss(*flat(), 0)
    assert not before.any()
    assert loss.center.any()


def test_an_epoch_past_the_table_is_an_index_error():
    solo_loss = solo.DINOLoss(K, 0.04, 0.07, 1, 5, num_large_crops=V)
    assert solo_loss.epoch == 0
    solo_loss.epoch = 5
    student, teacher = flat()
    with pytest.raises(IndexError, match="epoch 5 is past the temperature table, which has 5"):
        solo_loss(student, teacher)
    with pytest.raises(IndexError, match="epoch 5"):
        dino.DINOLoss(K, V, 0.04, 0.07, 1, 5)(student, teacher, 5)
    with pytest.raises(IndexError, match="epoch 5"):
        mokd.CTSearchLoss(0.04, 0.07, 1, 5)(student, student, 5)


def test_a_warm_up_longer_than_the_training_is_a_value_error():
    for build in (
        lambda: dino.DINOLoss(K, V, 0.04, 0.07, 6, 5),
        lambda: solo.DINOLoss(K, 0.04, 0.07, 6, 5),
        lambda: mokd.CTSearchLoss(0.04, 0.07, 6, 5),
    ):
        with pytest.raises(ValueError, match="warms up for 6 epochs, longer than the 5"):
            build()


def test_a_temperature_of_zero_is_a_value_error_where_it_would_be_used():
    with pytest.raises(ValueError, match="temperatures must be > 0, got 0 to"):
        dino.DINOLoss(K, V, 0, 0.07, 2, 5)
    dino.DINOLoss(K, V, 0, 0.07, 0, 5)


def test_a_compiled_step_follows_the_epoch_without_being_compiled_again():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    loss, eager = (dino.DINOLoss(K, V, 0.04, 0.07, 4, 6) for _ in range(2))
    step = torch.compile(lambda *args: loss(*args), backend=counter, fullgraph=True)
    for epoch in range(6):
        assert torch.equal(step(*flat(), epoch), eager(*flat(), epoch))
    assert counter.frame_count == 2  # for the first epoch, then for any


def test_rows_that_do_not_divide_are_a_value_error():
    student, teacher = flat()
    loss = dino.DINOLoss(K, V, 0.04, 0.04, 0, 1)
    with pytest.raises(ValueError, match=rf"student_output must hold {V} views .* \[23, {K}\]"):
        loss(student[1:], teacher, 0)
    with pytest.raises(ValueError, match="teacher_output must hold 2 views"):
        loss(student, teacher[1:], 0)
    with pytest.raises(ValueError, match="like the student's"):  # 2 rows a view against 6
        loss(student, teacher[:4], 0)
    with pytest.raises(ValueError, match="student_output"):
        loss(student[0], teacher, 0)
    with pytest.raises(ValueError, match="one shape"):
        mokd.CTSearchLoss(0.04, 0.04, 0, 1)(student, teacher, 0)
    assert not loss.center.any()  # a call that raised moved nothing


def test_mokd_takes_both_losses_from_one_place():
    assert mokd.DINOLoss is dino.DINOLoss
