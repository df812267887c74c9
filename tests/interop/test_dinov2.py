"""dinov2.DINOLoss, iBOTPatchLoss and dinov3.DINOLoss: lazy centre, Sinkhorn, reductions."""

import copy

import pytest
import torch

from mokd_fast.interop import dinov2, dinov3
from tests.interop import oracle
from tests.interop.cases import MASK, B, K, T, V, logits

TEACHER = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
STUDENT = torch.tensor([[0.7, 0.8], [0.9, 1.0], [1.1, 1.2]])


def initialised(K=K):
    loss = dinov3.DINOLoss(K)
    loss.init_weights()
    return loss


BUILDS = [
    pytest.param(lambda: dinov2.DINOLoss(K), id="dinov2"),
    pytest.param(lambda: dinov2.iBOTPatchLoss(K), id="dinov2 patch"),
    pytest.param(initialised, id="dinov3"),
]


def test_golden_sum_of_two_by_two_pairs():
    """1.5565: the value that lightly-train's test of DINOv2's loss has for these inputs."""
    loss = dinov2.DINOLoss(2, student_temp=0.1)
    probs = loss.softmax_center_teacher(TEACHER, 0.04)
    assert loss([STUDENT, STUDENT], [probs, probs]).item() == pytest.approx(1.5565, abs=5e-5)
    mean = initialised(2)(torch.stack([STUDENT] * 2), torch.stack([probs] * 2))
    assert mean.item() == pytest.approx(1.5565 / 4, abs=2e-5)


def test_dinov2_sums_lists_of_any_length():
    student, teacher = logits()
    probs = (teacher / 0.07).softmax(-1)
    expected = sum(oracle.cross_entropy(q, s, 0.1).mean() for q in probs for s in student)
    loss = dinov2.DINOLoss(K)
    for s, t in [(student, probs), (list(student), probs), (student.unbind(), probs.unbind())]:
        torch.testing.assert_close(loss(s, t), expected)
    with pytest.raises(ValueError, match="student_output_list must list views"):
        loss([], probs)


def test_dinov3_means_with_and_without_the_diagonal():
    student, teacher = logits()
    probs = (teacher / 0.07).softmax(-1)
    loss = initialised()
    every = [[oracle.cross_entropy(q, s, 0.1).mean() for s in student] for q in probs]
    torch.testing.assert_close(loss(student, probs), sum(map(sum, every)) / (T * V))
    expected = oracle.dino(student, teacher, 0, 0.07)
    torch.testing.assert_close(loss(student, probs, ignore_diagonal=True), expected)
    with pytest.raises(ValueError, match="nothing to pair"):
        loss(student[:1], probs[:1], ignore_diagonal=True)


@pytest.mark.parametrize("build", BUILDS)
def test_the_center_moves_at_the_next_softmax_and_at_state_dict(build):
    loss, (_, teacher) = build().double(), logits()
    rows = teacher[:1]
    expected = oracle.moved(torch.zeros(K), rows)
    loss.update_center(rows)
    assert not loss.updated
    assert not loss.center.any()
    probs = loss.softmax_center_teacher(rows, 0.05)
    torch.testing.assert_close(probs, ((rows - expected) / 0.05).softmax(-1))
    torch.testing.assert_close(loss.center.flatten(), expected)
    assert loss.updated
    loss.apply_center_update()  # nothing is pending: nothing changes
    torch.testing.assert_close(loss.center.flatten(), expected)
    loss.update_center(rows)
    loss.update_center(rows + 1)  # as in the originals, the last one counts
    state = torch.nn.ModuleList([loss]).state_dict()  # also as a part of a model
    torch.testing.assert_close(state["0.center"].flatten(), oracle.moved(expected, rows + 1))
    assert loss.center.shape == build().center.shape


@pytest.mark.parametrize("build", BUILDS)
def test_a_loaded_state_replaces_a_pending_update(build):
    loss = build().double()
    loss.update_center(logits()[1])
    state = {"center": torch.ones_like(loss.center)}
    loss.load_state_dict(state)
    loss.softmax_center_teacher(logits()[1], 0.05)
    assert torch.equal(loss.center, state["center"])


def test_dinov3_can_leave_the_update_pending():
    loss, (_, teacher) = initialised().double(), logits()
    loss.update_center(teacher)
    probs = loss.softmax_center_teacher(teacher, 0.05, update_centers=False)
    torch.testing.assert_close(probs, (teacher / 0.05).softmax(-1))
    assert not loss.updated
    loss.softmax_center_teacher(teacher, 0.05)
    assert loss.center.any()


def test_dinov3_is_nan_until_init_weights_or_a_loaded_state():
    _, teacher = logits(dtype=torch.float32)
    for start in ("init", "load"):
        loss = dinov3.DINOLoss(K)
        assert loss.center.isnan().all()
        with pytest.raises(RuntimeError, match="init_weights"):
            loss.softmax_center_teacher(teacher, 0.05)
        if start == "init":
            loss.init_weights()
        else:
            loss.load_state_dict({"center": torch.zeros(1, K)})
        probs = loss.softmax_center_teacher(teacher, 0.05)
        torch.testing.assert_close(probs, (teacher / 0.05).softmax(-1))
        loss.load_state_dict(dinov3.DINOLoss(K).state_dict())
        with pytest.raises(RuntimeError, match="init_weights"):
            loss.softmax_center_teacher(teacher, 0.05)


