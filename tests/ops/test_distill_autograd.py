"""distill_cross_entropy inside PyTorch: autograd and its hooks, compiled, traced, autocast."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from mokd_fast.ops import (
    LinearTarget,
    Target,
    cross_view_pairs,
    distill,
    distill_cross_entropy,
    linear_distill_cross_entropy,
)

V, T, B, K = 4, 2, 3, 97
kernels_only = pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)


@pytest.fixture(autouse=True)
def _every_test_for_every_backend(backend):
    torch.manual_seed(0)
    torch.compiler.reset()


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


def case(dtype=torch.float32):
    """A student and the call of its loss; three targets, of every kind."""
    student = (torch.randn(V, B, K) * 4).to(dtype).requires_grad_()
    pairs, row = cross_view_pairs(T, V), torch.rand(B)
    logits, probs = torch.randn(T, B, K).to(dtype), torch.randn(T, B, K).softmax(-1)

    def loss(student, tau=0.05, weight=0.4):
        targets = [
            Target(pairs, logits, temperature=tau, center=probs[0, 0]),
            Target(pairs, logits.double(), temperature=0.3, weight=weight, row_weight=row),
            Target(pairs, probs=probs),
        ]
        return distill_cross_entropy(student, targets, temperature=2 * tau)[0]

    return student, loss


def gradient(loss, student):
    return torch.autograd.grad(loss, student)[0]


def the_operator(monkeypatch):
    """As under torch.compile: the custom operator in place of the shorter eager path."""
    monkeypatch.setattr(distill, "plain", lambda arguments: False)


@kernels_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_eager_path_and_the_operator_give_the_same_bits(dtype, monkeypatch):
    student, loss = case(dtype)
    eager = loss(student)
    assert type(eager.grad_fn).__name__ == "distill_cross_entropyBackward"
    subclass = student.detach().as_subclass(Plain).requires_grad_()
    theirs = loss(subclass)
    assert type(theirs.grad_fn).__name__ != "distill_cross_entropyBackward"
    parameter = torch.nn.Parameter(student.detach())
    ours = loss(parameter)
    assert type(ours.grad_fn).__name__ == "distill_cross_entropyBackward"
    expected = gradient(eager, student)
    assert torch.equal(eager, theirs) and torch.equal(expected, gradient(theirs, subclass))
    assert torch.equal(eager, ours) and torch.equal(expected, gradient(ours, parameter))
    the_operator(monkeypatch)
    assert torch.equal(gradient(loss(student), student), expected)


def test_two_backward_passes_accumulate_and_gradients_may_be_expanded():
    student, loss = case()
    once = gradient(loss(student), student)
    total = loss(student)
    total.expand(3).sum().backward(retain_graph=True)  # grad_output with stride 0
    total.backward(torch.tensor(4096.0))  # as a GradScaler does
    torch.testing.assert_close(student.grad, once * 4099)
    loss(student).backward()
    torch.testing.assert_close(student.grad, once * 4100)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_the_gradient_reaches_what_the_student_was_made_of():
    """Views, expansions and casts of it are autograd's part: the operator's is dense."""
    student, loss = case()
    weight = torch.randn(1, B, K, requires_grad=True)
    expanded = gradient(loss(weight.expand(V, B, K)), weight)
    whole = weight.detach().repeat(V, 1, 1).requires_grad_()
    torch.testing.assert_close(expanded, gradient(loss(whole), whole).sum(0, keepdim=True))
    moved = student.detach().permute(2, 0, 1).contiguous().requires_grad_()
    mine = gradient(loss(moved.permute(1, 2, 0)), moved)
    torch.testing.assert_close(mine, gradient(loss(student), student).permute(2, 0, 1))


@kernels_only
@pytest.mark.parametrize("operator", [False, True])
def test_a_second_derivative_is_refused(operator, monkeypatch):
    student, loss = case()
    expected = gradient(loss(student), student)
    if operator:
        the_operator(monkeypatch)
    (first,) = torch.autograd.grad(loss(student), student, create_graph=True)
    assert torch.equal(first, expected)
    refusal = "no second derivative on this backend; the reference has"
    with pytest.raises(RuntimeError, match=refusal):
        (loss(student) + first.square().sum()).backward()  # a gradient penalty


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_the_reference_has_a_second_derivative():
    student = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
    target = Target(cross_view_pairs(1, 2), torch.randn(1, 1, 3, dtype=torch.float64))
    assert torch.autograd.gradgradcheck(
        lambda s: distill_cross_entropy(s, [target], temperature=0.5)[0], student
    )


def test_saved_tensor_hooks_and_checkpointing():
    student, loss = case()
    expected = gradient(loss(student), student)
    packed = []

    def pack(x):
        packed.append(x.clone())
        return len(packed) - 1

    with saved_tensors_hooks(pack, lambda i: packed[i]):
        hooked = loss(student)
    assert packed and torch.equal(gradient(hooked, student), expected)
    with save_on_cpu():
        saved = loss(student)
    assert torch.equal(gradient(saved, student), expected)
    for reentrant in (False, True):
        again = checkpoint(loss, student, use_reentrant=reentrant)
        again.backward()
        assert torch.equal(student.grad, expected)
        student.grad = None


@kernels_only
def test_what_is_kept_for_backward_is_the_logits_and_two_numbers_a_row():
    views, columns, kept = 10, 65536, {}
    student, teacher = (
        torch.randn(views, 1, columns, requires_grad=True),
        torch.randn(2, 1, columns),
    )
    with saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
        distill_cross_entropy(student, [Target(cross_view_pairs(2, views), teacher)])
    assert sum(kept.values()) <= 3.01 * 2**20  # 12 rows are 3 MiB


@kernels_only
def test_what_changes_before_backward_is_noticed():
    student, teacher = case()[0], torch.randn(T, B, K)
    center = torch.zeros(K)
    target = Target(cross_view_pairs(T, V), teacher, center=center)
    for changed in (teacher, center):
        loss, _ = distill_cross_entropy(student, [target])
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@kernels_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fake_tensors(dtype):
    student, loss = case(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        total = loss(mode.from_tensor(student.detach()).requires_grad_())
        assert total.dtype == wide and total.shape == ()
        fake = torch.empty(V, B, K, dtype=dtype, requires_grad=True)
        (grad,) = torch.autograd.grad(loss(fake), fake)
        assert grad.dtype == dtype and grad.shape == fake.shape and grad.is_contiguous()
        assert loss(student).shape == ()  # no address of a fake tensor is read


@kernels_only
def test_traced_operators_are_in_the_graph():
    student, loss = case()

    def step(student):
        total = loss(student)
        return total.detach(), gradient(total, student)

    graph = make_fx(step)(student)
    assert "mokd_fast.distill_forward" in graph.code and "mokd_fast.distill_backward" in graph.code
    other = torch.randn(V, B, K, requires_grad=True)
    for mine, theirs in zip(graph(other), step(other), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_no_bit(dtype):
    student, loss = case(dtype)
    expected = loss(student)
    with torch.autocast("cpu", torch.bfloat16):
        under = loss(student)
        inside = gradient(under, student)
    assert torch.equal(under, expected) and torch.equal(inside, gradient(expected, student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("views", ["dense", "transposed"])
def test_compiles_whole(views, dtype):
    student, loss = case(dtype)
    if views == "transposed":
        student = student.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for numbers in ((0.04, 0.0), (0.05, 0.5), (0.07, 1.0)):  # schedules: no reason to compile again
        moving = tuple(map(torch.tensor, numbers))
        total, expected = compiled(student, *moving), loss(student, *numbers)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(gradient(total, student), gradient(expected, student))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_inductor():
    student, loss = case()
    compiled = torch.compile(lambda x: loss(x * 2).square(), fullgraph=True)
    total, expected = compiled(student), loss(student * 2).square()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient(total, student), gradient(expected, student))


def test_evaluation_keeps_no_graph():
    student, loss = case()
    expected = loss(student).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            total = loss(student * 1)
        assert torch.equal(total, expected) and not total.requires_grad


def test_torch_func_runs_on_the_reference(monkeypatch):
    monkeypatch.delenv("MOKD_FAST_BACKEND", raising=False)
    student = torch.randn(3, 2, 40)
    target = Target(cross_view_pairs(2, 3), torch.randn(2, 2, 40))

    def loss(student, backend=None):
        return distill_cross_entropy(student, [target], backend=backend)[0]

    gradient = torch.func.grad(loss)(student)
    torch.testing.assert_close(gradient, torch.func.grad(lambda s: loss(s, "reference"))(student))
    torch.testing.assert_close(torch.func.vmap(loss)(student[None])[0], loss(student))
    with pytest.raises(RuntimeError, match=r"under torch\.func transforms"):
        torch.func.grad(lambda s: loss(s, "cpu"))(student)


def test_the_sign_of_a_negative_view_counts():
    view = torch.randn(5, 2, 40, dtype=torch.cfloat).conj().imag  # memory holds its negative
    assert view.is_neg()
    center = torch._neg_view(torch.randn(40))  # contiguous: no copy would resolve it
    target, copied = (
        Target(cross_view_pairs(2, 3), x[3:], center=c, row_weight=c[:2])
        for x, c in ((view, center), (view.clone(), center.clone()))
    )
    mine, _ = distill_cross_entropy(view[:3], [target])
    torch.testing.assert_close(mine, distill_cross_entropy(view[:3].clone(), [copied])[0])


@kernels_only
def test_host_numbers_stand_beside_the_student():
    """Not on the default device: kernels take their address."""
    student, loss = case()
    want = loss(student)
    features, weight = torch.randn(4, 2, 16), torch.randn(40, 16)
    rows = LinearTarget(cross_view_pairs(2, 4), torch.randn(2, 2, 16), weight)

    def linear() -> torch.Tensor:
        return linear_distill_cross_entropy(features, weight, [rows])[0]

    whole = linear()
    with torch.device("meta"):
        found, linear_found = loss(student), linear()
    assert torch.equal(found, want) and torch.equal(linear_found, whole)
