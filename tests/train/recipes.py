"""Small recipes for tests, and a console that says nothing."""

import io
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mokd_fast.train.loop import Trainer, pretrain
from mokd_fast.train.recipe import Recipe, load_recipe

HEAD = {"hidden": 32, "bottleneck": 16, "layers": 3, "batch_norm": True}
SGD = {
    "name": "sgd", "lr": 0.05, "final_lr": 0.001, "weight_decay": 1e-4, "final_weight_decay": 1e-4
}  # fmt: skip
ADAMW = {
    "name": "adamw", "lr": 1e-3, "final_lr": 1e-5, "weight_decay": 0.04, "final_weight_decay": 0.4
}  # fmt: skip
T_HEAD = {k: v for k, v in ADAMW.items() if k != "name"}


def model(name: str, optimizer: dict[str, Any] = ADAMW, **more: Any) -> dict[str, Any]:
    warmup = {"self": "2ep", "cross": "2ep", "search": "2ep"}
    return {
        "name": name, "mlp_head": HEAD, "optimizer": optimizer, "temperature_warmup": warmup, **more
    }  # fmt: skip


CNN = model("mokd_cnn_tiny", SGD)
VIT = model("mokd_vit_tiny", mlp_head={**HEAD, "batch_norm": False, "train_norm": True})


def small(root: Any, *overrides: str, models: Any = (CNN, VIT), **more: Any) -> Recipe:
    """A pair on 28 px grey pictures, K = 64, batch 4."""
    tree = {
        "name": "small",
        "data": {"root": str(root), "channels": 1, "mean": [0.5], "std": [0.25], "workers": 0},
        "augment": {"global_size": 28, "local_size": 14, "locals": 2},
        "models": list(models),
        "prototypes": 64,
        "t_head": {"dim": 48, "depth": 2, "heads": 4},
        "train": {
            "duration": "4ep", "batch": 4, "warmup": "1ep", "precision": "fp32",
            "lr_batch": None, "channels_last": False, "log_every": 2,
        },
        **more,
    }  # fmt: skip
    return load_recipe(tree, list(overrides))


def pictures(folder: Path, count: int, size: tuple[int, int] = (28, 28)) -> Path:
    """`count` grey PNG files of smooth noise in two class folders."""
    rng = np.random.Generator(np.random.Philox(7))
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (7, 7), dtype=np.uint8))
        place = folder / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        noise.resize(size[::-1], Image.Resampling.BICUBIC).save(place / f"{i:03d}.png")
    return folder


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def broken_off(recipe: Recipe, run: Path, before: int, console: Console | None = None) -> None:
    """A run that Ctrl-C ends before step number `before`, from 0."""
    step = Trainer.step

    def stopped(self: Trainer, k: int, batches: Any) -> Any:
        if k == before:
            raise KeyboardInterrupt
        return step(self, k, batches)

    with mock.patch.object(Trainer, "step", stopped), pytest.raises(KeyboardInterrupt):
        pretrain(recipe, run=run, console=console or silent())