@pytest.mark.parametrize("module", [dinov2, dinov3])
def test_sinkhorn(module):
    """fp32 of any logits, as the formula in float64; no process group is needed."""
    loss, (_, teacher) = module.DINOLoss(K), logits()
    rows = teacher.flatten(0, 1)
    for iterations in (1, 3):
        for given in (rows.float(), rows.half()):
            probs = loss.sinkhorn_knopp_teacher(given, 0.5, iterations)
            assert probs.dtype == torch.float32
            expected = oracle.sinkhorn(given, 0.5, iterations)
            torch.testing.assert_close(probs.double(), expected, rtol=1e-4, atol=1e-7)
    far = loss.sinkhorn_knopp_teacher(rows.float() + 100, 0.5)  # the original overflows: exp(200)
    torch.testing.assert_close(far.double(), oracle.sinkhorn(rows, 0.5), rtol=1e-3, atol=1e-6)


def test_sinkhorn_of_patches_leaves_its_argument_alone():
    loss, (_, teacher) = dinov2.iBOTPatchLoss(K), logits(dtype=torch.float32)
    rows, count = teacher.flatten(0, 1), torch.tensor([T * B])
    probs = loss.sinkhorn_knopp_teacher(rows, 0.5, n_masked_patches_tensor=count)
    torch.testing.assert_close(probs.double(), oracle.sinkhorn(rows, 0.5), rtol=1e-4, atol=1e-7)
    assert count.item() == T * B


def test_patches_masked_and_unmasked_agree():
    student, teacher = logits()
    student, probs = student[:2].requires_grad_(), (teacher / 0.07).softmax(-1)
    loss = dinov2.iBOTPatchLoss(K)
    expected = oracle.patches(student, teacher, MASK, 0, 0.07)
    weights = (MASK / MASK.sum(1, keepdim=True))[MASK].double()
    count = len(weights)
    padded = [torch.cat([x[MASK], torch.full((3, K), torch.nan)]) for x in (student, probs)]
    for value in (
        loss(student, probs, MASK),
        loss.forward_masked(student[MASK], probs[MASK], MASK),
        loss.forward_masked(student[MASK], probs[MASK], MASK, masks_weight=weights),
        # Rows after n_masked_patches are padding: cut off, so that their NaN is not read.
        loss.forward_masked(*padded, MASK, n_masked_patches=count),
        loss.forward_masked(*padded, MASK, n_masked_patches=count, masks_weight=weights),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        mine, theirs = (
            torch.autograd.grad(x, student, retain_graph=True)[0] for x in (value, expected)
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="5 patch rows need as many weights, got \\[4\\]"):
        loss.forward_masked(student[:1, :5].flatten(0, 1), probs[0, :5], MASK)
    for mask in (MASK.long(), MASK.float(), MASK[None], MASK.tolist()):
        with pytest.raises(ValueError, match=r"student_masks_flat must be a boolean mask \[B, N\]"):
            loss.forward_masked(student[MASK], probs[MASK], mask)
    counted = loss.forward_masked(student[MASK], probs[MASK], MASK.long(), masks_weight=weights)
    torch.testing.assert_close(counted, expected, rtol=1e-6, atol=0)  # it is not an index there


def test_a_step_without_masked_patches():
    """0 and a zero gradient; the centre stays, where the original's becomes NaN."""
    loss, empty = dinov2.iBOTPatchLoss(K), torch.zeros(0, K, requires_grad=True)
    loss.update_center(torch.ones(1, 4, K))
    before = copy.deepcopy(loss).center
    loss.softmax_center_teacher(empty.detach().unsqueeze(0), 0.05)
    loss.update_center(empty.detach().unsqueeze(0))
    value = loss.forward_masked(empty, empty.detach(), MASK & False)
    value.backward()
    assert value == 0
    assert empty.grad.shape == (0, K)
    assert torch.equal(loss.state_dict()["center"], before)


@pytest.mark.parametrize("build", BUILDS)
def test_bad_teacher_input_is_said_at_the_call(build):
    loss = build()
    patches = isinstance(loss, dinov2.iBOTPatchLoss)
    names = ("teacher_patch_tokens", "patch_out_dim") if patches else ("teacher_output", "out_dim")
    message = r"{} must have {} = 13 prototypes .*, got shape \[1, 6, ".format(*names)
    for temperature in (0.0, -0.1):
        with pytest.raises(ValueError, match="teacher_temp must be > 0"):
            loss.softmax_center_teacher(torch.zeros(1, 6, K), temperature)
    for rows in (torch.zeros(1, 6, 1), torch.zeros(1, 6, K + 1)):
        with pytest.raises(ValueError, match=message):
            loss.softmax_center_teacher(rows, 0.04)
        with pytest.raises(ValueError, match=message):
            loss.update_center(rows)
    assert loss.updated


def test_a_pending_update_moves_with_the_module():
    loss = dinov2.DINOLoss(16)
    loss.update_center(torch.ones(6, 16))
    moved = loss.to(torch.float64)
    torch.testing.assert_close(moved.center, torch.full((1, 16), 0.1, dtype=torch.float64))


def test_dinov3_compiles_after_a_state_was_loaded():
    loss, twin = dinov3.DINOLoss(K), dinov3.DINOLoss(K)
    twin.init_weights()
    loss.load_state_dict(twin.state_dict())
    rows = torch.randn(4, K)
    step = torch.compile(
        lambda x: loss.softmax_center_teacher(x, 0.04), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(step(rows), twin.softmax_center_teacher(rows, 0.04))
