"""What goes wrong from outside, injected for real: its message, its exit code, what is kept."""

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

import mokd_fast
from mokd_fast.train import alarms, loop, memory
from mokd_fast.train import log as log_module
from mokd_fast.train.checkpoint import checkpoints, last_checkpoint, load_checkpoint
from mokd_fast.train.folder import RunLock
from mokd_fast.train.log import RunLog
from mokd_fast.train.loop import Trainer, pretrain
from mokd_fast.train.memory import out_of_memory
from mokd_fast.train.optim import ScheduledOptimizer
from tests.train.process import Child
from tests.train.recipes import VIT, pictures, silent, small


def write(recipe, path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pictures(tmp_path / "data", 14)


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> Path:
    """One model alone, 8 steps, a checkpoint every 4."""
    tree = small(
        data, "train.duration=8it", "train.checkpoint_every=4it", models=[VIT], t_head=None
    )
    return write(tree, tmp_path / "small.yaml")


@pytest.fixture
def at(monkeypatch):
    """at(k, do): before step k (from 0) of a run, `do(trainer)`, in this process or a fork."""

    def install(k: int, do) -> None:
        step = Trainer.step

        def first(self, number, batches):
            if number == k:
                do(self)
            return step(self, number, batches)

        monkeypatch.setattr(Trainer, "step", first)

    return install


@pytest.fixture
def alarming(tmp_path, data, monkeypatch) -> Path:
    """As `recipe`, with a teacher so hot that an alarm is raised at step 6."""
    monkeypatch.setattr(alarms, "WINDOW", 4)
    monkeypatch.setattr(alarms, "MIN_ROWS", 3)
    hot = [f"loss.{key}=50" for key in ("teacher_temperature", "warmup_teacher_temperature")]
    more = ("train.duration=8it", "train.checkpoint_every=4it", "train.warmup=1it", *hot)
    return write(small(data, *more, models=[VIT], t_head=None), tmp_path / "alarming.yaml")


def step_of(run: Path) -> int:
    """The step of the newest checkpoint, which must load."""
    return load_checkpoint(last_checkpoint(run))["step"]


def same_end(run: Path, other: Path) -> bool:
    one, two = (load_checkpoint(last_checkpoint(r)) for r in (run, other))
    return one["step"] == two["step"] and all(
        torch.equal(value, two["model"][name]) for name, value in one["model"].items()
    )


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(run, at, recipe, tmp_path, number, code):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run("pretrain", recipe, "--run", whole)[0] == 0
    at(5, lambda trainer: os.kill(os.getpid(), number) if trainer.run == out else None)
    result, text, error = run("pretrain", recipe, "--run", out)
    assert result == code and "Traceback" not in error
    assert "Stopping after this step" in error
    assert f"Stopped at step 6 of 8. The last good checkpoint is {out}" in text
    assert "the same command goes on from it" in text and step_of(out) == 6
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "resuming" in run("pretrain", recipe, "--run", out)[1] and same_end(out, whole)


def test_a_second_ctrl_c_stops_at_once(run, at, recipe, tmp_path):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    at(5, twice)
    code, text, _ = run("pretrain", recipe, "--run", tmp_path / "run")
    assert code == 130 and "Stopped at step 5 of 8." in text and step_of(tmp_path / "run") == 4


def test_ctrl_c_of_a_terminal_reaches_the_workers_too(recipe, tmp_path):
    out = tmp_path / "run"
    child = Child(tmp_path, "pretrain", recipe, "data.workers=2", "train.duration=5000it",
                  "--run", out)  # fmt: skip
    child.until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text())
    os.killpg(child.pid, signal.SIGINT)
    code, text, error = child.wait()
    assert code == 130 and "Stopped at step" in text
    assert error.split("at once.")[1:] == [""], "a worker had something to say"
    assert f"/{step_of(out):08d}.pt" in text


def test_a_run_in_another_thread_leaves_signals_alone(recipe, tmp_path):
    seen = []
    thread = threading.Thread(
        target=lambda: seen.append(pretrain(recipe, run=tmp_path / "run", console=silent()))
    )
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert seen == [tmp_path / "run"] and signal.getsignal(signal.SIGINT) is before


# Disks and folders


