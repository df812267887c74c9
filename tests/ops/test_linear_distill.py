"""linear_distill_cross_entropy against its formula in float64, and its contract."""

import doctest
import re

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mokd_fast.ops import (
    LinearTarget,
    Target,
    cross_view_pairs,
    distill,
    distill_cross_entropy,
    explain,
    linear_chunks,
    linear_distill,
    linear_distill_cross_entropy,
    matched_pairs,
)

from .oracle import dense, official

V, T, B, K, D = 4, 2, 3, 97, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True, params=["cpu", "cpu, kept", "cuda"])
def backend(request, monkeypatch):
    """Forced; with bytes of logits that are not made twice: of a chunk at least, or more of these
    small calls. On the CPU, where they are emulated or from where they travel, CUDA's kernels find
    chunks of the CPU's sizes."""
    name, *kept = request.param.split(", ")
    if name == "cuda":
        request.getfixturevalue("cuda_kernels")
    torch.manual_seed(0)
    monkeypatch.setenv("MOKD_FAST_BACKEND", name)
    monkeypatch.setattr(linear_chunks, "KEEP_BYTES", 50_000 if kept else 0)
    return name


def randn(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape), dim=-1).to(dtype)


def dino(v=V, t=T, b=B, k=K, d=D, dtype=torch.float32, **options):
    """Normalised features and prototypes, as behind a DINO head, with the target."""
    x, w = unit(v, b, d, dtype=dtype), unit(k, d, dtype=dtype)
    options = {"temperature": 0.04, "center": randn(k, scale=0.1), **options}
    return x, w, [LinearTarget(dense(t, v), unit(t, b, d, dtype=dtype), unit(k, d), **options)]


