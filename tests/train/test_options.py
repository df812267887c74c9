"""Every option of the step alone, and odd pairs and batches: each trains, resumes to the bit, and
what only changes how a step is computed does not change what it computes."""

import pytest
import torch
from torch import nn

from mokd_fast.train.loop import Trainer, pretrain
from tests.train.recipes import CNN, SGD, VIT, broken_off, model, pictures, silent, small
from tests.train.test_loop import final_state, metrics

DROP = {**VIT, "drop_path": 0.3}  # draws from torch's generator: its state must come back
SMALL_RESNET = model("resnet18", SGD, kwargs={"layers": [1, 1, 1, 1]})
PLAIN = {**VIT, "mlp_head": {**VIT["mlp_head"], "batch_norm": False}}  # batch 1: no BatchNorm

# What it is -> overrides, models, and whether the losses are those without it.
OPTIONS = {
    "as it is": ((), (CNN, DROP), True),
    "channels_last": (("train.channels_last=true",), (CNN, DROP), True),
    "compiled blocks": (("train.compile=true",), (CNN, VIT), True),
    "packed crops": (("train.pack_crops=true",), (CNN, VIT), True),
    "packed crops with drop-path": (("train.pack_crops=true",), (CNN, DROP), False),
    "checkpointed activations": (("train.checkpoint_activations=true",), (CNN, DROP), True),
    "checkpointed and compiled": (
        ("train.checkpoint_activations=true", "train.compile=true"),
        (CNN, VIT),
        True,
    ),
    "online kNN": (("evaluate.every=2it",), (CNN, DROP), True),
    "LARS": (("models.0.optimizer.name=lars",), (CNN, DROP), True),
    "logits stored": (("loss.prototypes=fused",), (CNN, DROP), True),
    "logits not stored": (("loss.prototypes=fused-linear",), (CNN, DROP), True),
    "logits in plain PyTorch": (("loss.prototypes=reference",), (CNN, DROP), True),
    "bf16": (("train.precision=bf16",), (CNN, DROP), False),
    "bf16, packed and compiled": (
        ("train.precision=bf16", "train.pack_crops=true", "train.compile=true"),
        (CNN, DROP),
        False,
    ),
    "cross search": (("t_head.search=cross",), (CNN, DROP), False),
    "all queries in both maps": (("t_head.queries=all", "t_head.maps=both"), (CNN, DROP), False),
    "no search": (("t_head.search=none",), (CNN, DROP), False),
    "CNN+CNN": ((), (CNN, SMALL_RESNET), True),
    "ViT+ViT": ((), (DROP, DROP), True),
    "ViT+ViT, packed": (("train.pack_crops=true",), (VIT, VIT), True),
    "no local crops": (("augment.locals=0",), (CNN, DROP), True),
    "no local crops, packed": (("augment.locals=0", "train.pack_crops=true"), (CNN, VIT), True),
    "accumulation 3": (("train.batch=6", "train.accumulate=3"), (CNN, DROP), True),
    "batch 1": (("train.batch=1",), (PLAIN, {**PLAIN, "drop_path": 0.3}), True),
}
HOW = (
    *("train.channels_last", "train.compile", "train.pack_crops", "loss.prototypes"),
    *("train.checkpoint_activations", "evaluate."),
)


# Their resume is in tests of their own as well, or each part of them is an option here.
TWICE = {
    *("channels_last", "LARS", "online kNN", "no search", "all queries in both maps"),
    *("checkpointed activations", "logits in plain PyTorch", "checkpointed and compiled"),
    *("packed crops with drop-path", "ViT+ViT, packed"),
}


