"""bench/search.py: its forms are the same search, and its rows hold what the README reads."""

import torch

from bench import search


def test_a_row_of_each_kind(monkeypatch):
    monkeypatch.setattr(search, "MAPS", {"small": (3, 32, True)})
    row = search.whole("small", 2, torch.bfloat16, rounds=1)
    assert row["error_fp32"] < 1e-4 and row["ratio"] > 0 and row["ratio_to_fp32"] > 0
    assert row["cross_share"] > 0 and row["products"] > 0
    forms = {"joint", "cross", "look", "official", "sdpa", "official_fp32"}
    assert set(row["peak_bytes"]) == forms
    rows = search.operators(1, 9, 2, torch.float32, rounds=1)
    assert [r["op"] for r in rows] == ["feature_search", "joint_attention"]
    for r in rows:
        assert all(seconds > 0 for seconds in r["seconds"].values())
        assert {"cpu", "reference", "cpu backward", "reference backward"} <= set(r["seconds"])