def test_a_full_disk_while_saving(recipe, tmp_path):
    """A limit on the size of files: the first checkpoint does not fit, the metrics do."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    out = tmp_path / "run"
    code, _, error = Child(tmp_path, "pretrain", recipe, "--run", out, before=limit).wait()
    assert code == 2 and "00000004.pt cannot be written: File too large. No checkpoint" in error
    assert not list((out / "checkpoints").iterdir())


def test_a_disk_that_fills_up(run, recipe, tmp_path):
    """A real one: two checkpoints fit, the third does not. With room again the run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    whole = tmp_path / "whole"
    words = ("pretrain", recipe, "train.checkpoint_every=1it")
    assert run(*words, "--run", whole)[0] == 0
    size = last_checkpoint(whole).stat().st_size
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(2.6 * size)}", "tmpfs", disk],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip("only root can mount; the test before this one has the same fault")
    try:
        code, _, error = run(*words, "--run", disk / "run")
        assert code == 2 and "00000003.pt cannot be written: No space left on device" in error
        assert f"The last good checkpoint is {disk}/run/checkpoints/00000002.pt" in error
        assert step_of(disk / "run") == 2 and len(list((disk / "run/checkpoints").iterdir())) == 2
        subprocess.run(["mount", "-o", f"remount,size={9 * size}", disk], check=True)
        assert run(*words, "--run", disk / "run")[0] == 0 and same_end(disk / "run", whole)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("part", ["_file", "_board"])
def test_metrics_on_a_full_disk(tmp_path, part):
    """/dev/full is a disk without room."""
    row = {"step": 1, "loss_1": 1.0, "images_per_s": 1.0, "data_wait": 0.0}
    message = r"metrics in .*run cannot be written: No space left on device\. No checkpoint.*room"
    (tmp_path / "run").mkdir()
    with (
        open("/dev/full", "a", buffering=1) as text,
        pytest.raises(mokd_fast.UserError, match=message),
        RunLog(tmp_path / "run", 0, 4, silent()) as log,
    ):
        if part == "_file":
            log._file = text
        else:
            log._board._writer._writer = text.buffer.raw
        log.write(row)


def test_metrics_on_a_full_disk_leave_the_checkpoint(run, at, recipe, tmp_path):
    rows = tmp_path / "run" / "metrics.jsonl"

    def fill(_):  # the open file of the run is /dev/full from now on
        for fd in os.listdir("/proc/self/fd"):
            if os.path.realpath(f"/proc/self/fd/{fd}") == str(rows.resolve()):
                null = os.open("/dev/full", os.O_WRONLY)
                os.dup2(null, int(fd))
                os.close(null)

    at(5, fill)
    code, _, error = run("pretrain", recipe, "--run", tmp_path / "run")
    assert code == 2 and "No space left on device" in error and "00000004.pt" in error
    assert step_of(tmp_path / "run") == 4