@pytest.mark.parametrize(
    "option",
    [pytest.param(name, marks=pytest.mark.slow) if name in TWICE else name for name in OPTIONS],
)
def test_alone(option, tmp_path, monkeypatch):
    overrides, models, same = OPTIONS[option]
    if "train.compile=true" in overrides:  # Inductor takes a minute: a slow test has it
        compile_ = nn.Module.compile
        monkeypatch.setattr(
            nn.Module, "compile", lambda self, **k: compile_(self, backend="aot_eager", **k)
        )
    data = pictures(tmp_path / "data", 14)

    def recipe(*more: str):
        return small(
            data, "train.duration=5it", "train.warmup=1it", "train.checkpoint_every=2it",
            "train.log_every=1", "train.freeze_last_layers=2it", "train.pack_crops=false", *more,
            models=[{**m, "temperature_warmup": dict.fromkeys(("self", "cross", "search"), "2it")}
                    for m in models],
        )  # fmt: skip

    if option == "online kNN":
        overrides += (f"evaluate.train={data}", f"evaluate.test={data}", "evaluate.k=[3]")
    whole = pretrain(recipe(*overrides), run=tmp_path / "whole", console=silent())
    broken_off(recipe(*overrides), tmp_path / "parts", 3)
    parts = pretrain(recipe(*overrides), run=tmp_path / "parts", console=silent())
    one, two = final_state(whole), final_state(parts)
    for name, value in one["model"].items():
        assert value.isfinite().all() and torch.equal(value, two["model"][name]), name
    assert torch.equal(one["rng"]["cpu"], two["rng"]["cpu"])
    if same:
        what = [text for text in overrides if not text.startswith(HOW)]
        plain = pretrain(recipe(*what, "loss.prototypes=reference"), run=tmp_path / "plain",
                         console=silent())  # fmt: skip
        for mine, theirs in zip(metrics(whole), metrics(plain), strict=True):
            assert mine["loss_1"] == pytest.approx(theirs["loss_1"], rel=2e-3)
            assert mine["loss_2"] == pytest.approx(theirs["loss_2"], rel=2e-3)


@pytest.mark.slow
def test_compiled_by_inductor(tmp_path):
    """The compiler that users get: no graph after the first logged step, the curve of the plain
    step."""
    import torch._dynamo.utils as dynamo

    data = pictures(tmp_path / "data", 14)
    graphs = []
    for overrides in (("train.compile=true",), ()):
        recipe = small(data, "train.log_every=1", *overrides)
        trainer = Trainer(recipe, tmp_path / f"run {len(overrides)}", silent())
        trainer.mokd.train()
        batches = trainer.loader.batches(0)
        losses = []
        for k in range(trainer.total):
            losses.append(float(trainer.step(k, batches).losses["loss_1"]))
            graphs.append(dynamo.counters["stats"]["unique_graphs"])
        if overrides:
            assert graphs[0] > 0 and graphs[-1] == graphs[0]
            compiled = losses
    assert compiled == pytest.approx(losses, rel=2e-3)


@pytest.mark.parametrize(
    ("overrides", "packed"),
    [
        (("train.precision=bf16",), True),
        (("train.precision=fp32",), False),
        (("train.precision=bf16", "train.pack_crops=false"), False),
        (("train.precision=bf16", "train.checkpoint_activations=true"), False),
        (("train.precision=bf16", "train.compile=true"), False),
    ],
)
def test_crops_are_packed_where_that_is_faster(overrides, packed, tmp_path):
    recipe = small(pictures(tmp_path / "data", 14), *overrides)
    trainer = Trainer(recipe, tmp_path / "run", silent())
    assert [student.packed for student in trainer.mokd.students] == [packed, packed]


def test_what_packing_and_compiling_find_nothing_for_is_said(tmp_path):
    data = pictures(tmp_path / "data", 14)
    console = silent()
    one = {"models": [CNN], "t_head": None}
    Trainer(small(data, "train.pack_crops=true", "train.compile=true", **one), tmp_path / "run",
            console)  # fmt: skip
    said = " ".join(console.file.getvalue().split())
    assert "no model is a plain timm ViT" in said and "no transformer block to compile" in said
