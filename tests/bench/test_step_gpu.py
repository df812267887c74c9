"""The step's GPU benchmark on a tiny case and the CPU, and the tables made of what it writes."""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch

from bench import device_parts, step, step_gpu
from bench.readme import ROOT
from bench.report import gpu_step, results

MEANS = ["crops of a ViT packed", "our operators, not the reference", "logits stored"]
FAILING = ["NVIDIA apex's optimizers"]  # needs a GPU


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The file of a run, and its exit status."""
    path = tmp_path_factory.mktemp("step") / "h200" / "step.json"
    compile_ = torch.compile  # Inductor takes a minute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_gpu, "CASE", "tiny")
        patch.setitem(step.CASES, "tiny", ("fashion-mnist", [], 1))
        patch.setattr(step_gpu, "FEW", 1)
        patch.setattr(torch, "compile", lambda f, **k: compile_(f, backend="eager", **k))
        patch.setenv("MOKD_FAST_BACKEND", "")
        argv = ["step_gpu.py", "--batch", "4", "--precisions", "bf16", "--rounds", "1"]
        argv += ["--set", "train.pack_crops=true"]
        argv += ["--size", "64", "--means", ";".join(MEANS + FAILING), "--json", str(path)]
        patch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as ended:
            step_gpu.main()
    return path, ended.value.code


def test_row_compares_the_three_steps(measured):
    path, code = measured
    (row,) = json.loads(path.read_text())["rows"]
    assert row["dtype"] == "bf16" and "batch 4" in row["shape"]
    for name in ("baseline", "best_plain"):
        assert row[f"{name}_ratio"] == pytest.approx(row[f"{name}_s"] / row["median_s"])
    assert {"ours", "eager", "official", "best", "product"} == row["turns"].keys()
    assert row["set"] == ["train.pack_crops=true"] and row["ratio"] == row["baseline_ratio"]
    for whose in ("ours", "official", "best"):
        assert row[f"{whose}_peak_bytes"] > 2**20 and row[f"{whose}_held_bytes"] > 2**20
    networks = {"student mokd_cnn_tiny", "teacher mokd_vit_tiny", "backward of mokd_vit_tiny"}
    assert networks | {"searches", "losses, prototype layers"} <= row["parts"].keys()
    assert sum(part["flops"] for part in row["parts"].values()) == row["flops"] > 1e8
    assert all(row["parts"][name]["matrix_share"] > 0 for name in networks)
    for parts in (row["best_parts"], row["official_parts"]):
        assert {"students", "teachers", "backward of networks", "losses"} <= parts.keys()
    assert list(row["means"]) == MEANS and list(row["failed"]) == FAILING and code == 0
    for found in row["means"].values():
        assert found["ratio"] == pytest.approx(found["without_s"] / found["with_s"])
    assert "apex" in row["failed"][FAILING[0]]


def test_the_reference_is_chosen_for_the_steps_without_our_operators_alone(monkeypatch):
    """The trainers' own are recorded, or not: neither may see the other's choice."""
    seen = {"ours": set(), "other": set()}

    class Steps:
        trainer = SimpleNamespace(mokd=None)

        def make_trainer(self, **train):
            return SimpleNamespace(graph=None)

        def ours(self, trainer=None):
            key = "other" if trainer else "ours"
            return lambda: seen[key].add(os.environ["MOKD_FAST_BACKEND"])

    monkeypatch.setenv("MOKD_FAST_BACKEND", "")
    step_gpu.means(Steps(), None)["our operators, not the reference"]()
    assert seen == {"ours": {""}, "other": {"reference"}}
    assert os.environ["MOKD_FAST_BACKEND"] == ""


@pytest.mark.parametrize("graph", [None, object()])
def test_the_parts_are_those_of_the_measured_step(graph):
    """Its own trainer, or one that differs in the recording alone."""
    asked, other = [], object()
    steps = SimpleNamespace(
        trainer=SimpleNamespace(graph=graph), make_trainer=lambda **t: asked.append(t) or other
    )
    assert step_gpu.unrecorded(steps) is (other if graph else steps.trainer)
    assert asked == ([{"cuda_graph": False}] if graph else [])


def test_parts_lie_between_borders():
    """A part within a part is taken from it, and a label may be another each time."""
    now = iter([0, 1, 3, 6, 10, 15, 21, 28])

    class Thing:
        def outer(self):
            self.inner()

        def inner(self):
            pass

    thing, names = Thing(), iter(["a", "b"])
    parts = [(thing, "outer", "outer"), (thing, "inner", lambda: next(names))]

    def run():
        thing.outer()
        thing.inner()

    found = device_parts.apart(
        device_parts.borders(run, parts, lambda: next(now)), lambda a, b: b - a
    )
    assert found == {"other": 1 + 5 + 7, "outer": 2 + 4, "a": 3, "b": 6}
    assert thing.outer.__func__ is Thing.outer


def test_kernels_belong_to_the_part_that_launched_them():
    """By whichever thread, however late they run, and what no call of the trace has launched by
    what runs before it in its stream; the marks are those of a real trace."""

    class Thing:
        def part(self):
            with torch.profiler.record_function("within"):
                pass

    thing, numbers = Thing(), iter(range(9))

    def mark():
        with torch.profiler.record_function(name := f"border {next(numbers)}"):
            return name

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        found = device_parts.borders(lambda: thing.part(), [(thing, "part", "part")], mark)
    trace = device_parts._trace(profiler)
    (within,) = (event["ts"] for event in trace if event.get("name") == "within")
    last = max(event["ts"] for event in trace if event.get("cat") == "user_annotation")
    assert [name for name, _ in found] == ["other", "part", "other", ""]
    for correlation, cat, ts in ((7, "cuda_driver", within), (8, "cuda_runtime", 0.0)):
        trace.append({"cat": cat, "ts": ts, "dur": 1, "args": {"correlation": correlation}})
        args = {"correlation": correlation, "device": 0, "stream": correlation}
        trace.append({"cat": "kernel", "ts": last + 9, "dur": 3e6 + correlation, "args": args})
    for mark in (event for event in list(trace) if event.get("cat") == "user_annotation"):
        trace.insert(0, mark | {"cat": "gpu_user_annotation", "ts": last + 20})
        trace.append(mark | {"cat": "gpu_user_annotation", "ts": last + 20})
    seconds = device_parts.kernels_between(found, trace)
    assert seconds == {"other": pytest.approx(3.000008), "part": pytest.approx(3.000007)}
    for stream, ts in ((7, last + 12), (7, last + 30), (8, last + 13), (9, last + 14)):
        args = {"correlation": 100 + stream, "device": 0, "stream": stream}
        trace.insert(0, {"cat": "gpu_memset", "ts": ts, "dur": 1e6, "args": args})
    seconds = device_parts.kernels_between(found, trace)
    assert seconds == {"other": pytest.approx(5.000008), "part": pytest.approx(5.000007)}


def test_kernels_are_of_a_kind_each():
    """Names of a trace on an H200, and those of our Triton kernels."""
    named = {
        "void cudnn::batchnorm_bwtr_nhwc_semiPersist<__half>(cudnn::NhwcBatchNormBwd": "batch norm",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7": "attention",
        "fmha_cutlassF_f16_aligned_64x64_rf_sm80": "attention",
        "sm90_xmma_dgrad_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc": "convolution",
        "void cudnn::ops::nchwToNhwcKernel<__half, __half, float>(cudnn::ops::": "convolution",
        "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x32": "products",
        "nvjet_sm90_hsh_192x192_64x4_2x1_v_bz_coopB_bias_TNN": "products",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16>": "products",
        "triton_per_fused__to_copy_add_native_layer_norm_view_5": "compiled",
        "triton_poi_fused_convolution_native_batch_norm_0": "compiled",
        "void mokd::cuda::(anonymous namespace)::backward_tiles<__half>(mokd::": "ours",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<": "optimizers",
        "void at::native::vectorized_elementwise_kernel<8, at::native::float16_copy_k": "copies",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::": "copies",
        "void at::native::vectorized_elementwise_kernel<8, at::native::FillFunctor": "copies",
        "Memset (Unknown)": "copies",
        "Memcpy DtoD (Device -> Device)": "copies",
        "void at::native::(anonymous namespace)::max_pool_backward_nhwc<c10::Half>": "other",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>": "other",
    }
    for path in (ROOT / "kernels").glob("*.py"):
        found = re.findall(r"@triton\.jit.*\ndef (\w+)\(", path.read_text())
        named |= {name: "ours" for name in found if name.startswith("_")}
    assert {"_attend", "_forward", "_blur_across"} <= named.keys()
    for name, kind in named.items():
        assert device_parts.kind_of(name).startswith(kind), name


def test_tables_show_what_was_measured(measured, monkeypatch):
    path, _ = measured
    monkeypatch.setattr(results, "RESULTS", path.parent.parent / "other")
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    table = gpu_step.step_table()
    assert "| bf16 | pack_crops | " in table
    assert f"{row['baseline_s'] * 1e3:.1f} ms, {row['baseline_ratio']:.2f}x" in table
    assert f"commit {result['machine']['commit']}" in table and "kernel runs" not in table
    part = row["parts"]["searches"]
    ms = f"{part['s'] * 1e3:.1f} ms, its kernels {part['kernels_s'] * 1e3:.1f} ms"
    expected = f"| searches | {ms}, {part['matrix_share']:.0%} |"
    assert expected in gpu_step.parts_table()
    means = gpu_step.means_table()
    assert all(f"| {name} | " in means for name in MEANS)
    assert f"{row['means'][MEANS[0]]['ratio']:.2f}x |" in means
    assert f"| {FAILING[0]} | failed |" in means and f"Failed: {FAILING[0]}, bf16: Module" in means

    recorded = row | {"set": [], "flops": 0, "median_s": 1.0, "matrix_TFLOP_per_s": 1e-12}
    recorded["parts"] = {"other": {"s": 1.0, "flops": 0.0, "matrix_share": 0.0}}
    result["rows"].append(recorded)
    path.write_text(json.dumps(result))
    line = gpu_step.step_table().splitlines()[3]  # its operations are those counted beside it
    assert "| no switch | 1000.0 ms | " in line and f"| {row['flops']:.0%} of " in line
    assert gpu_step.parts_table().splitlines()[0] == "| ours | bf16, pack_crops |"
    del result["rows"][1]

    row["device_time"] = {"ours": {"gaps": 0.25, "busy_s": 0.5, "kernels": 7.2, "most": []}}
    row["median_s"] = 0.75
    graph = {"gaps": 0.1, "busy_s": 0.5, "kernels": 7, "most": []}
    row["means"]["a graph"] = {"with_s": 0.6, "without_s": 0.75, "ratio": 1.25}
    row["means"]["a graph"]["device_time"] = graph
    row["failed"] = {"apex": "no time left"}
    path.write_text(json.dumps(result))
    assert (
        "bf16, pack_crops: ours 500.0 of 750.0 ms (7 kernels, gaps 25%); "
        "a graph 500.0 of 600.0 ms (7 kernels, gaps 10%)."
    ) in gpu_step.step_table()
    assert "| apex | no time left |" in gpu_step.means_table()
    assert "Failed" not in gpu_step.means_table()
    del row["means"], row["failed"]
    path.write_text(json.dumps(result))
    assert gpu_step.means_table() == "Not measured yet."
