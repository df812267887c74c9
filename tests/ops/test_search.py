"""feature_search and joint_attention: values and gradients against float64, PyTorch around them."""

import dataclasses
import inspect
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from mokd_fast.ops import attention as forms
from mokd_fast.ops import cpu, cuda, dispatch, explain, feature_search, joint_attention, search

from .conftest import levels

needs_native = pytest.mark.skipif(cpu.native is None, reason="the native module was not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPERATORS = (feature_search, joint_attention)
# Q, B, H, N, d: one of everything, odd sizes, more rows and tokens than a tile, the widest head
SHAPES = [
    (1, 1, 1, 1, 16), (3, 2, 2, 49, 24), (8, 2, 3, 196, 64), (70, 1, 2, 130, 40),
    (2, 1, 2, 65, 128), (4, 1, 1, 1000, 16), (5, 2, 1, 7, 33), (2, 1, 2, 9, 128),
]  # fmt: skip
# What the emulator, which is slow, takes for them. The CUDA kernels have no tiles of rows or keys:
# a warp has one, a block four, a lane every 32nd number of a head. So these keep the widths, odd
# heads and images, blocks partly filled, and more queries than tokens.
EMULATED = {
    (3, 2, 2, 49, 24): (3, 2, 2, 6, 24), (8, 2, 3, 196, 64): (2, 2, 3, 5, 64),
    (70, 1, 2, 130, 40): (11, 1, 2, 3, 40), (2, 1, 2, 65, 128): (2, 1, 1, 10, 128),
    (4, 1, 1, 1000, 16): (4, 1, 1, 15, 16),
}  # fmt: skip


def case(operator, shape, dtype=torch.float32, scale=1.0, strided=False):
    """Its tensors: x, k, v, or q, k, v, q_x, k_x, v_x."""
    Q, B, H, N, d = shape
    g = torch.Generator().manual_seed(N + d)
    if strided:  # as they come out of one linear layer
        maps = torch.randn(B, N, 3, H, d, generator=g, dtype=torch.float64).permute(2, 0, 3, 1, 4)
        asking = torch.randn(Q, B, 3, H, d, generator=g, dtype=torch.float64).movedim(2, 0)
    else:
        maps = torch.randn(3, B, H, N, d, generator=g, dtype=torch.float64)
        asking = torch.randn(3, Q, B, H, d, generator=g, dtype=torch.float64)
    tensors = [*maps, *asking] if operator is joint_attention else [asking[0], *maps[1:]]
    return [(t * scale).to(dtype) for t in tensors]


def literal(*tensors):
    """softmax over the tokens, and over the query and the tokens: by hand, one query at a time."""
    if len(tensors) == 3:
        x, k, v = tensors
        return (torch.stack([attention(q.unsqueeze(2), k, v).squeeze(2) for q in x]),)
    q, k, v, q_x, k_x, v_x = tensors
    found = []
    for mine in zip(q_x, k_x, v_x, strict=True):
        both = [torch.cat([m.unsqueeze(2), t], 2) for m, t in zip(mine, (q, k, v), strict=True)]
        found.append(attention(*both))
    found = torch.stack(found)
    return found[..., 1:, :], found[..., 0, :]


def attention(q, k, v):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True) @ v