def test_a_folder_that_becomes_read_only(at, recipe, data):
    """As another user where the tests are root, who may write everywhere."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        shutil.copytree(data, place / "data")
        shutil.copy(recipe, place / "small.yaml")
        for path in (place, *place.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
            os.chown(path, 65534, 65534) if os.geteuid() == 0 else None
        out = place / "run"
        at(5, lambda _: (out / "checkpoints").chmod(0o555))

        def nobody():
            if os.geteuid() == 0:
                os.setuid(65534)

        words = ("pretrain", place / "small.yaml", f"data.root={place}/data", "--run", out)
        code, _, error = Child(place / "one", *words, before=nobody).wait()
        assert code == 2 and "00000008.pt cannot be written: Permission denied" in error
        assert f"The last good checkpoint is {out}/checkpoints/00000004.pt" in error
        assert step_of(out) == 4
        code, _, error = Child(place / "two", *words, before=nobody).wait()
        assert code == 2 and f"run folder {out} cannot be written (Permission denied)" in error
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_run_folder_that_goes_away(run, at, recipe, tmp_path, how):
    whole, out, there = tmp_path / "whole", tmp_path / "run", tmp_path / "there"
    assert run("pretrain", recipe, "--run", whole)[0] == 0
    at(5, lambda _: shutil.rmtree(out) if how == "removed" else out.rename(there))
    code, _, error = run("pretrain", recipe, "--run", out)
    assert code == 2 and f"run folder {out} was removed or renamed" in error
    assert f"{out}/checkpoints/00000006.pt was written to a new folder" in error
    assert step_of(out) == 6
    if how == "renamed":
        assert step_of(there) == 4
    assert run("pretrain", recipe, "--run", out)[0] == 0 and same_end(out, whole)


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_run_folder_that_goes_away_before_an_alarm(run, at, alarming, tmp_path, how):
    """alarms.jsonl is opened by its path: neither is the state lost for it, nor does a row land in
    the folder of another run."""
    whole, out, others = tmp_path / "whole", tmp_path / "run", []
    assert run("pretrain", alarming, "--run", whole)[0] == 0
    assert '"step": 6' in (whole / "alarms.jsonl").read_text()

    def away(_):
        if how == "removed":
            shutil.rmtree(out)
        else:
            out.rename(tmp_path / "there")
            others.append(RunLock(out))

    at(5, away)
    code, _, error = run("pretrain", alarming, "--run", out)
    assert code == 2 and not (out / "alarms.jsonl").exists()
    if how == "removed":
        assert f"{out}/checkpoints/00000006.pt was written to a new folder" in error
        assert step_of(out) == 6
    else:
        others[0].release()
        assert f"{out} is in use by" in error


def test_the_place_of_a_renamed_folder_is_another_runs(run, at, recipe, tmp_path):
    out, others = tmp_path / "run", []
    at(5, lambda _: (out.rename(tmp_path / "there"), others.append(RunLock(out))))
    code, _, error = run("pretrain", recipe, "--run", out)
    others[0].release()
    assert code == 2 and f"{out} is in use by process {os.getpid()}" in error
    assert not checkpoints(out / "checkpoints") and step_of(tmp_path / "there") == 4


def test_two_runs_in_one_folder(run, at, recipe, tmp_path):
    """The second is refused while the first lives; the lock of a killed one is no obstacle, and
    its loader workers do not hold it."""
    out = tmp_path / "run"
    words = ("pretrain", recipe, "data.workers=1", "--run", out)
    at(3, lambda _: time.sleep(60) if os.getpid() != here else None)
    here = os.getpid()
    first = Child(tmp_path, *words)
    first.until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text())
    code, _, error = run(*words)
    assert code == 2 and f"{out} is in use by process {first.pid} on " in error and "--run" in error
    os.kill(first.pid, signal.SIGKILL)  # the worker learns of it seconds later
    assert first.wait()[0] == -signal.SIGKILL
    assert run(*words)[0] == 0 and step_of(out) == 8


# Pictures


def test_a_picture_that_goes_away(run, at, recipe, data, tmp_path, caplog):
    gone = sorted(data.rglob("*.png"))[3]
    at(1, lambda _: gone.unlink())
    code, _, _ = run("pretrain", recipe, "train.duration=12it", "--run", tmp_path / "run")
    assert code == 0 and str(gone) in caplog.text
    assert '"bad_files": 1,' in (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]
    assert load_checkpoint(last_checkpoint(tmp_path / "run"))["bad_files"].keys() == {str(gone)}


@pytest.mark.parametrize(("accumulate", "kept"), [(1, 5), (2, 4)])
def test_a_data_set_that_goes_away(run, at, recipe, data, tmp_path, accumulate, kept, monkeypatch):
    """Between two steps the state is whole and is saved; amid one the checkpoint before stands."""
    words = ("pretrain", recipe, f"train.accumulate={accumulate}")
    whole, out, away = tmp_path / "whole", tmp_path / "run", tmp_path / "away"
    assert run(*words, "--run", whole)[0] == 0
    read, left = Trainer.to_device, []

    def then_move(self, views):
        left.append(1)
        if len(left) == 5 * accumulate + accumulate - 1:  # after step 5, or within step 6
            data.rename(away)
        return read(self, views)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "to_device", then_move)
        code, _, error = run(*words, "--run", out)
    assert code == 2 and "pictures in a row cannot be read" in error and "No such file" in error
    assert f"{out}/checkpoints/{kept:08d}.pt; the same command goes on" in error
    assert step_of(out) == kept
    away.rename(data)
    assert run(*words, "--run", out)[0] == 0 and same_end(out, whole)


# The rest


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl"])
def test_a_full_disk_where_a_run_goes_on(recipe, run, at, tmp_path, name):
    """It says what is kept, and leaves the file that it could not replace."""
    out = tmp_path / "run"
    at(5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert run("pretrain", recipe, "--run", out)[0] == 143
    before = (out / name).read_text()
    (out / f"{name}.tmp").symlink_to("/dev/full")
    code, _, error = run("pretrain", recipe, "--run", out)
    assert code == 2 and "cannot be written: No space left on device" in error
    assert "The last good checkpoint is" in error and "Make room" in error
    assert (out / name).read_text() == before and step_of(out) == 6
    assert not list(out.glob("*.tmp"))
    assert run("pretrain", recipe, "--run", out)[0] == 0 and step_of(out) == 8


LIMITED = """
import resource
import sys
from pathlib import Path

