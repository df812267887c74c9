"""Which tiles the GPU kernels take: the table, and the choice by timing, with the tests' timers."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from mokd_fast.kernels import configs
from mokd_fast.kernels.configs import TABLE, Case, Config, candidates, choose, from_table, lookup

SHAPE = (10, 64, 65536)  # V, B, K


def case(capability=90, processors=132, shape=SHAPE, rows=2, bytes=2):
    return Case(capability, processors, *shape, rows, bytes)


@pytest.mark.parametrize("line", TABLE, ids=lambda line: f"line{TABLE.index(line)}")
def test_every_line_is_reached_at_its_limits(line):
    at = case(line.capability, 132, (10, 64, line.columns), line.rows, line.bytes)
    assert lookup(line.backend, at) is line


def test_every_case_has_a_line_and_unknown_gpus_that_of_the_nearest_below():
    for backend, sizes in (("triton", (2, 4)), ("cuda", (2, 4, 8))):
        for k, rows, bytes in itertools.product((1, 1000, 65537, 1 << 20), range(1, 25), sizes):
            shape = (10, 64, k)
            for gpu, like in ((75, 80), (86, 80), (89, 80), (90, 90), (103, 100), (120, 100)):
                line = lookup(backend, case(gpu, 132, shape, rows, bytes))
                assert line is lookup(backend, case(like, 132, shape, rows, bytes))
                assert line.columns >= k and line.rows >= rows and line.bytes >= bytes
    with pytest.raises(ValueError, match="no triton kernel takes"):
        lookup("triton", case(rows=32))


def test_few_images_or_columns_get_small_tiles():
    def tiles(backend):
        shapes = [(10, b, 65536) for b in (1, 8, 16, 32, 64)]
        return [from_table(backend, case(shape=shape))[:2] for shape in shapes]

    assert tiles("cuda") == [(n, 0) for n in (256, 256, 512, 1024, 1024)]
    assert tiles("triton") == [(512, 1), (512, 1), (1024, 2), (2048, 4), (2048, 4)]
    assert from_table("triton", case(shape=(10, 4096, 1000))).columns == 1024


@pytest.fixture
def tuned(monkeypatch):
    """choose() for a student on a pretended GPU; what was timed, and how long each tile takes."""
    monkeypatch.setenv("MOKD_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(configs, "_found", {})
    monkeypatch.setattr(configs, "gpu", lambda index: (90, 132))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr(configs, "seconds", lambda call: call())
    student = SimpleNamespace(
        shape=SHAPE, is_cuda=True, get_device=lambda: 0, element_size=lambda: 2, numel=lambda: 1
    )
    found = SimpleNamespace(capturing=False, timed=[], times={}, student=student)

    def run(config):
        found.timed.append(config)
        time = found.times.get(config, 2.0)
        if isinstance(time, Exception):
            raise time
        return time

    found.choose = lambda run=run: choose("cuda", student, 2, run)
    return found


def test_the_fastest_is_kept_and_timed_once(tuned):
    tuned.times[Config(512)] = 1.0
    assert tuned.choose(None) == Config(1024)  # a backward pass first: there is nothing to time
    assert tuned.choose() == Config(512)
    assert tuned.timed == [Config(1024), Config(512), Config(256)]
    assert tuned.choose() == tuned.choose(None) == Config(512) and len(tuned.timed) == 3


def test_a_tie_stays_with_the_table_and_what_cannot_run_is_no_choice(tuned):
    tuned.times[Config(512)] = RuntimeError("too much shared memory")
    assert tuned.choose() == Config(1024) and len(tuned.timed) == 3


def test_an_error_of_the_tables_own_choice_is_the_users_to_see(tuned):
    tuned.times[Config(1024)] = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        tuned.choose()
    assert not configs._found


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_timed_unless_asked_for(tuned, value, monkeypatch):
    monkeypatch.delenv("MOKD_FAST_AUTOTUNE")
    if value is not None:
        monkeypatch.setenv("MOKD_FAST_AUTOTUNE", value)
    assert tuned.choose() == Config(1024) and not tuned.timed


def test_nothing_is_timed_in_a_capture_a_trace_or_without_a_gpu(tuned, monkeypatch):
    tuned.capturing = True
    assert tuned.choose() == Config(1024)
    tuned.capturing = False
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert tuned.choose() == Config(1024)
    tuned.student.is_cuda = False
    assert tuned.choose() == Config(1024) and not tuned.timed
    tuned.student.is_cuda = True
    tuned.times[Config(512)] = 1.0
    assert tuned.choose() == Config(512)
    tuned.capturing = True  # what is known is used
    assert tuned.choose() == Config(512)


def test_the_file_serves_the_next_process(tuned, monkeypatch, tmp_path):
    file = tmp_path / "new" / "tiles.json"
    monkeypatch.setenv("MOKD_FAST_AUTOTUNE", str(file))
    tuned.times[Config(256)] = 1.0
    assert tuned.choose() == Config(256) and list(file.parent.iterdir()) == [file]
    configs._found.clear()
    tuned.timed.clear()
    assert tuned.choose(None) == Config(256) and not tuned.timed
    (name,) = json.loads(file.read_text())
    assert (
        name == "cuda capability=90 processors=132 views=10 images=64 columns=65536 rows=2 bytes=2"
    )
    configs._found.clear()
    file.write_text(json.dumps({name: [2048, 0, 0], "another": [256, 0, 0]}))  # of other kernels
    assert tuned.choose() == Config(256) and tuned.timed
    assert json.loads(file.read_text()) == {name: [256, 0, 0], "another": [256, 0, 0]}


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', '{"a": ["x"]}', '{"a": {"b": 1}}'])
def test_a_file_of_something_else_is_refused_and_kept(tuned, text, monkeypatch, tmp_path):
    file = tmp_path / "tiles.json"
    file.write_text(text)
    monkeypatch.setenv("MOKD_FAST_AUTOTUNE", str(file))
    with pytest.raises(ValueError, match=r"MOKD_FAST_AUTOTUNE=.*tiles.json: it must be 0, 1 or"):
        tuned.choose()
    assert file.read_text() == text and not tuned.timed


def test_candidates_are_few_and_start_with_the_table():
    for rows, bytes in itertools.product((2, 4, 12, 24), (2, 4)):
        found = candidates("triton", case(rows=rows, bytes=bytes))
        assert found[0] == from_table("triton", case(rows=rows, bytes=bytes))
        assert len(set(found)) == len(found) <= 8
        assert all(c.columns >= 32 * c.warps and c.warps >= 1 and c.stages >= 2 for c in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_times_its_kernels():
    x = torch.ones(1 << 24, device="cuda")
    assert 0 < configs.seconds(lambda: x[:16].mul(2)) < configs.seconds(lambda: [x * 2] * 50) < 1
