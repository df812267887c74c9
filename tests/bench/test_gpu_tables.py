"""The README's tables of a GPU's operators, made of rows that the benchmarks measure on the CPU."""

import json

import pytest
import torch

from bench import augment_gpu, distill_gpu, linear_distill_gpu, search_gpu
from bench import search as search_bench
from bench.report import gpu, results
from mokd_fast.ops import cpu

needs_native = pytest.mark.skipif(cpu.native is None, reason="the native module was not built")
MACHINE = {
    "gpu": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0",
    "python": "3.12.3", "commit": "abc", "date": "2026-11-27",
}  # fmt: skip
ENDS = (
    "Measured on an NVIDIA H200, driver 580.1, CUDA 13.0, torch 2.11.0, Triton 3.6.0, "
    "Python 3.12.3, commit abc, 2026-11-27."
)


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Writes rows where those of a GPU lie."""
    monkeypatch.setenv("MOKD_FAST_BACKEND", "")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "cpu-2core")
    (tmp_path / results.GPU).mkdir()

    def write(name, rows, **more):
        path = tmp_path / results.GPU / f"{name}.json"
        path.write_text(json.dumps({"machine": MACHINE, "rows": rows, **more}))

    return write


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def table(text):
    """Its first table, and what comes after it."""
    lines, _, rest = text.partition("\n\n")
    head, _, *rows = map(cells, lines.splitlines())
    assert all(len(row) == len(head) for row in rows)
    return rows, rest


def test_each_backend_of_the_loss_is_held_against_the_fastest_other_form(publish):
    rows = distill_gpu.compare(["reference"], torch.bfloat16, 1, 97, "cpu", 1, compiled=False)
    official, einsum = rows
    fast = {"baseline": "sum, compiled", "ratio": einsum["ratio"] / 2, "eager_ratio": 1e6}
    rows.append(einsum | fast | {"baseline_peak_bytes": 0})
    publish("distill", rows, failed=["torch.float16 B=64, compiled=True: why\nmore"])
    (line,), rest = table(gpu.distill_table())
    assert line == [
        "bf16, B = 1", "reference", f"{official['median_s'] * 1e6:.0f} us",
        f"{official['floor_fraction']:.0%}", f"{official['ratio']:.1f}x",
        f"{einsum['ratio'] / 2:.1f}x (sum, compiled)", f"{official['eager_s'] * 1e6:.0f} us",
        f"{official['eager_ratio']:.1f}x", f"{einsum['eager_ratio']:.1f}x (einsum)",
        f"{official['peak_bytes'] / 2**20:.0f} / 0 / "
        f"{official['baseline_peak_bytes'] / 2**20:.0f} MiB",
    ]  # fmt: skip
    assert rest == f"Could not run: torch.float16 B=64, compiled=True.\n\n{ENDS}"


def test_the_prototype_layer_is_held_against_both(publish):
    rows = linear_distill_gpu.compare("reference", "autocast", 1, 97, "cpu", 1)
    publish("linear_distill", rows)
    (line,), rest = table(gpu.linear_table())
    assert line[:2] == ["autocast, 1", "reference"] and rest == ENDS
    assert line[3] == f"{rows[0]['ratio']:.2f}x, {rows[1]['ratio']:.2f}x"
    assert line[5] == f"{rows[0]['eager_ratio']:.2f}x, {rows[1]['eager_ratio']:.2f}x"


@needs_native
def test_a_search_is_one_line_and_each_operator_one_at_the_most_images(publish, monkeypatch):
    monkeypatch.setitem(search_bench.MAPS, "small", (3, 64, True))
    rows = search_gpu.whole("small", 2, ["reference", "cpu"], "cpu", 1)
    joint = rows[0]
    for images in (1, 2):
        names = ["cpu", "reference"]
        rows += search_gpu.operators(images, 9, 3, torch.float32, names, "cpu", 1)
    publish("search", rows)
    (line,), rest = table(gpu.search_table())
    assert line[0] == "small 9, 2" and line[2] == f"{joint['ceiling_fraction']:.0%}"
    assert line[3].startswith(f"{joint['ratio']:.2f}x, ")
    assert [text.split()[0] for text in line[5].split(", ")] == ["reference", "cpu"]
    operators, rest = table(rest)
    assert [row[:3] for row in operators] == [
        [f"`{name}`", "fp32", "2, 9, 3"] for name in ("feature_search", "joint_attention")
    ]
    last = rows[-2]  # joint_attention, cpu
    expected = f"{last['median_s'] * 1e6:.0f} us, {last['ratio']:.2f}x, "
    assert operators[1][3] == expected + f"{last['ceiling_fraction']:.0%}" and rest == ENDS


@needs_native
def test_crops_are_a_share_of_the_copy_rate(publish):
    row = augment_gpu.measure("local", 1, torch.bfloat16, "cpu", 1)
    publish("augment", [row])
    (line,), rest = table(gpu.augment_table())
    shares = (row["floor_fraction"], row["moved_fraction"])
    assert line[:2] == ["8 local, 96", "bf16"] and rest == ENDS
    assert line[3:] == [f"{share:.0%}" for share in shares]


def test_checks_that_failed_or_were_not_over_are_named(publish):
    def row(check, backend, dtype, passed):
        return {"check": check, "backend": backend, "dtype": dtype, "passed": passed}

    rows = [
        row("search", "triton", "float16", None), row("values", "triton", "float32", True),
        row("augmented", "triton", "float16", False), row("values", "cuda", "float32", True),
        row("repeats", "cuda", None, True), row("scaled", "triton", None, False),
    ]  # fmt: skip
    publish("check", rows)
    assert gpu.checks_sentence() == (
        "Checks that passed: cuda 2 of 2; triton 1 of 4 (failed: augmented float16, scaled) (not "
        f"over in time: search float16). {ENDS}"
    )
