"""The layers that are another way here than in PyTorch, in small."""

import json

import pytest
import torch

from bench import layers
from mokd_fast.ops import cpu, onednn


@pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
def test_rows_have_both_ways(tmp_path, monkeypatch, capsys):
    products, linear = [], onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda *a: products.append(1) or linear(*a))
    monkeypatch.setattr(layers, "K", 64)
    monkeypatch.setattr(layers, "LINEAR", (1024, 64, 192))
    monkeypatch.setattr(layers, "ATTENTION", (2, 20, 2, 32))
    monkeypatch.setattr(layers, "CONVOLUTIONS", [(8, 256, 512, 5, 1, 1), (8, 64, 128, 3, 3, 2)])
    monkeypatch.setattr(layers, "NORMS", [(2, 32, 5, False), (2, 64, 3, True)])
    monkeypatch.setattr(layers, "keep_memory", lambda: None)  # which starts the program again
    path = tmp_path / "layers.json"
    monkeypatch.setattr("sys.argv", ["layers.py", "--quick", "--json", str(path)])
    layers.main()
    rows = json.loads(path.read_text())["rows"]
    assert [row["dtype"] for row in rows] == [
        *("fp32", "fp32", "bf16", "bf16"),  # a convolution and a norm each
        *("fp32", *["bf16"] * 6, *["fp32"] * 3, *["bf16"] * 4, *["fp32"] * 3),
    ]
    said = capsys.readouterr().out
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_s"] / row["median_s"])
        assert row["op"] in said
    assert products, "oneDNN's products are what is measured"


def test_a_layer_and_its_twin_start_from_the_same_numbers():
    layer = torch.nn.Linear(4, 3)
    ours, theirs = layers.both(layer, torch.randn(2, 4), "fp32")
    ours(), theirs()
    assert all(p.grad is None for p in layer.parameters())