def run(operator, tensors, rounded=torch.float64, **options):
    """Results and gradients for random cotangents, which `rounded` can hold."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    found = operator(*leaves, **options)
    found = found if isinstance(found, tuple) else (found,)
    g = torch.Generator().manual_seed(1)
    given = [torch.randn(f.shape, generator=g).to(rounded).to(f) for f in found]
    grads = torch.autograd.grad(found, leaves, given)
    return [*(f.detach() for f in found), *grads]


def check(operator, tensors, backend, within=2e-6, times=1):
    """No worse than the reference in the same dtype, both against the formula in float64."""
    dtype = tensors[0].dtype
    exact = run(literal, [t.double() for t in tensors], dtype)
    rough = run(operator, tensors, dtype, backend="reference")
    mine = run(operator, tensors, dtype, backend=backend)
    for have, allowed, truth in zip(mine, rough, exact, strict=True):
        assert have.dtype == tensors[0].dtype and have.shape == truth.shape
        if not truth.numel():
            continue
        top = max(1.0, truth.abs().max())
        error, theirs = ((x.double() - truth).abs().max() for x in (have, allowed))
        assert error <= times * theirs + (1e-13 if have.dtype == torch.float64 else within) * top


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_are_asked_for_on_any_device(operator):
    """As tests/kernels/search_values.py does on a GPU."""
    tensors = [t.to("meta") for t in case(operator, (3, 2, 2, 9, 16))]
    assert all(found.is_meta for found in run(literal, tensors))


@pytest.fixture(params=["baseline", "v3", "v4", "cuda"])
def backend(request, monkeypatch):
    """The CPU kernels of each level, and those of CUDA, emulated where there is no GPU."""
    if request.param == "cuda":
        request.getfixturevalue("cuda_kernels")
        monkeypatch.setattr(cuda, "search_why_not", lambda *args: None)
        return "cuda"
    if request.param not in levels():
        pytest.skip(f"no native module here with kernels of level {request.param}")
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", request.param)
    return "cpu"


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(backend, operator, dtype, shape):
    if backend == "cuda" and not torch.cuda.is_available():
        shape = EMULATED.get(shape, shape)
    check(operator, case(operator, shape, dtype), backend)
    check(operator, case(operator, shape, dtype, strided=True), backend)


@needs_native
def test_the_longest_map():
    check(feature_search, case(feature_search, (2, 1, 1, 4096, 16)), "cpu")


@pytest.mark.parametrize("operator", OPERATORS)
def test_plain_sdpa(operator):
    tensors = case(operator, (3, 2, 2, 49, 24))
    check(operator, tensors, "sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        check(operator, tensors, "sdpa")


@pytest.mark.parametrize("found", ["nothing", "another's", "ours"])
def test_why_xformers_has_no_kernels(found, monkeypatch):
    monkeypatch.setattr(forms, "find_spec", lambda name: None if found == "nothing" else name)
    error = None if found == "ours" else OSError("libcudart.so.12")
    library = types.SimpleNamespace(_cpp_library_load_exception=error)
    monkeypatch.setattr(forms, "import_module", lambda name: library)
    forms.xformers_missing.cache_clear()
    said = forms.xformers_missing()
    forms.xformers_missing.cache_clear()
    reasons = {"nothing": "is not installed", "another's": "built for another PyTorch"}
    assert said is None if found == "ours" else reasons[found] in said


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_xformers_is_given(operator, monkeypatch):
    """Its attention runs on a GPU alone; here PyTorch's takes its place, in its layout."""
    tensors = case(operator, (3, 2, 2, 49, 24))
    with pytest.raises(RuntimeError, match="xformers has no attention for cpu tensors"):
        operator(*tensors, backend="xformers")

    from xformers.ops import memory_efficient_attention as theirs

    assert list(inspect.signature(theirs).parameters)[:3] == ["query", "key", "value"]

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert query.shape[2:] == key.shape[2:] == (2, 24)  # [batch, rows, heads, width]
        rows = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(*rows, scale=scale).transpose(1, 2)

    modules = {name: types.ModuleType(name) for name in ("xformers", "xformers.ops")}
    modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    backends = dispatch._BACKENDS[operator.__name__]
    (found,) = (backend for backend in backends if backend.name == "xformers")
    at = [dataclasses.replace(found, why_not=lambda *given: None)]
    monkeypatch.setitem(dispatch._BACKENDS, operator.__name__, at + backends[-1:])
    check(operator, tensors, "xformers")


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_queries(operator, backend):
    tensors = case(operator, (0, 2, 2, 5, 16))
    found = run(operator, tensors, backend=backend)
    assert all(f.shape[0] == 0 for f in found[: len(tensors) // 3])
    grads = found[len(tensors) // 3 :]
    assert all((g == 0).all() and g.shape == t.shape for g, t in zip(grads, tensors, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(backend, operator, dtype):
    """Scores of +-1e4: one token takes all. In fp32 such a score is rounded by 1e-3, to one side or
    the other as the order of its sum has it: that is what `times` allows for."""
    N = 20 if backend == "cuda" else 70
    tensors = case(operator, (3, 1, 2, N, 64), dtype, scale=75.0)
    x, k = (tensors[-3], tensors[1])  # of both operators
    assert (torch.einsum("qbhd,bhnd->qbhn", x, k).abs().max() / 64**0.5) > 1e4
    check(operator, tensors, backend, times=3)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", [pytest.param("cpu", marks=needs_native), "sdpa"])
def test_nan_stays_in_its_row(operator, name):
    """Of 9 tokens PyTorch's own attention on the CPU would make zeros."""
    tensors = case(operator, (3, 2, 2, 9, 16))
    at = 0 if operator is feature_search else 3
    tensors[at][1, 0, 1, 3] = torch.nan
    with torch.no_grad():
        found = operator(*tensors, backend=name)
    if operator is feature_search:
        assert found[1, 0, 1].isnan().all() and found.isnan().sum() == 16
        return
    tokens, query = found
    assert query[1, 0, 1].isnan().all() and query.isnan().sum() == 16 and tokens.isfinite().all()


@needs_native
def test_an_infinite_score_is_weight_0_or_nan():
    x, k, v = case(feature_search, (2, 1, 1, 9, 16))
    x[:, ..., 0] = 1
    k[..., 4, 0] = -torch.inf
    out, weights = feature_search(x, k, v, weights=True, backend="cpu")
    assert out.isfinite().all() and (weights[..., 4] == 0).all()
    torch.testing.assert_close(out, feature_search(x, k, v, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_with_the_result(backend, dtype):
    tensors = case(feature_search, (3, 2, 2, 130, 24), dtype)
    out, weights = feature_search(*tensors, weights=True, backend=backend)
    assert torch.equal(out, feature_search(*tensors, backend=backend))
    assert weights.shape == (3, 2, 2, 130)
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
    x, k, _ = (t.double() for t in tensors)
    expected = (torch.einsum("qbhd,bhnd->qbhn", x, k) / 24**0.5).softmax(-1)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-7)
    leaves = [t.requires_grad_() for t in tensors]
    assert not feature_search(*leaves, weights=True, backend=backend)[1].requires_grad


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_gradcheck(operator, name):
    tensors = case(operator, (2, 1, 2, 3, 16), torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: operator(*t, backend=name), leaves)


@needs_native
def test_opcheck():
    x, k, v = (t.requires_grad_() for t in case(feature_search, (2, 2, 1, 5, 16)))
    for weights in (False, True):
        torch.library.opcheck(search._search, (x, k, v, weights, "cpu"))
    rows, stats, _ = search._search(x, k, v, False, "cpu")
    args = torch.ones_like(rows), stats, x.detach(), k.detach(), v.detach(), "cpu"
    torch.library.opcheck(search._search_backward, args)
    tensors = [t.requires_grad_() for t in case(joint_attention, (2, 2, 1, 5, 16), strided=True)]
    torch.library.opcheck(search._joint, (*tensors, "cpu"))
    with torch.no_grad():
        tokens, query, rows, stats = search._joint(*tensors, "cpu")
    plain = [t.detach() for t in tensors]
    torch.library.opcheck(search._joint_backward, (tokens, query, rows, stats, *plain, "cpu"))


@needs_native
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_whole_and_sees_fake_tensors(operator):
    tensors = case(operator, (2, 2, 2, 9, 16))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *t: operator(*t, backend="cpu"), backend=counter, fullgraph=True
    )
    for mine, theirs in zip(
        run(compiled, tensors), run(operator, tensors, backend="cpu"), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert counter.frame_count == 1
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(t) for t in tensors), backend="cpu")
    fake = fake if isinstance(fake, tuple) else (fake,)
    real = operator(*tensors, backend="cpu")
    for f, r in zip(fake, real if isinstance(real, tuple) else (real,), strict=True):
        assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)


@needs_native
@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_changes_no_bit(operator):
    tensors = case(operator, (2, 2, 2, 9, 16))
    expected = run(operator, tensors, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("cpu", "reference"):
            found = operator(*tensors, backend=name)
            found = found if isinstance(found, tuple) else (found,)
            for mine, theirs in zip(found, expected, strict=False):
                torch.testing.assert_close(mine, theirs)


@needs_native
@pytest.mark.parametrize("operator", OPERATORS)
def test_bits_do_not_depend_on_threads(operator):
    tensors = case(operator, (5, 3, 2, 150, 24))
    torch.set_num_threads(3)
    many = run(operator, tensors, backend="cpu")
    torch.set_num_threads(1)
    assert all(map(torch.equal, many, run(operator, tensors, backend="cpu")))


@needs_native
@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_func_runs_on_the_reference(operator, monkeypatch):
    """Whichever of the tensors is transformed; a kernel would drop a tangent, or find no memory."""
    monkeypatch.delenv("MOKD_FAST_BACKEND", raising=False)
    tensors = case(operator, (2, 1, 2, 5, 16))
    for i, tensor in enumerate(tensors):

        def first(t, i=i, **options):
            found = operator(*tensors[:i], t, *tensors[i + 1 :], **options)
            return found[0] if isinstance(found, tuple) else found

        def plain(t, first=first):
            return first(t, backend="reference")

        mine, theirs = (torch.func.jvp(f, (tensor,), (tensor,)) for f in (first, plain))
        torch.testing.assert_close(mine, theirs)
        with forward_ad.dual_level():
            found = first(forward_ad.make_dual(tensor, tensor))
            torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, theirs[1])
        torch.testing.assert_close(torch.func.vmap(first)(tensor[None])[0], plain(tensor))
        mine, theirs = (torch.func.grad(lambda t, f=f: f(t).sum())(tensor) for f in (first, plain))
        torch.testing.assert_close(mine, theirs)
        for name in ("cpu", "sdpa"):
            with pytest.raises(RuntimeError, match=r"under torch\.func transforms"):
                torch.func.grad(lambda t, name=name: first(t, backend=name).sum())(tensor)


@needs_native
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_second_derivative_is_refused(operator):
    tensors = [t.requires_grad_() for t in case(operator, (2, 1, 1, 4, 16))]
    found = operator(*tensors, backend="cpu")
    found = found[0] if isinstance(found, tuple) else found
    (first,) = torch.autograd.grad(found.square().sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative on this backend"):
        first.square().sum().backward()


@needs_native
def test_without_gradients_nothing_is_kept():
    x, k, v = case(feature_search, (2, 1, 1, 4, 16))
    assert feature_search(x, k, v, backend="cpu").grad_fn is None
    with torch.no_grad():
        found = joint_attention(
            *(t.requires_grad_() for t in case(joint_attention, (2, 1, 1, 4, 16)))
        )
    assert all(f.grad_fn is None for f in found)


@needs_native
def test_tokens_join_their_heads_without_a_copy():
    tokens, _ = joint_attention(*case(joint_attention, (2, 3, 4, 5, 16)), backend="cpu")
    assert tokens.transpose(2, 3).is_contiguous()


def test_bad_input():
    x, k, v = case(feature_search, (2, 3, 4, 5, 16))
    wrong = {
        r"must be fp16, .* or fp64 \[B, H, N, d\] .* got torch.float32 of shape \[3, 4, 16\]":
            (x, k[:, :, 0], v),
        r"key must be fp16, bf16, fp32 or fp64 .* got torch.float8_e5m2": [
            t.to(torch.float8_e5m2) for t in (x, k, v)
        ],
        r"query must be \[Q, B, H, d\] = \[Q, 3, 4, 16\] .* got \[2, 1, 4, 16\]": (x[:, :1], k, v),
        r"got \[2, 3, 4, 8\]": (x[..., :8], k, v),
        r"value must be \[3, 4, 5, 16\] like key, got \[3, 4, 4, 16\]": (x, k, v[:, :, :4]),
        r"value must be torch.float32 on cpu like key, got torch.float64": (x, k, v.double()),
        r"H, N and d >= 1": (x, k[:, :, :0], v[:, :, :0]),
        r"got torch.float32 of shape \[3, 0, 5, 16\]": (x[:, :, :0], k[:, :0], v[:, :0]),
    }  # fmt: skip
    for message, tensors in wrong.items():
        with pytest.raises(ValueError, match=message):
            feature_search(*tensors)
    q, k, v, *asking = case(joint_attention, (2, 3, 4, 5, 16))
    with pytest.raises(ValueError, match=r"k_x must be \[2, 3, 4, 16\] like q_x, got \[1,"):
        joint_attention(q, k, v, asking[0], asking[1][:1], asking[2])


@needs_native
def test_a_head_that_has_no_kernel_takes_the_next_backend():
    x, k, v = case(feature_search, (2, 1, 1, 5, 8))
    lines = explain("feature_search", x, k, v).splitlines()
    assert lines[-4:] == [
        "cpu: it takes heads 16 to 128 wide, these are 8",
        "sdpa: chosen",
        "xformers: xformers has no attention for cpu tensors",
        "reference: can run too",
    ]
    with pytest.raises(RuntimeError, match="heads 16 to 128 wide, these are 8"):
        feature_search(x, k, v, backend="cpu")
    torch.testing.assert_close(feature_search(x, k, v), literal(x, k, v)[0])
    assert "sdpa: chosen" in explain("joint_attention", *case(joint_attention, (2, 1, 1, 5, 8)))
    assert "sdpa: it gives no attention weights" in explain("feature_search", x, k, v, weights=True)


def scfs(tokens, crops):
    """The search of SCFS (Song et al. 2023): a crop's cosine with each place of the map, times the
    map, averaged. Its similarity has no softmax; `feature_search` gives the sharpened form, where
    a temperature turns the cosines into weights that sum to 1. tokens [B, N, C], crops [Q, B, C]"""
    keys, queries = (F.normalize(t, dim=-1) for t in (tokens, crops))
    width = tokens.shape[-1]
    asked = queries.unsqueeze(2) * (width**0.5 / 0.1)  # over sqrt d comes a temperature of 0.1
    return feature_search(asked, keys.unsqueeze(1), tokens.unsqueeze(1)).squeeze(2)


def test_the_search_of_scfs():
    tokens, crops = torch.randn(3, 49, 64), torch.randn(8, 3, 64)
    cosines = F.cosine_similarity(crops.unsqueeze(2), tokens, dim=-1)  # [Q, B, N]
    expected = torch.einsum("qbn,bnc->qbc", (cosines / 0.1).softmax(-1), tokens)
    torch.testing.assert_close(scfs(tokens, crops), expected, rtol=1e-4, atol=1e-5)


@needs_native
def test_where_a_plain_form_is_faster_dispatch_takes_it():
    """As bench/search.py measured: few fp32 queries with a backward pass; not in 16 bit, nor when
    weights are wanted."""
    x, k, v = case(feature_search, (4, 1, 1, 5, 16))

    def chosen(x, *rest):
        lines = explain("feature_search", x, *rest).splitlines()
        return next(line.split(":")[0] for line in lines if line.endswith(": chosen"))

    assert chosen(x[:1], k, v) == "cpu"
    k.requires_grad_()
    assert chosen(x, k, v) == "sdpa" and chosen(torch.cat([x, x]), k, v) == "cpu"
    assert chosen(x, k, v, True) == "cpu"
    assert chosen(*(t.bfloat16() for t in (x, k, v))) == "cpu"
    with torch.no_grad():
        assert chosen(x, k, v) == "cpu"