def run(x, w, targets, backend=None, chunk=None, temperature=0.1):
    """Loss, terms and the gradients of features and prototypes."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss, terms = linear_distill_cross_entropy(
        x, w, targets, temperature=temperature, backend=backend, chunk=chunk
    )
    return loss.detach(), terms, *torch.autograd.grad(loss, (x, w))


def exactly(x, w, targets, temperature=0.1):
    """The same in float64 from stored logits and the official loop; and what the products of the
    gradients add up, without signs: their rounding is a share of that."""
    x, w = x.double(), w.double()
    stored = [
        Target(t.pairs, t.features.double() @ t.prototypes.double().T, None, t.temperature,
               t.center, t.weight, t.row_weight) if isinstance(t, LinearTarget) else t
        for t in targets
    ]  # fmt: skip
    (loss, terms, ds), mixture = official(x @ w.T, stored, temperature)
    size = (ds + mixture).abs() + mixture.abs()
    sizes = loss.abs(), terms.abs(), size @ w.abs(), size.flatten(0, 1).T @ x.abs().flatten(0, 1)
    return (loss, terms, ds @ w, ds.flatten(0, 1).T @ x.flatten(0, 1)), sizes


def check(x, w, targets, temperature=0.1, chunk=None):
    """No further from float64 than the reference in the same dtype, but for 1e-6 (fp64: 1e-13) of
    what is added up, and in 16 bit for the roundings of dX's chunks, half a unit of each."""
    truth, sizes = exactly(x, w, targets, temperature)
    rough = run(x, w, targets, "reference", temperature=temperature)
    mine = run(x, w, targets, chunk=chunk, temperature=temperature)
    share = 1e-13 if x.dtype == torch.float64 else 1e-6
    for i, (have, allowed, exact, size) in enumerate(zip(mine, rough, truth, sizes, strict=True)):
        assert have.dtype == allowed.dtype and have.shape == allowed.shape
        assert exact.isfinite().all()
        if have.numel():
            error, limit = ((a.double() - exact).abs().max() for a in (have, allowed))
            parts = torch.finfo(x.dtype).eps / 2 if i == 2 and x.dtype.itemsize == 2 else 0
            assert error <= limit + (share + parts) * (size.max() + 0.01), (i, error, limit)
    return mine


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 32, 96, 97, 98, None])
def test_chunks(chunk, dtype):
    check(*dino(dtype=dtype), chunk=chunk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("d", [1, 64, 256, 384, 768])
def test_widths(d, dtype):
    check(*dino(k=1300, d=d, dtype=dtype), chunk=512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unnormalised_features_of_large_norm(dtype):
    """As behind a T-Head: logits of some hundred, so that a softmax is one prototype."""
    x, w = randn(V, B, 384, dtype=dtype, scale=5), randn(K, 384, dtype=dtype, scale=1)
    target = LinearTarget(dense(T, V), randn(T, B, 384, scale=5), randn(K, 384), 0.04)
    check(x, w, [target], chunk=40)


def four(b=B, dtype=torch.float32):
    """Targets of every kind: two of the same prototypes, one of the student's own, one of logits,
    one of probabilities; with centre, row weights and weights."""
    x, w, (own,) = dino(b=b, dtype=dtype)
    row = torch.rand(b)
    targets = [
        own,
        LinearTarget(cross_view_pairs(T, V), randn(T, b, D), own.prototypes, 0.3, weight=0.4),
        LinearTarget(matched_pairs(V, 2), randn(2, b, D, dtype=dtype), w, 0.07, row_weight=row),
        Target(dense(1, V), randn(1, b, K, dtype=torch.bfloat16), None, 0.05, randn(K)),
        Target(dense(T, V), probs=0.7 * randn(T, b, K).softmax(-1), weight=torch.tensor(0.5)),
    ]
    return x, w, targets


@pytest.mark.parametrize("b", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_of_every_kind_in_one_pass(dtype, b):
    loss, terms, dx, dw = check(*four(b, dtype), chunk=40)
    assert b or (loss == 0 and not terms.any() and not dw.any() and dx.numel() == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_chunk_is_the_operator_on_stored_logits(dtype):
    x, w, targets = four(dtype=dtype)
    mine = run(x, w, targets)
    logits = F.linear(x, w).requires_grad_()
    stored = [t.stored(dtype) if isinstance(t, LinearTarget) else t for t in targets]
    loss, terms = distill_cross_entropy(logits, stored)
    (ds,) = torch.autograd.grad(loss, logits)
    expected = loss, terms, ds @ w, ds.flatten(0, 1).T @ x.flatten(0, 1)
    for have, want in zip(mine, expected, strict=True):
        torch.testing.assert_close(have, want.detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("chunk", [3, 5, 8])
def test_gradcheck(chunk):
    x, w, _ = dino()
    x, w = x.double()[..., :4].requires_grad_(), w.double()[:5, :4].requires_grad_()
    few = LinearTarget(dense(T, V), randn(T, B, 3), randn(5, 3), 0.5, randn(5))

    def loss(x, w):
        return linear_distill_cross_entropy(x, w, [few], temperature=0.5, chunk=chunk)[0]

    assert torch.autograd.gradcheck(loss, (x, w))


SPLITS = [[97], [1] * 97, [40, 57], [3, 1, 60, 33]]


def arguments(b=B, k=K, dtype=torch.float32):
    """Logits [V, b, k] and all that the kernels take beside them, apart from what has columns."""
    targets = [torch.randn(T, b, k) * 3, torch.randn(1, b, k).softmax(-1), torch.randn(2, b, k)]
    empty, pairs = torch.empty(0), [w for t in (T, 1, 2) for row in dense(t, V) for w in row]
    rest = [empty, torch.rand(b), empty], torch.tensor([0.1, 0.05, 1, 0.3, 1, 2, 0.5])
    rows = [t.to(dtype) for t in targets]
    return (randn(V, b, k, dtype=dtype, scale=3), rows, [torch.randn(k), empty, empty],
            *rest, pairs, [False, True, False])  # fmt: skip


def spoil(student, rows, what):
    if what == "nan":
        student[1, 2, 60], rows[2][0, 1, 3] = torch.nan, torch.nan
    elif what == "inf":
        rows[0][:, :, 5:90] = rows[2][1, 0] = -torch.inf  # several chunks, and a whole row
        student[2, 1, 41] = -torch.inf
    elif what == "offset":
        student[..., 41:] += 1e4  # so that the maxima move from one chunk to the next
        rows[0][..., :41] -= 1e4


@pytest.mark.parametrize("what", ["finite", "nan", "inf", "offset"])
@pytest.mark.parametrize("split", SPLITS, ids=["one", "single columns", "two", "four"])
def test_chunks_of_any_sizes_give_what_the_whole_gives(backend, split, what):
    """Forward but for the order of sums; the gradient, from the same stats, but for nothing."""
    kernels = distill._kernels(backend)
    student, rows, centers, *rest = arguments()
    spoil(student, rows, what)
    whole = kernels.distill_forward(student, rows, centers, *rest)
    chunks, grad, start = kernels.ForwardChunks(K), torch.tensor(2.0), 0
    exact = kernels.distill_backward(grad, whole[2], student, rows, centers, *rest)
    for columns in split:
        at, start = slice(start, start + columns), start + columns
        part = [c[at] if c.numel() else c for c in centers]
        call = student[..., at].contiguous(), [r[..., at] for r in rows], part, *rest
        chunks.add(*call)
        out = torch.full((V, B, columns), torch.nan)
        found = kernels.distill_backward(grad, whole[2], *call, out=out)
        assert found.data_ptr() == out.data_ptr()
        torch.testing.assert_close(out, exact[..., at], rtol=0, atol=0, equal_nan=True)
    for have, want in zip(chunks.outputs, whole, strict=True):
        torch.testing.assert_close(have, want, rtol=3e-6, atol=1e-6, equal_nan=True)
    assert whole[0].isfinite() == (what in ("finite", "offset"))


def test_strides_and_types_of_all_arguments():
    """Transposed, expanded and shifted; prototypes in fp64 and bf16 beside fp32 features."""
    x, w, (target,) = dino()
    moved = LinearTarget(
        target.pairs, target.features.double().transpose(0, 1).contiguous().transpose(0, 1),
        target.prototypes.bfloat16().t().contiguous().t(), 0.04, target.center.double(),
    )  # fmt: skip
    bent = x.transpose(0, 2).contiguous().transpose(0, 2)
    check(bent, w.t().contiguous().t(), [moved], chunk=40)
    once = run(x[:1].expand(V, B, D), w.double(), [target], chunk=40)
    assert once[3].dtype == torch.float64
    torch.testing.assert_close(once[3].float(), run(x[:1].repeat(V, 1, 1), w, [target])[3])
    negative = torch.complex(x, x).conj().imag  # memory holds the negative
    torch.testing.assert_close(run(negative, w, [target]), run(negative.clone(), w, [target]))


def test_only_what_needs_a_gradient_gets_one():
    x, w, targets = four()
    *_, dx, dw = run(x, w, targets, chunk=40)
    leaf = x.clone().requires_grad_()
    loss, _ = linear_distill_cross_entropy(leaf, w, targets, chunk=40)
    loss.backward()
    assert torch.equal(leaf.grad, dx)
    leaf = w.detach().requires_grad_()  # a copy would share no product with the target that has w
    loss, terms = linear_distill_cross_entropy(x, leaf, targets, chunk=40)
    loss.backward()
    assert torch.equal(leaf.grad, dw) and not terms.requires_grad
    assert not linear_distill_cross_entropy(x, w, targets)[0].requires_grad


def test_teachers_get_no_gradient():
    x, w, (target,) = dino()
    h, p = target.features.requires_grad_(), target.prototypes.requires_grad_()
    loss, _ = linear_distill_cross_entropy(x.requires_grad_(), w, [target])
    loss.backward()
    assert x.grad is not None and h.grad is None and p.grad is None


def test_prototypes_used_twice_and_accumulation():
    x, w, targets = four()
    w = w.requires_grad_()
    once = run(x, w, targets)[3]
    for factor in (1.0, 2.0):
        loss, _ = linear_distill_cross_entropy(x * factor, w, targets)
        loss.backward()
    expected = once + run(x * 2, w, targets)[3]
    torch.testing.assert_close(w.grad, expected)
    first, _ = linear_distill_cross_entropy(x, w, targets)
    second, _ = linear_distill_cross_entropy(x * 2, w, targets)
    w.grad = None
    (first + second).backward()
    torch.testing.assert_close(w.grad, expected)


def test_the_same_call_gives_the_same_bits():
    x, w, targets = four()
    for first, second in zip(*(run(x, w, targets, chunk=40) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_not_finite_comes_through():
    x, w, targets = four()
    x[1, 2, 3] = torch.nan
    loss, _, dx, _ = run(x, w, targets, chunk=40)
    assert loss.isnan() and dx[1, 2].isnan().all() and dx[0].isfinite().all()
    x, w, targets = four()
    w[50] = torch.inf  # one prototype of the second chunk
    loss, _, dx, _ = run(x, w, targets, chunk=40)
    assert not loss.isfinite() and not dx.isfinite().all()


class Largest(TorchDispatchMode):
    """Most numbers in a tensor that any operator gives."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out)
                 if isinstance(x, torch.Tensor)]  # fmt: skip
        self.numbers = max([self.numbers, *sizes])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits_is_made(dtype, monkeypatch):
    x, w, targets = dino(v=10, b=4, k=4096, d=8, dtype=dtype)
    largest = Largest()
    for name in ("forward_pass", "backward_pass", "_reference"):  # inside the operators
        inner = getattr(linear_distill, name)

        def watched(*args, inner=inner):
            with largest:
                return inner(*args)

        monkeypatch.setattr(linear_distill, name, watched)
    run(x, w, targets, chunk=512)
    chunks = 48 * 512 + linear_chunks.KEEP_BYTES // 2
    assert 4096 * 8 <= largest.numbers <= 4096 * 8 + chunks  # dW, or some chunks
    linear_distill._reference(x, w, targets, 0.1, None)
    assert largest.numbers >= 40 * 4096  # it would have been seen


def test_what_is_kept_for_backward_does_not_grow_with_k():
    kept = []
    for k in (2048, 4096):
        x, w, (target,) = dino(k=k)
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, found=found: found.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            linear_distill_cross_entropy(
                x.requires_grad_(), w.requires_grad_(), [target], chunk=512
            )
        inputs = sum(t.nbytes for t in (w, target.prototypes, target.center))
        kept.append(sum(found.values()) - inputs)
    assert kept[0] == kept[1]


def test_autocast_chooses_the_products():
    x, w, targets = dino(k=1300)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, dx, dw = run(x, w, targets, chunk=512)
    assert loss.dtype == dx.dtype == dw.dtype == torch.float32
    half = [LinearTarget(t.pairs, t.features.bfloat16(), t.prototypes, t.temperature, t.center)
            for t in targets]  # fmt: skip
    want = run(x.bfloat16(), w.bfloat16(), half, chunk=512)
    assert torch.equal(loss, want[0])
    torch.testing.assert_close(dx, want[2].float(), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(dw, want[3].float(), rtol=1e-2, atol=1e-6)
    inside = linear_distill_cross_entropy(x.bfloat16(), w, half, chunk=512)[0]  # fp32 prototypes
    assert torch.equal(inside, loss)
    with torch.autocast("cpu", torch.bfloat16):  # leaves fp64 alone
        wide = run(x.double(), w.double(), targets, chunk=512)
    assert torch.equal(wide[0], run(x.double(), w.double(), targets, chunk=512)[0])


def test_fp16_with_a_scaler_skips_and_recovers():
    x, w, targets = dino(k=1300, dtype=torch.float16)
    w = torch.nn.Parameter(w.float())
    optimizer, start = torch.optim.SGD([w], lr=0.1), w.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    steps = []
    for _ in range(25):
        optimizer.zero_grad()
        loss, _ = linear_distill_cross_entropy(x, w, targets, chunk=512)
        scaler.scale(loss).backward()
        before = w.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        steps.append(not torch.equal(before, w))
    skipped = steps.index(True)
    assert skipped > 3 and all(steps[skipped:])  # infinite at first, then every step counts
    plain = torch.nn.Parameter(start)
    loss, _ = linear_distill_cross_entropy(x.float(), plain, targets, chunk=512)
    loss.backward()
    again = torch.nn.Parameter(start)
    scaled, _ = linear_distill_cross_entropy(x, again, targets, chunk=512)
    (scaled * 2**14).backward()
    assert (again.grad / 2**14 - plain.grad).norm() <= 5e-3 * plain.grad.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    x, w, targets = four()
    *_, dx, dw = run(x, w, targets, chunk=40)
    x, w = x.requires_grad_(), w.requires_grad_()

    def loss(x, w):
        return linear_distill_cross_entropy(x, w, targets, chunk=40)[0]

    checkpoint(loss, x, w, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, dx) and torch.equal(w.grad, dw)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(compiler):
    x, w, targets = four()
    x, w = x.requires_grad_(), w.requires_grad_()
    counter = CompileCounterWithBackend(compiler)

    def loss(x, w, tau, weight):
        moving = [LinearTarget(t.pairs, t.features, t.prototypes, tau, t.center, weight)
                  for t in targets[:2]]  # fmt: skip
        return linear_distill_cross_entropy(x * 1.5, w, moving, temperature=2 * tau, chunk=40)[0]

    torch.compiler.reset()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for numbers in ((0.04, 0.1), (0.05, 0.5), (0.07, 1.0)):
        total = compiled(x, w, *map(torch.tensor, numbers))
        expected = loss(x, w, *numbers)
        torch.testing.assert_close(total, expected)
        have, want = (torch.autograd.grad(t, (x, w)) for t in (total, expected))
        torch.testing.assert_close(have, want)
    assert counter.frame_count == 1


def test_compiles_whole_for_any_batch():
    p = unit(K, D)

    def loss(x, w, h):
        target = LinearTarget(dense(T, V), h, p, 0.04)
        return linear_distill_cross_entropy(x, w, [target], chunk=40)[0]

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for images in (2, 5, 7):
        x, w, h = unit(V, images, D), unit(K, D).requires_grad_(), unit(T, images, D)
        torch.testing.assert_close(compiled(x, w, h), loss(x, w, h))


@pytest.mark.parametrize("chunk", [40, 97, 4096])
def test_the_operators_are_sound(chunk, b=B):
    x, w, targets = four(b)
    calls = []
    original = linear_distill._forward

    def spy(*args):
        calls.append(args)
        return original(*args)

    linear_distill._forward = spy
    try:
        linear_distill_cross_entropy(x, w, targets, chunk=chunk)
    finally:
        linear_distill._forward = original
    args = list(calls[0])
    args[0], args[1] = args[0].clone().requires_grad_(), args[1].clone().requires_grad_()
    torch.library.opcheck(original, tuple(args))
    _, _, stats, kept = original(*args)
    backward = (
        torch.ones(()),
        stats.detach(),
        kept.detach(),
        *(a.detach() if isinstance(a, torch.Tensor) else a for a in args),
    )
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(linear_distill._backward, (*backward, needs))


def test_a_second_derivative_is_refused_but_by_the_reference():
    x, w, targets = four()
    x = x.requires_grad_()
    loss, _ = linear_distill_cross_entropy(x, w, targets)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_distill_cross_entropy has no second derivative"):
        first.square().sum().backward()
    loss, _ = linear_distill_cross_entropy(x, w, targets, backend="reference")
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    first.square().sum().backward()
    assert x.grad.isfinite().all()


def test_torch_func_runs_on_the_reference(monkeypatch):
    monkeypatch.delenv("MOKD_FAST_BACKEND")
    x, w, targets = dino()
    for i in (0, 1):
        grad = torch.func.grad(lambda *a: linear_distill_cross_entropy(*a, targets)[0], argnums=i)
        torch.testing.assert_close(grad(x, w), run(x, w, targets, "cpu")[2 + i])


@pytest.mark.parametrize("i", [0, 1])
def test_forward_mode_runs_on_the_reference(i, monkeypatch):
    monkeypatch.delenv("MOKD_FAST_BACKEND")
    x, w, targets = dino()
    args, tangent = [x, w], randn(*(x, w)[i].shape)
    gradient = run(x, w, targets, "cpu")[2 + i]
    with forward_ad.dual_level():
        args[i] = forward_ad.make_dual(args[i], tangent)
        loss, _ = linear_distill_cross_entropy(*args, targets)
        found = forward_ad.unpack_dual(loss).tangent
        with pytest.raises(RuntimeError, match="cpu was asked for but it has no forward-mode"):
            linear_distill_cross_entropy(*args, targets, backend="cpu")
    torch.testing.assert_close(found, (gradient * tangent).sum())


def test_explain_and_the_docstring(monkeypatch):
    monkeypatch.delenv("MOKD_FAST_BACKEND")
    x, w, targets = dino()
    text = explain("linear_distill_cross_entropy", x, w, targets, temperature=0.2)
    assert "cpu: chosen" in text and "reference: can run too" in text
    text = explain("linear_distill_cross_entropy", x.to("meta"), w, targets)
    assert "cpu: it takes tensors on the CPU, one is on meta" in text
    assert doctest.testmod(linear_distill).failed == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(V, D)}, "features must be floating [V, B, D], got torch.float32 of"),
        ({"x": torch.zeros(V, B, D).long()}, "features must be floating"),
        ({"w": torch.zeros(K, D + 1)}, "weight must be floating prototypes [K, 16] for features"),
        ({"w": torch.zeros(0, D)}, "K is 0"),
        ({"x": torch.zeros(V, B, 0), "w": torch.zeros(K, 0)}, "weight has no features: D is 0"),
        (
            {"features": torch.zeros(T, B, 0), "prototypes": torch.zeros(K, 0)},
            "targets[0].prototypes has no features: D is 0",
        ),
        ({"w": torch.zeros(K, D, device="meta")}, "weight is on meta, its features on cpu"),
        ({"features": torch.zeros(T, B + 1, D)}, "targets[0].features must be floating [T, 3, D]"),
        ({"features": torch.zeros(T, B, D + 1)}, "targets[0].prototypes must be floating"),
        ({"prototypes": torch.zeros(K - 1, D)}, "must be as many as the student's, 97, got 96"),
        ({"pairs": dense(T, V + 1)}, "targets[0].pairs must be [T, V] = [2, 4], got [2, 5]"),
        ({"pairs": ((0.0,) * V,) * T}, "nothing to pair"),
        ({"center": torch.zeros(K + 1)}, "targets[0].center must be [97], got [98]"),
        ({"row_weight": torch.zeros(B + 1)}, "targets[0].row_weight must be [3], got [4]"),
        ({"temperature": 0.0}, "targets[0].temperature must be > 0"),
        ({"weight": torch.ones(2)}, "targets[0].weight must be 0-d"),
        ({"chunk": 0}, "chunk must be at least one column, got 0"),
        ({"targets": []}, "targets is empty"),
    ],
)
def test_bad_input(change, message):
    change = dict(change)
    x, w, (target,) = dino()
    x, w, chunk = change.pop("x", x), change.pop("w", w), change.pop("chunk", None)
    targets = change.pop("targets", None)
    if targets is None:
        targets = [LinearTarget(**{**vars(target), **change})]
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_distill_cross_entropy(x, w, targets, chunk=chunk)


def test_bad_calls():
    x, w, (target,) = dino()
    with pytest.raises(ValueError, match=r"got a single one: pass \[target\]"):
        linear_distill_cross_entropy(x, w, target)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        linear_distill_cross_entropy(x, w, [target], temperature=-1)
    with pytest.raises(ValueError, match="no backend 'fast'"):
        linear_distill_cross_entropy(x, w, [target], backend="fast")
    logits = Target(dense(T, V), torch.zeros(T, B, K + 1))
    with pytest.raises(ValueError, match=r"must hold floating \[T, 3, 97\]"):
        linear_distill_cross_entropy(x, w, [logits])
