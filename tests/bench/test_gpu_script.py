"""The GPU suite as far as no GPU is needed: its checks, its figures, and the script around them."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mokd_fast.kernels import configs

from bench import distill_gpu, distill_sweep, gpu_check, linear_distill_gpu, search_gpu
from bench import search as search_bench
from mokd_fast.ops import cpu, distill, search

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["machine", "build", "check", "tests", "memcheck", "racecheck", "initcheck", "compiled"]
PARTS += ["caches", "distill", "step", "norms", "linear", "search", "augment", "data", "sweep"]
needs_native = pytest.mark.skipif(cpu.native is None, reason="the native module was not built")


@needs_native
@pytest.mark.parametrize("check", gpu_check.CHECKS, ids=lambda check: check.__name__)
def test_checks_pass_on_the_cpu(check, monkeypatch):
    monkeypatch.setenv("MOKD_FAST_BACKEND", "cpu")
    torch.manual_seed(0)
    check(gpu_check.Where("cpu", "cpu", small=True))


class Wrong:
    """The CPU kernels with one thing gone wrong."""

    def __init__(self, what):
        self.what, self.calls = what, 0

    def distill_forward(self, student, *rest):
        self.calls += 1
        loss, terms, stats = cpu.distill_forward(student, *rest)
        if self.what == "loss" or (self.what == "second" and self.calls % 2 == 0):
            loss *= 1 + 1e-5
        return loss, terms, stats

    ForwardChunks = staticmethod(cpu.ForwardChunks)
    why_not = staticmethod(cpu.why_not)

    def search_forward(self, *call):
        rows, stats, weights = cpu.search_forward(*call)
        return (rows * (1 + 1e-4 * (self.what == "found")), stats, weights)

    def search_backward(self, *call):
        dx, dk, dv = cpu.search_backward(*call)
        if self.what == "key gradient":
            dk[..., -1] = 0
        return dx, dk, dv

    def joint_forward(self, *call):
        tokens, query, rows, stats = cpu.joint_forward(*call)
        if self.what == "last token":
            tokens[:, :, -1] = rows[:, len(call[0][0, 0]) - 1]  # as it is without a query
        elif self.what == "nan":
            query.nan_to_num_()
        return tokens, query, rows, stats

    joint_backward = staticmethod(cpu.joint_backward)

    def weight_norm(self, *call):
        w, norms = cpu.weight_norm(*call)
        w[-1] = w[-1] * (1 + 2**-6 * (self.what == "last row"))
        return w, norms

    def weight_norm_backward(self, *call):
        for_v, for_g = cpu.weight_norm_backward(*call)
        if self.what == "strides" and not call[1].is_contiguous():
            for_v = for_v.flip(0)
        return for_v * (1 + 1e-5 * (self.what == "found")), for_g

    def batch_norm(self, x, weight, *rest):
        y, stats = cpu.batch_norm(x, weight, *rest)
        if self.what == "last row":
            y.permute(0, 2, 3, 1)[-1, -1, -1] *= 1 + 1e-4
        elif self.what == "statistics" and rest[-1]:
            rest[-1][1].mul_(1 + 1e-4)
        return y, stats

    def batch_norm_backward(self, *call):
        for_x, *rest = cpu.batch_norm_backward(*call)
        return for_x * (1 + 1e-4 * (self.what == "found")), *rest

    def distill_backward(self, grad, stats, student, *rest, out=None):
        out = cpu.distill_backward(grad, stats, student, *rest, out=out)
        if self.what == "last column":
            out[..., -1] = 0
        elif self.what == "scale":
            out /= grad
        elif self.what == "strides" and not student.is_contiguous():
            out = out.flip(0)
        elif self.what == "nan":
            out = out.nan_to_num_()
        return out


@needs_native
@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("loss", "values"),
        ("last column", "values"),
        ("loss", "targets"),
        ("strides", "strides"),
        ("nan", "extremes"),
        ("second", "repeats"),
        ("scale", "scaled"),
        ("last column", "drop_in"),
        ("last column", "linear"),
        ("nan", "linear_bad"),
        ("found", "search"),
        ("key gradient", "search"),
        ("nan", "search_bad"),
        ("last token", "search_head"),
        ("last row", "weight_norm"),
        ("found", "weight_norm"),
        ("strides", "weight_norm"),
        ("last row", "normalised"),
        ("statistics", "normalised"),
        ("found", "normalised"),
    ],
)
def test_checks_notice_wrong_kernels(what, name, monkeypatch, capsys):
    wrong = Wrong(what)
    named = (sys.modules[f"mokd_fast.ops.{name}"] for name in ("weight_norm", "batch_norm"))
    for module in (distill, search, *named):
        monkeypatch.setattr(module, "_kernels", lambda backend: wrong)
    monkeypatch.setenv("MOKD_FAST_BACKEND", "cpu")
    check = {check.__name__: check for check in gpu_check.CHECKS}[name]
    assert not gpu_check.passes(check, gpu_check.Where("cpu", "cpu", small=True))
    assert f"FAIL cpu {name}" in capsys.readouterr().out


@needs_native
def test_checks_run_side_by_side_and_the_long_ones_a_dtype_at_a_time(tmp_path):
    command = "bench/gpu_check.py --device cpu --backends cpu --small --jobs 2"
    more = ["--only", "strides,search,scaled", "--json", str(tmp_path / "check.json")]
    ended = run([sys.executable, *command.split(), *more])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "\n6 of 6 checks passed" in ended.stdout
    lines = [line.split() for line in ended.stdout.splitlines()]
    searched = {line[3] for line in lines if line[:3] == ["ok", "cpu", "search"]}
    assert searched == {"float32", "bfloat16", "float16", "float64"}
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert len(rows) == 6 and all(row["passed"] for row in rows)
    assert {row["dtype"] for row in rows if row["check"] == "search"} == searched


def test_a_process_that_dies_fails_its_check_alone(tmp_path, monkeypatch, capsys):
    other = "import os\ndef heard(name, at):\n    if name == 'scaled':\n        os._exit(3)\n"
    other += "    return name != 'targets', f'{name} was heard\\n'\n"
    (tmp_path / "other_heard.py").write_text(other)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gpu_check, "heard", importlib.import_module("other_heard").heard)
    at = gpu_check.Where("cpu", "cpu", small=True)
    pairs = [(check, at) for check in (gpu_check.scaled, gpu_check.targets, gpu_check.repeats)]
    results = gpu_check.Results(pairs, tmp_path / "check.json")
    read = lambda: [r["passed"] for r in json.loads(results.path.read_text())["rows"]]  # noqa: E731
    assert read() == [None, None, None]
    gpu_check.side_by_side(pairs, 1, results.keep)
    assert read() == [False, False, True]
    said = capsys.readouterr().out
    assert "FAIL cpu scaled: " in said and said.endswith("repeats was heard\n")


def test_the_long_checks_come_first():
    at = [gpu_check.Where(backend, "cuda", small=False) for backend in ("cuda", "triton")]
    pairs = [(check, where) for where in at for check in gpu_check.CHECKS]
    found = [(check.__name__, w.backend, w.only) for check, w in gpu_check.pieces(pairs)]
    assert found[:2] == [("search", "triton", t) for t in (torch.float32, torch.float16)]
    assert ("search", "cuda", torch.float64) in found and len(set(found)) == len(found)
    assert {(name, backend) for name, backend, _ in found} == {
        (check.__name__, where.backend) for check, where in pairs
    }


@pytest.mark.slow
def test_checks_pass_in_the_triton_interpreter():
    pytest.importorskip("triton")
    command = "bench/gpu_check.py --device cpu --backends triton --small --only "
    command += "values,extremes,linear_bad,search_head,weight_norm"
    ended = run([sys.executable, *command.split()], TRITON_INTERPRET="1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "5 of 5 checks passed" in ended.stdout


def test_all_forms_are_the_same_loss():
    student, teacher, center = torch.randn(10, 2, 33), torch.randn(2, 2, 33), torch.zeros(33)
    forms = [distill_gpu.ours("reference", center), distill_gpu.official(center)]
    forms += [distill_gpu.plain(center, einsum) for einsum in (True, False)]
    leaf = student.requires_grad_()
    first, *rest = (distill_gpu.call(form, leaf, teacher)() for form in forms)
    for gradient in rest:
        torch.testing.assert_close(gradient, first)


def test_rows_compare_in_one_run():
    rows = distill_gpu.compare(["reference"], torch.bfloat16, 1, 97, "cpu", 2, compiled=False)
    assert [row["baseline"] for row in rows] == ["official", "einsum"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_s"] / row["median_s"])
        assert row["GB_per_s"] == pytest.approx((2 * 12 + 10) * 97 * 2 / row["median_s"] / 1e9)
        assert row["floor_fraction"] == pytest.approx(row["GB_per_s"] / row["copy_GB_per_s"])


def test_rows_of_the_prototype_layer_compare_in_one_run(monkeypatch):
    monkeypatch.setenv("MOKD_FAST_BACKEND", "")
    rows = linear_distill_gpu.compare("reference", "autocast", 1, 97, "cpu", 2)
    assert [row["baseline"] for row in rows] == ["official", "stored"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_s"] / row["median_s"])
        assert row["extra_share"] == row["extra_bytes"] / row["baseline_extra_bytes"]
    gradients = [torch.ones(3), torch.ones(3)]
    linear_distill_gpu.agree("equal", gradients, gradients)
    with pytest.raises(AssertionError, match="wrong"):
        linear_distill_gpu.agree("wrong", gradients, [torch.ones(3), torch.full((3,), 1.1)])


@needs_native
def test_rows_of_the_search_compare_in_one_run(monkeypatch):
    monkeypatch.setenv("MOKD_FAST_BACKEND", "")
    monkeypatch.setitem(search_bench.MAPS, "small", (3, 64, True))
    rows = search_gpu.whole("small", 2, ["reference"], "cpu", 1)
    assert [row["backend"] for row in rows] == ["joint", "cross", "joint reference"] * 2
    assert [row["baseline"] for row in rows] == ["official"] * 3 + ["sdpa"] * 3
    rows += search_gpu.operators(2, 9, 3, torch.float32, ["cpu", "reference"], "cpu", 1)
    assert [row["op"] for row in rows[6:]] == ["feature_search"] * 2 + ["joint_attention"] * 2
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_s"] / row["median_s"])
        assert row["backend"] == "cross" or row["ceiling_fraction"] > 0
    assert len(search_gpu.operators(1, 20, 20, torch.float32, ["cpu"], "cpu", 1)) == 1


def test_what_the_ceiling_of_a_search_counts(monkeypatch):
    """The work of a literal joint search, less what images share and nobody asks for."""
    monkeypatch.setattr(search_gpu, "MAPS", {"small": (3, 384, False)})
    N, asked, images = 9, search_gpu.Q * 2, 2
    literal = 3 * 12 * asked * (N + 1) * 384**2 + 3 * 2 * asked * (N + 1) ** 2 * 384
    shared = 3 * (asked * (N + 1) - images * N - asked) * 384**2  # of the first block's q, k, v
    shared += 2 * (asked * (N + 1) ** 2 - images * (N + search_gpu.Q) * N) * 384
    last = 9 * asked * 384**2 + 2 * asked * (N + 1) * 384  # the query's row in the last block
    assert search_gpu.work("small", images) == 2 * (literal - shared - last)


def test_a_backend_that_cannot_run_is_named():
    able, failed = distill_gpu.runnable(["cuda", "reference"], "cpu")
    assert able == ["reference"] and "on a CUDA device" in failed[0]


@needs_native
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_sweep_reaches_the_kernels_with_each_configuration(backend, monkeypatch):
    seen = []

    class Kernels:
        def distill_forward(self, *call, config):
            seen.append(config)
            return cpu.distill_forward(*call)

        def distill_backward(self, *call, config):
            seen.append(config)
            return cpu.distill_backward(*call)

    monkeypatch.setattr(distill_sweep, "_kernels", lambda backend: Kernels())
    rows = list(distill_sweep.sweep([backend], [torch.float32], [1], 64, "cpu", 1))
    assert not [row for row in rows if "error" in row]
    assert list(dict.fromkeys(seen)) == [None, *distill_sweep.CONFIGS[backend]]


def test_the_sweep_writes_lines_of_the_table():
    times = {"now": 1.0, configs.Config(512): 2.0, configs.Config(256): 3.0}
    rows = [
        {"backend": "cuda", "dtype": "float32", "B": b, "K": 64, "bytes": 4, "config": config,
         "forward_s": seconds * (1 if b == 8 else -1) * 1e-6, "backward_s": 0.0}
        for config, seconds in times.items() for b in (4, 8)
    ]  # fmt: skip
    rows.append(rows[1] | {"config": configs.Config(1024), "error": "out of shared memory"})
    (line,) = distill_sweep.lines(json.loads(json.dumps(rows)), "cpu")
    line["config"] = configs.Config(*line["config"])
    made = configs.Line(**line, in_flight=0)
    assert (
        made[:6] == ("cuda", 80, 64, 2, 4, configs.Config(512)) and "2 us, B = 8" in made.measured
    )


def test_the_sweep_names_the_fastest_and_what_cannot_run(monkeypatch):
    taken = {"now": 3e-6, "a": 2e-6}

    def seconds(case, kernels, config, rounds):
        if config == "b":
            raise RuntimeError("out of shared memory\nat length")
        return dict.fromkeys(("forward_s", "backward_s"), taken[config or "now"])

    monkeypatch.setattr(distill_sweep.Case, "seconds", seconds)
    monkeypatch.setattr(distill_sweep, "CONFIGS", {"cpu": ["a", "b"]})
    rows = list(distill_sweep.sweep(["cpu"], [torch.float32], [1], 64, "cpu"))
    assert rows[2]["error"] == "out of shared memory"
    first = "cpu float32 1 forward_s: 2.0 us with a, now 3.0 us"
    assert distill_sweep.best(rows)[0] == first


def run(command, **environment):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    environment.pop("OUT", None)
    options = {"capture_output": True, "text": True, "timeout": 300}  # one that hangs has failed
    return subprocess.run(command, cwd=ROOT, env=environment, **options)


def suite(out, **environment):
    ended = run(["bash", "bench/gpu.sh", str(out)], **environment)
    summary = json.loads((out / "summary.json").read_text())
    assert ended.stdout.endswith((out / "log.txt").read_text())
    return ended, summary, {part["part"]: part["status"] for part in summary["parts"]}


def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    ended, summary, parts = suite(tmp_path, PYTHON=sys.executable, PARTS="machine racecheck")
    assert ended.returncode == 1 and "no CUDA device" in ended.stdout
    assert not summary["passed"] and not summary["gpu"]
    assert parts["machine"].startswith("failed") and "not run" in parts["racecheck"]
    assert json.loads((tmp_path / "machine.json").read_text())["torch"] == torch.__version__


def pretend(folder, case):
    """A python and a compute-sanitizer that do nothing, or what `case` of bash says."""
    for name in ("python", "compute-sanitizer"):
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*"\ncase "$*" in\n{case}\nesac\n')
        path.chmod(0o755)
    return {"PYTHON": str(folder / "python"), "PATH": f"{folder}:{os.environ['PATH']}"}


def test_every_part_runs_and_a_failing_one_stops_no_other(tmp_path):
    tools = pretend(tmp_path, "*tests/ops*) exit 3 ;; *racecheck*) exit 9 ;;")
    ended, summary, parts = suite(tmp_path / "out", COMMIT="abc", **tools)
    assert summary["commit"] == "abc" and summary["gpu"] and not summary["passed"]
    assert list(parts) == PARTS
    said = [line for line in ended.stdout.splitlines() if line.startswith("python bench/")]
    assert f"python bench/gpu_check.py --jobs 8 --json {tmp_path}/out/check.json" in said
    step = f"python bench/step_gpu.py --seconds 110 --json {tmp_path}/out/step.json"
    assert step in said and "-m gpu and not slow" in ended.stdout
    wrong = {"tests": "failed with exit status 3", "racecheck": "failed with exit status 9"}
    assert parts == dict.fromkeys(PARTS, "passed") | wrong
    assert ended.returncode == 1 and ended.stdout.splitlines()[-1].endswith(": tests racecheck")


def test_all_passed_is_exit_status_0(tmp_path):
    ended, summary, _ = suite(tmp_path / "out", **pretend(tmp_path, "nothing) ;;"))
    assert ended.returncode == 0 and summary["passed"], ended.stdout
    assert ended.stdout.splitlines()[-1].startswith("all passed after")


def test_figures_lie_where_those_of_the_gpu_do(tmp_path):
    """Without OUT, in a tree that nobody installed; where the name cannot be had, it ends."""
    root = tmp_path / "tree"
    for name in ("bench", "csrc", "kernels", "mokd_fast", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    # It finds a GPU, and knows the name; -S: without the editable install of these tests.
    python, known = tmp_path / "python", f'exec {sys.executable} -S "$@"'
    python.write_text(f"#!/bin/bash\n[[ $* != *machine_name* ]] || {known}\n")
    python.chmod(0o755)
    packages = ":".join(path for path in sys.path if path.endswith("-packages"))
    given = {"PYTHON": str(python), "PARTS": "machine", "COMMIT": "abc", "PYTHONPATH": packages}
    ended = run(["bash", root / "bench/gpu.sh"], **given)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (summary,) = (root / "bench/results").glob("*/summary.json")
    assert summary.parent.name == f"cpu-{os.cpu_count()}core"  # what this one's is called
    python.write_text("#!/bin/bash\n[[ $* != *machine_name* ]]\n")
    assert run(["bash", root / "bench/gpu.sh"], **given).returncode == 2


def test_a_part_that_hangs_is_stopped_and_the_rest_has_no_time(tmp_path):
    tools = pretend(tmp_path, "*gpu_check.py*) sleep 600 ;;")
    _, _, parts = suite(tmp_path / "out", PARTS="machine check step", TOTAL="6", **tools)
    assert parts["machine"] == "passed" and parts["check"].startswith("stopped at")
    assert parts["step"] == "not run: no time left"


def test_a_failing_test_is_printed_before_the_others_are_over(tmp_path):
    tests = "def test_a():\n    assert 1 == 2, 'why'\n\ndef test_b():\n    print('b ran')\n"
    (tmp_path / "test_two.py").write_text(tests)
    command = f"-m pytest -q -s -p no:cacheprovider -p tests.at_once --rootdir {tmp_path}"
    ended = run([sys.executable, *command.split(), str(tmp_path / "test_two.py")])
    first, rest = ended.stdout.split("b ran", 1)
    assert "FAILED test_two.py::test_a" in first and "why" in first and "1 failed" in rest