import torch

import mokd_fast.train.loop
from mokd_fast import cli

torch.backends.mkldnn.set_flags(False)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv.pop(1)) << 20),) * 2)
cli.main()
"""


def limited(megabytes: int, *words: object) -> tuple[int, str]:
    """The command line in the address space that a new process has and some more; code and stderr.

    New, because a fork of a long test process inherits freed memory, which no limit counts. One
    thread and one arena, whose reservations would be counted; what is freed is given back. Without
    oneDNN: it crashes where it gets no page.
    """
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    env = {**os.environ, "OMP_NUM_THREADS": "1", **malloc}
    command = [sys.executable, "-c", LIMITED, *map(str, (megabytes, *words))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, " ".join(done.stderr.split())


def test_out_of_memory_by_stored_logits(tmp_path):
    """With them a step takes 340 MiB, without 100."""
    data = pictures(tmp_path / "many", 64)
    words = ("train.batch=64", "train.duration=2it", "train.warmup=0it", "prototypes=65536")
    recipe = write(small(data, *words, models=[VIT], t_head=None), tmp_path / "wide.yaml")
    where = ("--run", tmp_path / "run")
    code, error = limited(200, "pretrain", recipe, "loss.prototypes=fused", *where)
    assert code == 2 and "out of memory in step 1" in error and "No checkpoint" in error, error
    assert "It fits without stored logits, as just tried here: set loss.prototypes=fused" in error
    code, error = limited(200, "pretrain", recipe, "loss.prototypes=fused-linear", *where)
    assert code == 0, error


def test_out_of_memory_says_what_fits(recipe, tmp_path):
    """The crops of all pictures and what the networks make of them are too much for 120 MB."""
    data = pictures(tmp_path / "many", 32)
    big = (f"data.root={data}", "train.batch=32", "train.duration=2it", "augment.global_size=84")
    code, error = limited(120, "pretrain", recipe, *big, "--run", tmp_path / "run")
    assert code == 2 and "out of memory in step 1" in error and "No checkpoint" in error, error
    parts = int(error.split("train.accumulate=")[1].split(",")[0])
    assert parts > 1 and f"Micro-batches of {32 // parts} fit, as just tried here" in error
    fits = (f"train.accumulate={parts}", "--run", tmp_path / "fits")
    code, error = limited(120, "pretrain", recipe, *big, *fits)
    assert code == 0, error


AGAIN, PACKED = "train.checkpoint_activations=true", "train.pack_crops=true"


@pytest.mark.parametrize(
    ("precision", "option"), [("fp32", AGAIN), ("fp16", AGAIN), ("fp32", PACKED), ("bf16", None)]
)
def test_out_of_memory_in_the_optimizer(run, data, tmp_path, monkeypatch, precision, option):
    """A GradScaler has unscaled by then; and what is tried are steps with diagnostics. With packed
    crops activations cannot be made again."""
    words = (
        *(f"train.precision={precision}", "train.duration=8it", "train.log_every=8"),
        *("loss.prototypes=fused-linear", option or "train.seed=0"),
    )
    recipe = write(small(data, *words, models=[VIT], t_head=None), tmp_path / "small.yaml")
    step, add, calls, diagnosed = ScheduledOptimizer.step, loop.accumulate, [], []

    def short(self, *args):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self, *args)

    def watched(into, values, parts):
        diagnosed.append("center_norm_mlp_1" in values)
        add(into, values, parts)

    monkeypatch.setattr(ScheduledOptimizer, "step", short)
    monkeypatch.setattr(loop, "accumulate", watched)
    packed, fits = [], memory._fits
    monkeypatch.setattr(
        memory, "_fits", lambda t: packed.append(t.mokd.students[0].packed) or fits(t)
    )
    code, _, error = run("pretrain", recipe, "--run", tmp_path / "run")
    assert packed == [option == PACKED], "packs go without activations made again"
    assert code == 2 and "out of memory in step 1 (CUDA out of memory)" in error
    if option:
        assert "set train.accumulate=2" in error
        assert sum(diagnosed) == 2 * 2, "two steps of two micro-batches"
        return
    assert f"activations again, as just tried here: set {AGAIN} and the run goes on" in error
    assert sum(diagnosed) == 2
    assert run("pretrain", recipe, AGAIN, "--run", tmp_path / "run")[0] == 0


def test_what_counts_as_out_of_memory():
    assert out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("x"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(error.value) and not out_of_memory(RuntimeError("a bug"))


def test_a_clock_that_goes_back(run, recipe, tmp_path, monkeypatch, at):
    """Durations come from a clock that cannot; TensorBoard keeps the order of the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    at(5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert run("pretrain", recipe, "--run", out)[0] == 143
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 100_000)
    assert run("pretrain", recipe, "--run", out)[0] == 0
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss_1")] == [2, 4, 6, 8]
    assert all(event.value > 0 for event in board.Scalars("images_per_s"))


