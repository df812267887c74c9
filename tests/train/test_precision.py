"""train.precision=auto."""

import pytest
import torch

from mokd_fast.train.loop import Trainer
from mokd_fast.train.precision import choose_precision
from tests.train.recipes import pictures, silent, small

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("has", "found", "reason"),
    [
        ({"avx512_bf16": True}, "bf16", "avx512_bf16"),
        ({"amx_bf16": True, "avx512_bf16": True}, "bf16", "amx_bf16"),
        ({"avx512_bf16": False}, "fp32", "no amx_bf16"),
        ({}, "fp32", "no amx_bf16"),
    ],
)
def test_the_processor_decides(monkeypatch, tmp_path, has, found, reason):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    precision, why = choose_precision("auto", CPU)
    assert precision == found and reason in why
    console = silent()
    data = pictures(tmp_path / "data", 14)
    trainer = Trainer(small(data, "train.precision=auto"), tmp_path / "run", console)
    assert f"train.precision=auto: {found} ({why})" in " ".join(console.file.getvalue().split())
    assert trainer._autocast()._enabled == (found == "bf16")
    for wish in ("fp32", "bf16", "fp16"):
        assert choose_precision(wish, CPU) == (wish, "")


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_decides(monkeypatch, has):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: has)
    assert choose_precision("auto", torch.device("cuda"))[0] == ("bf16" if has else "fp32")
