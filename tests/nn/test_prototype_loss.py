"""PrototypeLoss: DINO's loss and its prototype layers, in other people's training."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mokd_fast.interop.dino import DINOLoss
from mokd_fast.nn import PrototypeLoss
from mokd_fast.ops import ema_update_, matched_pairs

V, T, B, K, D = 4, 2, 6, 50, 8
WAYS = ["fused", "fused-linear", "reference"]


def features(seed, images=B, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(V, images, D, generator=generator, dtype=dtype), dim=-1)
    return x.requires_grad_(), x.detach()[:T] + 0.1


def criterion(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return PrototypeLoss(D, K, **options).to(dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("train_norm", [False, True])
def test_three_steps_of_dino(way, train_norm):
    """Against DINOLoss on the logits of weight-normed layers of its own."""
    ours = criterion(train_norm=train_norm, backend=way)
    names = ("weight_g", "weight_v")
    mine = [ours.student.get_parameter(n) for n in names]
    student = [p.detach().clone().requires_grad_(p.requires_grad) for p in mine]
    teacher = [p.detach().clone() for p in student]
    theirs = DINOLoss(K, V, 0.04, 0.04, 0, 1).double()
    layer = lambda x, gv: F.linear(x, gv[0] * F.normalize(gv[1], dim=1))  # noqa: E731
    for step in range(3):
        x, h = features(step)
        loss = ours(x, h)
        s, t = (layer(y.flatten(0, 1), gv) for y, gv in ((x, student), (h, teacher)))
        want = theirs(s, t, 0)
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
        trained = [x, *(p for p in mine if p.requires_grad)]
        grads = torch.autograd.grad(loss, trained)
        wanted = torch.autograd.grad(want, [x, *(p for p in student if p.requires_grad)])
        torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-14)
        with torch.no_grad():
            for pairs, found in ((mine, grads), (student, wanted)):
                for p, g in zip((p for p in pairs if p.requires_grad), found[1:], strict=True):
                    p -= 0.5 * g
        ours.update(h, 0.9)
        ema_update_(teacher, [p.detach() for p in student], 0.9)
        torch.testing.assert_close(ours.center.value, theirs.center[0], rtol=1e-10, atol=1e-14)
    assert [p.requires_grad for p in mine] == [train_norm, True]
    keys = {f"{who}.{name}" for who in ("student", "teacher") for name in names}
    assert set(ours.state_dict()) == keys | {"center.center"}


def test_temperature_pairs_and_row_weights():
    ours, (x, h) = criterion(), features(0)
    plain = ours(x, h)
    tau = torch.tensor(0.04, dtype=torch.float64)
    assert torch.equal(ours(x, h, teacher_temperature=tau), plain)
    assert ours(x, h, teacher_temperature=0.2) != plain
    weights = torch.tensor([2.0, 0, 0, 0, 0, 0]).double()
    alone = ours(x[:, :1], h[:, :1])
    torch.testing.assert_close(ours(x, h, row_weight=weights) * B / 2, alone)
    # iBOT's: every patch with its own target.
    matched = ours(x[:2], h, pairs=matched_pairs(2))
    both = [ours(x[i : i + 1], h[i : i + 1], pairs=matched_pairs(1)) for i in (0, 1)]
    torch.testing.assert_close(matched, sum(both) / 2)


@pytest.mark.parametrize("way", WAYS)
def test_accumulation_and_checkpointing(way):
    """Half batches with one update are the whole batch; a forward pass more changes nothing."""
    whole, halves = criterion(backend=way), criterion(backend=way)
    (x, h), weights = features(0), lambda c: c.student.weight_v
    whole(x, h).backward()
    whole.update(h, 0.9)
    for part in (slice(0, B // 2), slice(B // 2, B)):
        checkpoint(halves, x[:, part], h[:, part], use_reentrant=False).div(2).backward()
    halves.update(h, 0.9)
    torch.testing.assert_close(weights(halves).grad, weights(whole).grad)
    torch.testing.assert_close(halves.state_dict(), whole.state_dict())
    assert whole.center.value.any()


@pytest.mark.parametrize("way", ["fused", "fused-linear"])
def test_fp16_with_a_scaler(way):
    """Steps that overflow change nothing, then every one counts."""
    loss = criterion(torch.float32, backend=way)
    optimizer = torch.optim.SGD(loss.student.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    moved = []
    for step in range(30):
        x, h = features(step, dtype=torch.float32)
        with torch.autocast("cpu", torch.float16):
            total = loss(x, h)
        assert total.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(total).backward()
        before = {k: v.clone() for k, v in loss.state_dict().items()}
        scaler.unscale_(optimizer)
        skip = ~loss.student.weight_v.grad.isfinite().all()
        scaler.step(optimizer)
        scaler.update()
        loss.update(h, torch.where(skip, 1.0, 0.9).double(), skip=skip)
        after = loss.state_dict()
        moved.append(
            {k for k in after if k.endswith(("_v", "center")) and not after[k].equal(before[k])}
        )
    first = next(i for i, names in enumerate(moved) if names)
    assert first > 3 and all(len(names) == 3 for names in moved[first:])


@pytest.mark.parametrize("way", ["fused", "fused-linear"])
def test_compiles_whole(way):
    from torch._dynamo.testing import CompileCounterWithBackend

    loss, counter = criterion(torch.float32, backend=way), CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for tau in (0.04, 0.05, 0.07):
        x, h = features(0, dtype=torch.float32)
        have = compiled(x, h, teacher_temperature=torch.tensor(tau))
        want = loss(x, h, teacher_temperature=tau)
        torch.testing.assert_close(have, want)
        for a, b in zip(
            *(torch.autograd.grad(y, [x, loss.student.weight_v]) for y in (have, want)), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def _worker(rank, folder, way):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loss = DistributedDataParallel(criterion(backend=way))
    optimizer = torch.optim.SGD(loss.module.student.parameters(), lr=0.1)
    for step in range(3):
        x, h = features(step)
        part = slice(rank * B // 2, (rank + 1) * B // 2)
        optimizer.zero_grad()
        loss(x[:, part], h[:, part]).backward()
        optimizer.step()
        loss.module.update(h[:, part], 0.9)
    torch.save(loss.module.state_dict(), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["fused", "fused-linear"])
def test_two_processes_are_one_with_both_batches(tmp_path, way):
    mp.start_processes(_worker, (str(tmp_path), way), nprocs=2, start_method="fork")
    alone = criterion(backend=way)
    optimizer = torch.optim.SGD(alone.student.parameters(), lr=0.1)
    for step in range(3):
        x, h = features(step)
        optimizer.zero_grad()
        alone(x, h).backward()
        optimizer.step()
        alone.update(h, 0.9)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / str(rank)), alone.state_dict())


def test_bad_input():
    loss, (x, h) = criterion(), features(0)
    with pytest.raises(ValueError, match=r"prototypes \[K, 5\]"):
        loss(x[..., :5], h)
    with pytest.raises(ValueError, match=r"targets\[0\].prototypes .* \[K, 3\]"):
        loss(x, h[..., :3])
    with pytest.raises(ValueError, match="leave nothing to pair"):
        loss(x[:1], h[:1])
    with pytest.raises(ValueError, match="temperature"):
        loss(x, h, teacher_temperature=0.0)
    with pytest.raises(ValueError, match=r"prototypes of 'center' must be floating \[50, 3\]"):
        loss.update(h[..., :3], 0.9)


def test_the_readme_turns_a_plain_script_into_one():
    """Its diff applies to the script, and both learn the same."""
    plain = Path(__file__).with_name("plain_dino.py").read_text()
    readme = Path(__file__).parents[2] / "README.md"
    (diff,) = re.findall(r"```diff\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    changed = plain
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(x[1:] for x in lines if x[0] in f" {s}") for s in "-+")
        assert changed.count(before) == 1, before
        changed = changed.replace(before, after)
    spaces = []
    torch.set_default_dtype(torch.float64)  # AdamW makes much of the rounding of small gradients
    try:
        for text in (plain, changed):
            spaces.append({})
            exec(text, spaces[-1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert "PrototypeLoss" in changed and "DINOLoss" not in changed and "last_layer" not in changed
    first, second = (space["losses"] for space in spaces)
    assert len(first) == 20 and abs(first[-1] - first[0]) > 1  # they moved
    torch.testing.assert_close(second, first, rtol=1e-9, atol=0)
