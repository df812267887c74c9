"""BatchNorm's GPU benchmark as far as no GPU is needed, and its table."""

from collections import Counter

import pytest
import timm
import torch
from torch import nn

from bench import batch_norm_gpu
from bench.report import gpu
from mokd_fast.ops import cpu


@pytest.mark.parametrize("side", [224, 96])
def test_layers_are_those_of_a_resnet50(side):
    network, found = timm.create_model("resnet50"), Counter()

    def seen(module, inputs):
        found[inputs[0].shape[1:3]] += 1

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(seen)
    network(torch.zeros(2, 3, side, side))
    counted = Counter()
    for (channels, height, added, relu), count in batch_norm_gpu.layers(side).items():
        counted[channels, height] += count
        assert relu or not added
    assert counted == {tuple(shape): count for shape, count in found.items()}
    blocks = [n for (*_, added, _), n in batch_norm_gpu.layers(side).items() if added]
    assert sum(blocks) == sum(map(len, (network.layer1, network.layer2, network.layer3,
                                        network.layer4)))  # fmt: skip


@pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
@pytest.mark.parametrize(("add", "maps"), [(False, 8), (True, 10)])
def test_a_row_counts_the_maps_that_are_moved(add, maps):
    row = batch_norm_gpu.measure((16, 4, add, True), 2, torch.float32, "cpu", 2)
    bytes = maps * 2 * 16 * 4**2 * 4
    rate = row["copy_GB_per_s"] * 1e9
    assert row["floor_fraction"] == pytest.approx(bytes / rate / row["median_s"])
    assert row["ratio"] == pytest.approx(row["baseline_s"] / row["median_s"])


def test_both_forms_make_the_same():
    for layer in ((6, 5, True, True), (6, 5, False, False)):
        given = batch_norm_gpu.tensors(layer, 3, torch.float32, "cpu")
        forms = (batch_norm_gpu.ours, batch_norm_gpu.plain)
        found = (batch_norm_gpu.call(form, layer, given)() for form in forms)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_sweep_tries_all_and_says_the_fastest_last(monkeypatch, capsys):
    kernels = pytest.importorskip("mokd_fast.kernels.batch_norm")
    before = {name: getattr(kernels, name) for name in batch_norm_gpu.SWEPT}

    def network(side, *rest):
        return [{"median_s": kernels.TILE * side / kernels.STAGES * 1e-6, "layers": 2}]

    monkeypatch.setattr(batch_norm_gpu, "network", network)
    batch_norm_gpu.sweep(1, "cpu", 2)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["TILE", "WIDEST", "WARPS", "PROGRAMS", "STAGES", "224", "96"]
    assert len(set(lines)) == 2 * 2 * 3 * 2 * 3
    assert lines[-1].startswith("2048 ") and " 4 229.376 ms 98.304 ms" in lines[-1]
    assert before == {name: getattr(kernels, name) for name in before}


def test_a_network_is_one_line_of_the_table(monkeypatch):
    def row(view, seconds, other, share, layers):
        return {"view": view, "dtype": "float16", "median_s": seconds, "baseline_s": other,
                "floor_fraction": share, "layers": layers}  # fmt: skip

    rows = [row(224, 1e-3, 3e-3, 0.8, 2), row(224, 2e-3, 2e-3, 0.2, 1), row(96, 1e-3, 1e-3, 0.5, 1)]
    machine = {"gpu": "a GPU", "commit": "abc"}
    monkeypatch.setattr(gpu, "load_gpu", lambda name: {"machine": machine, "rows": rows})
    monkeypatch.setattr(gpu, "measured_gpu", lambda result: "Measured.")
    table = gpu.norms_table().splitlines()
    assert table[2] == "| 224 | fp16 | 4.00 ms | 8.00 ms, 2.00x | 50% |"
    assert table[3] == "| 96 | fp16 | 1.00 ms | 1.00 ms, 1.00x | 50% |"
