"""The diagnostics of a step against their formulas, at the extremes they are read for."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mokd_fast.nn import Temperatures
from mokd_fast.nn.mokd import HeadRows, StepLosses
from mokd_fast.ops import Center
from mokd_fast.train import diagnose as diagnose_module
from mokd_fast.train.diagnose import diagnose
from mokd_fast.train.loop import Trainer
from mokd_fast.train.networks import build
from tests.train.recipes import VIT, pictures, silent, small

K, B, C = 32, 6, 8
TAUS = [Temperatures(0.5, 0.04, 0.04)]


def teacher_rows(logits):
    return HeadRows(logits.new_zeros(*logits.shape[:2], 1), logits.new_zeros(K, 1), logits)


def found(logits, features, center=None, student=None):
    student = logits if student is None else student
    centers = Center({"mlp_1": K})
    if center is not None:
        centers.mlp_1 = center
    terms = {"self_mlp_1": torch.tensor(4.0)}
    teacher = {"mlp_1": teacher_rows(logits)}
    out = StepLosses([], terms, {}, teacher, {"mlp_1": student}, [features], {})
    mokd = SimpleNamespace(
        centers=centers, student_temperature=0.1, student_prototypes=lambda head: torch.eye(K)
    )
    return diagnose(out, mokd, TAUS)


def test_extremes():
    """Uniform and one-hot teachers, constant features and such that point everywhere."""
    flat = found(torch.zeros(2, B, K), torch.randn(1, C).expand(2 * B, C))
    assert flat["teacher_entropy_mlp_1"] == pytest.approx(math.log(K))
    assert flat["kl_mlp_1"] == pytest.approx(4 - math.log(K))
    assert flat["prototypes_used_mlp_1"] == pytest.approx(1 / (2 * B))
    assert flat["center_norm_mlp_1"] == 0
    assert flat["feature_std_1"] < 1e-6
    rows = torch.arange(2 * B)
    sharp = (1e4 * F.one_hot(rows, K)).float().view(2, B, K)
    corners = torch.eye(C).repeat(2, 1)
    peaked = found(sharp, torch.cat([corners, -corners]))
    assert peaked["teacher_entropy_mlp_1"] == 0 and peaked["kl_mlp_1"] == 4
    assert peaked["prototypes_used_mlp_1"] == 1
    assert peaked["feature_std_1"] == pytest.approx(1)


def test_the_centre_is_subtracted():
    """A prototype that wins everywhere by its mean alone does not count as used."""
    torch.manual_seed(0)
    logits, center = torch.randn(2, B, K), torch.zeros(K)
    plain = found(logits, torch.randn(2 * B, C))
    center[3] = 50.0
    shifted = found(logits + center, torch.randn(2 * B, C), center)
    for key in ("teacher_entropy_mlp_1", "prototypes_used_mlp_1"):
        torch.testing.assert_close(shifted[key], plain[key], rtol=1e-5, atol=1e-6)
    assert shifted["center_norm_mlp_1"] == 50
    assert plain["prototypes_used_mlp_1"] > 1 / (2 * B)


def test_the_student_has_its_own_temperature_and_no_centre():
    """It can be uniform beside a sharp teacher, and the other way round."""
    torch.manual_seed(0)
    sharp, flat = 1e4 * torch.randn(2, B, K), torch.ones(2, B, K)
    features, center = torch.randn(2 * B, C), 1e4 * torch.eye(K)[3]
    values = found(sharp, features, center, student=flat)
    assert values["student_entropy_mlp_1"] == pytest.approx(math.log(K))
    assert values["teacher_entropy_mlp_1"] < 0.01
    assert found(flat, features, student=sharp)["student_entropy_mlp_1"] < 0.01
    p = F.softmax(torch.randn(2, B, K), dim=-1)
    values = found(flat, features, center, student=0.1 * p.log())
    assert values["student_entropy_mlp_1"] == pytest.approx(-(p * p.log()).sum().item() / (2 * B))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    values = found(torch.randn(2, B, K).to(dtype), torch.randn(2 * B, C).to(dtype))
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert all(value.isfinite() for value in values.values())


@pytest.mark.parametrize("way", ["fused", "fused-linear"])
def test_kl_is_the_one_of_the_pairs(way, monkeypatch):
    """self = H(teacher) + KL, with the KL of every pair written out; of a model alone. The rows
    come in blocks, whether their logits are stored or not."""
    monkeypatch.setattr(diagnose_module, "BLOCK", 3 * 64)
    torch.manual_seed(0)
    override = f"loss.prototypes={way}"
    mokd = build(small("x", override, models=[VIT], t_head={"depth": 1, "heads": 4})).train()
    mokd.centers.update({"mlp_1": torch.randn(1, 64), "t_1": torch.randn(1, 64)})
    views, local_views = torch.randn(2, 4, 1, 28, 28), torch.randn(2, 4, 1, 14, 14)
    out = mokd(views, local_views, [Temperatures(0.3, 0.3, 0.3)])
    values = diagnose(out, mokd, [Temperatures(0.3, 0.3, 0.3)])
    student = mokd.students[0]
    for head in ("mlp", "t"):
        with torch.no_grad():
            x = torch.cat([getattr(student(x), head) for x in (views, local_views)])
            s = getattr(student, f"{head}_head").last_layer(x)
            rows = out.teachers[f"{head}_1"]
            z = getattr(mokd.teachers[0], f"{head}_head").last_layer(rows.features)
        log_p = F.log_softmax(s / 0.1, dim=-1)
        entropy = -(log_p.exp() * log_p)[:2].sum(dim=-1).mean()  # of the global views
        assert values[f"student_entropy_{head}_1"] == pytest.approx(entropy.item(), rel=1e-5)
        q = F.softmax((z - mokd.centers[f"{head}_1"]) / 0.3, dim=-1)
        assert (rows.logits is None) == (way == "fused-linear")
        kls = [
            F.kl_div(log_p[v], q[t], reduction="batchmean")
            for t in range(2) for v in range(4) if t != v
        ]  # fmt: skip
        assert values[f"prototypes_used_{head}_1"] == q.argmax(-1).unique().numel() / 8
        assert values[f"kl_{head}_1"] == pytest.approx(torch.stack(kls).mean().item(), rel=1e-4)
    assert "feature_std_1" in values and "feature_std_2" not in values
    with torch.autocast("cpu", torch.bfloat16):
        half = mokd(views, local_views, [Temperatures(0.3, 0.3, 0.3)])
    for key, value in diagnose(half, mokd, [Temperatures(0.3, 0.3, 0.3)]).items():
        torch.testing.assert_close(value, values[key], rtol=0.05, atol=0.05)


def test_only_steps_that_are_logged_are_diagnosed(tmp_path):
    recipe = small(pictures(tmp_path / "data", 14), "train.checkpoint_every=5it")
    trainer = Trainer(recipe, tmp_path / "run", silent())
    trainer.mokd.train()
    batches = trainer.loader.batches()
    logged = [k + 1 for k in range(6) if trainer.step(k, batches).diagnostics]
    assert logged == [2, 4, 5, 6]  # every 2, and 5 for its checkpoint
