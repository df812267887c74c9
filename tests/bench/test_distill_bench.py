"""bench/distill.py on a tiny case."""

import pytest
import torch

from bench import distill


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(distill, "K", 64)
    monkeypatch.setattr(torch, "compile", lambda form, **options: form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_compare_every_form(dtype, capsys):
    rows = distill.compare(dtype, 2, 1)
    names = {row["baseline"] for row in rows}
    assert {"official", "official, compiled"} <= names
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_s"] / row["drop_in_s"])
        assert row["shape"] == {"V": 10, "T": 2, "B": 2, "K": distill.K}
        assert row["loop_ratio"] > 0
        row["compute_bound_s"] = 1.0
    # Between the passes: the logits of 10 student and 2 teacher views, next to nothing else.
    logits, extra = 12 * 2 * 64 * dtype.itemsize, 4096
    assert logits <= rows[0]["alive_bytes"] <= logits + extra
    distill.report(rows)
    assert "x official" in capsys.readouterr().out


def test_all_forms_have_one_value():
    student, teacher = (distill.logits(n, 2, 64, torch.float32) for n in (10, 2))
    values = [form(student, teacher) for form in distill.forms().values()]
    values += [f(student, teacher) for f in (distill.operator(10, 64), distill.official_loop(64))]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-5, atol=0)


def test_tables():
    (row,) = distill.scaling(torch.float32, [(4, 2, 6500)], 1)
    assert row["shape"]["V"] == 4 and row["ns_per_logit"] > 0
    ratios = distill.combined(torch.float32, 2, 1)["ratio_to_dino"]
    assert ratios["dino"] == 1
    assert ratios["a step"] == (ratios["self+cross"] + ratios["self+search"]) / 2
    assert distill.library_cost() > 0


def test_odd_columns_are_compared_a_logit(monkeypatch):
    monkeypatch.setattr(distill, "K", 4096)
    monkeypatch.setattr(distill, "ODD", (2049,))
    found = distill.odd_columns(torch.float32, 2, 1)
    seconds = found["seconds"]
    expected = seconds["2049"] / 2049 / (seconds["4096"] / 4096)
    assert found["ratio_to_65536"]["2049"] == pytest.approx(expected)
