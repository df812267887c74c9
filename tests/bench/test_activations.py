"""The benchmark of activation checkpointing on a tiny pair."""

from bench import activations


def test_a_row_compares_both_ways(tmp_path, monkeypatch):
    tiny = ("fashion-mnist", ["prototypes=64"], 1)
    monkeypatch.setitem(activations.CASES, "tiny", tiny)
    row = activations.measure("tiny", "fp32", 16, tmp_path, rounds=1)
    assert (row["op"], row["dtype"]) == ("activation checkpointing", "fp32")
    assert row["median_s"] > 0 and row["ratio"] == row["baseline_s"] / row["median_s"]
    assert 2**20 < row["peak_bytes"] < row["baseline_peak_bytes"]
    assert row["shape"] == "tiny, batch 16, K=64"