def test_a_reader_that_leaves(recipe, tmp_path):
    """mokd-fast pretrain | head -1: the run goes on to its end, the output is dropped."""
    out = tmp_path / "run"
    reads, writes = os.pipe()

    def every_line():
        os.close(reads)
        log_module.LINE_EVERY = 0.0

    child = Child(tmp_path, "pretrain", recipe, "--run", out, before=every_line, stdout=writes)
    os.close(writes)
    assert os.read(reads, 5) == b"loss."  # the first line says whether logits are stored
    os.close(reads)
    code, _, error = child.wait()
    assert (code, error) == (0, "") and step_of(out) == 8


def test_a_reader_that_stands_still(recipe, tmp_path):
    """A full pipe holds no step up; its reader finds the end of the run when it reads on."""
    out = tmp_path / "run"
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writes, b"x" * 4096)

    def every_line():
        log_module.LINE_EVERY = 0.0

    child = Child(tmp_path, "pretrain", recipe, "--run", out, before=every_line, stdout=writes)
    os.close(writes)
    child.until(lambda: (out / "checkpoints/00000008.pt").exists())
    assert os.read(reads, 4096) == b"x" * 4096
    code, _, error = child.wait()
    assert (code, error) == (0, "") and b"Run folder" in os.read(reads, 4096)
    os.close(reads)


def test_an_alarm_waits_for_no_reader(alarming, tmp_path):
    out = tmp_path / "run"
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writes, b"x" * 4096)
    child = Child(tmp_path, "pretrain", alarming, "--run", out, stdout=writes)
    os.close(writes)
    try:
        child.until(lambda: (out / "checkpoints/00000008.pt").exists(), limit=20)
    finally:
        os.read(reads, 4096)
        code, _, error = child.wait()
        os.close(reads)
    assert (code, error) == (0, "") and "loss at ln K" in (out / "alarms.jsonl").read_text()


def test_output_on_a_full_disk(recipe, tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    child = Child(tmp_path, "pretrain", recipe, "--run", tmp_path / "run", stdout=full)
    os.close(full)
    code, _, error = child.wait()
    assert (code, error) == (0, "") and step_of(tmp_path / "run") == 8


def test_a_bug_keeps_its_traceback_and_says_what_is_kept(at, recipe, tmp_path):
    out = tmp_path / "run"
    at(5, lambda _: 1 / 0)
    code, text, error = Child(tmp_path, "pretrain", recipe, "--run", out).wait()
    assert code == 1 and "Traceback" in error and "ZeroDivisionError" in error
    assert f"The run failed in step 6. The last good checkpoint is {out}" in text
    assert step_of(out) == 4
