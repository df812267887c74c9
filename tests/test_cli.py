"""Every mistake a user can make: one message that names it and the way out, exit code 2."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from mokd_fast import doctor
from mokd_fast.ops import cpu
from mokd_fast.train.checkpoint import last_checkpoint, load_checkpoint
from tests.train.recipes import pictures, small


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pictures(tmp_path / "data", 12)


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> str:
    tree = small(data, "train.duration=4it", "train.checkpoint_every=2it").model_dump(mode="json")
    for section in tree["models"]:
        section["temperature_warmup"] = {"self": "0ep", "cross": "0ep", "search": "0ep"}
    tree["train"].update(warmup="0it", freeze_last_layers="0it")
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, message = result
    assert code == 2, message
    assert message.startswith("error:") and "Traceback" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


def test_pictures_that_are_not_there(run, recipe, tmp_path):
    refused(run("pretrain", recipe, "data.root=/no/such"), "/no/such", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(run("pretrain", recipe, f"data.root={tmp_path / 'empty'}"), "the folder is empty")
    refused(run("pretrain", recipe, "data.root="), "data.root is not set", "data.root=/path")


def test_one_picture_and_a_batch_larger_than_the_data(run, recipe, tmp_path):
    one = pictures(tmp_path / "one", 1)
    out = tmp_path / "run"
    refused(run("pretrain", recipe, f"data.root={one}", "--run", out), "1 picture", "train.batch")
    refused(run("pretrain", recipe, "train.batch=50", "--run", out), "50", "12", "train.batch")
    assert not out.exists(), "nothing is made before the mistake is known"


def test_an_unreadable_picture_is_named_skipped_and_counted(run, recipe, data, tmp_path):
    broken, out = data / "class0" / "broken [1].png", tmp_path / "run"
    broken.write_bytes(b"not a picture")
    words = ("pretrain", recipe, "train.duration=9it", "--run", out)
    text = "1 of 13 pictures cannot be read"
    refused(run(*words), text, "data.max_bad=0.01 allows 0", str(broken), f"{out}/bad_files.txt")
    code, said, _ = run(*words, "data.max_bad=0.1")
    assert code == 0 and f"{text} and are skipped, listed in {out}/bad_files.txt" in said
    reason = "OSError: not a picture that Pillow can read, begins b'not a pi'"
    assert (out / "bad_files.txt").read_text() == f"{broken}\t{reason}\n"
    assert '"bad_files": 1' in (out / "metrics.jsonl").read_text().splitlines()[-1]


def test_without_the_check_an_unreadable_picture_is_met(run, recipe, data, tmp_path, caplog):
    broken = data / "class0" / "broken [1].png"
    broken.write_bytes(b"not a picture")
    words = ("train.duration=9it", "data.check=false", "--run", tmp_path / "run")
    code, said, _ = run("pretrain", recipe, *words)
    assert code == 0 and "checked" not in said
    assert str(broken) in caplog.text
    assert '"bad_files": 1' in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]


def test_a_run_folder_that_cannot_be_written(run, recipe, tmp_path):
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "run"
    refused(run("pretrain", recipe, "--run", where), str(where), "cannot be written", "--run")


def test_unknown_model_and_keys(run, recipe):
    refused(run("pretrain", recipe, "models.0.name=resnet5o"), "resnet5o", "resnet50")
    refused(run("pretrain", recipe, "train.bach=3"), "train.bach", "train.batch")
    refused(run("pretrain", recipe, "train.batch=many"), "train.batch", "many")
    refused(run("pretrain", recipe, "train.batch=0"), "train.batch", "greater than 0")
    refused(run("pretrain", "no-such-recipe"), "no-such-recipe", "fashion-mnist")


def test_warmup_longer_than_the_run(run, recipe, tmp_path):
    out = tmp_path / "run"
    refused(
        run("pretrain", recipe, "train.warmup=9it", "--run", out), "train.warmup=9it", "4 steps"
    )


def test_non_finite_loss_leaves_the_last_good_checkpoint(run, recipe, tmp_path, monkeypatch):
    from mokd_fast.train.loop import Trainer

    step = Trainer.step

    def poisoned(self, k, batches):
        if k == 2:
            with torch.no_grad():
                self.mokd.students[1].mlp_head.last_layer.weight_v.fill_(torch.nan)
        return step(self, k, batches)

    monkeypatch.setattr(Trainer, "step", poisoned)
    out = tmp_path / "run"
    result = run("pretrain", recipe, "train.max_skipped=2", "--run", out)
    refused(result, "non-finite loss at step 3", "_2", "00000002.pt", "learning rate")
    last = last_checkpoint(out)
    assert last is not None
    state = load_checkpoint(last)
    assert state["step"] == 2
    assert all(v.isfinite().all() for v in state["model"].values())


def test_a_checkpoint_of_another_recipe(run, recipe, tmp_path):
    out = tmp_path / "run"
    assert run("pretrain", recipe, "--run", out)[0] == 0
    before = last_checkpoint(out).read_bytes()
    refused(
        run("pretrain", recipe, "train.seed=5", "--run", out), "train.seed: 0 there, 5 now", "--run"
    )
    assert last_checkpoint(out).read_bytes() == before
    code, text, _ = run("pretrain", recipe, "data.workers=1", "--run", out)
    assert code == 0 and "is finished" in text


def test_a_damaged_checkpoint_and_a_missing_run(run, recipe, tmp_path):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "00000002.pt").write_bytes(b"PK damaged")
    refused(run("pretrain", recipe, "--run", out), "00000002.pt", "not a readable checkpoint")
    refused(run("knn", tmp_path / "nothing"), "nothing", "no such run")
    refused(run("export", tmp_path), "holds no checkpoint")


def test_every_command_uses_the_checkpoint_before_a_damaged_one(run, recipe, tmp_path, caplog):
    out = tmp_path / "run"
    run("pretrain", recipe, "--run", out)
    newest = out / "checkpoints" / "00000004.pt"
    whole = newest.read_bytes()
    for words in (("pretrain", recipe, "--run"), ("export",)):
        caplog.clear()
        newest.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
        code, text, _ = run(*words, out)
        assert code == 0 and "00000002.pt is used instead" in caplog.text
        assert ("resuming" in text) == (words[0] == "pretrain")
        assert Path(f"{newest}.damaged").exists()


def test_warm_start(run, recipe, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run("pretrain", recipe, "--run", first)
    words = ("pretrain", recipe, "train.seed=5", "--run", second, "--warm-start", first)
    code, text, _ = run(*words)
    assert code == 0 and f"warm start from {first}/checkpoints/00000004.pt (step 4)" in text
    assert "is not applied again" in run(*words)[1]
    third = ("--run", tmp_path / "third", "--warm-start", first)
    refused(run("pretrain", recipe, "prototypes=32", *third), "[64, 1] there, [32, 1] here")


def test_evaluation_needs_labelled_pictures(run, recipe, tmp_path):
    out = tmp_path / "run"
    run("pretrain", recipe, "--run", out)
    refused(run("knn", out), "evaluate.train is not set")
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate((tmp_path / "data").rglob("*.png")):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
    refused(run("knn", out, f"evaluate.train={flat}", f"evaluate.test={flat}"), "folder")


def test_debug_shows_the_traceback(recipe):
    command = [sys.executable, "-m", "mokd_fast.cli", "pretrain", recipe, "data.root=/no/such"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    plain = subprocess.Popen(command, **streams)  # both at once: each imports torch
    debug = subprocess.Popen([*command, "--debug"], **streams)
    out, err = plain.communicate()
    assert plain.returncode == 2 and out == ""
    assert err.startswith("error: /no/such: no such folder") and "Traceback" not in err
    _, err = debug.communicate()
    assert debug.returncode != 0 and "Traceback" in err and "UserError: /no/such" in err


def test_brackets_in_a_message_are_not_markup(run):
    refused(run("knn", "/no/[red]folder"), "/no/[red]folder")


def test_paths_are_printed_as_they_are(run, recipe, tmp_path):
    """Brackets are no markup, and a long path is not broken over lines."""
    out = tmp_path / ("[bold]" + "long" * 30)
    code, text, _ = run("pretrain", recipe, "--run", out)
    assert code == 0 and f"Run folder: {out}\n" in text
    assert f"{out} is finished" in run("pretrain", recipe, "--run", out)[1]
    code, text, _ = run("export", out, "--model", "2", "--student")
    assert code == 0 and text == f"{out}/exported/2_mokd_vit_tiny_student.safetensors\n"
    refused(run("export", out, "--model", "3"), "model=3: the run has 2")
    refused(run("export", out, "--out", tmp_path / "small.yaml" / "x"), "x cannot be written")


def test_knn_prints_the_controls_and_keeps_the_result(run, recipe, data, tmp_path):
    out = tmp_path / "run"
    run("pretrain", recipe, "--run", out)
    roots = [f"evaluate.train={data}", f"evaluate.test={data}", "evaluate.k=[1]"]
    code, text, _ = run("knn", out, *roots)
    assert code == 0 and (out / "knn.json").exists()
    for row in ("1 mokd_cnn_tiny teacher", "2 mokd_vit_tiny random", "pixels", "kNN k=1"):
        assert row in text
    assert "mokd_cnn_tiny student" in run("knn", out, *roots, "--student")[1]


def test_usage_mistakes(run):
    for words in (("pretrian",), ("knn",), ("export", "x", "--model", "one")):
        code, _, message = run(*words)
        assert code == 2 and "Traceback" not in message
    assert run("--help")[0] == 0


def test_doctor(run, monkeypatch):
    monkeypatch.setattr(doctor, "native_module", lambda: "why [not]")
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", "pip install mokd_fast[extra]")
    code, text, _ = run("doctor")
    assert code == 0
    assert "mokd_fast[extra]" in text and "why [not]" in text
    assert "distill_cross_entropy" in text and "reference: " in text
    assert "xformers" in text and "torch" in text
    assert "NVIDIA apex" in text


@pytest.mark.skipif(cpu.native is None, reason="the native module was not built")
def test_doctor_asks_as_the_training_does():
    other = {"prototype_loss", "self_attention", "prototype_linear"}  # ways; AVX512-BF16 alone
    for name, said in doctor.backends().items():
        assert "cpu: chosen" in said or name in other, (name, said)


def test_doctor_says_which_apex_there_is(run, monkeypatch):
    for reason in ("the apex in x is not [NVIDIA's]", None):
        monkeypatch.setattr(doctor.apex, "why_not", lambda reason=reason: reason)
        assert (reason or "its CUDA extension loads") in " ".join(run("doctor")[1].split())


def test_doctor_says_why_there_is_no_native_module(monkeypatch):
    monkeypatch.setattr(cpu, "native", None)
    for reason in (cpu.NOT_BUILT, "the native module is built but cannot be loaded: x"):
        monkeypatch.setattr(cpu, "missing", reason)
        assert reason in doctor.native_module()


def test_a_forced_backend_that_does_not_exist(run, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MOKD_FAST_BACKEND", "abacus")
    out = tmp_path / "run"
    refused(run("pretrain", recipe, "--run", out), "no backend 'abacus'", "Unset MOKD_FAST_BACKEND")
    assert not out.exists()
    assert "MOKD_FAST_BACKEND=abacus is set" in run("doctor")[1]


def test_resume_may_change_how_it_is_evaluated_and_where_the_pictures_lie(
    run, recipe, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    assert run("pretrain", recipe, "--run", out)[0] == 0
    monkeypatch.chdir(tmp_path)
    again = run("pretrain", recipe, "data.root=data", "evaluate.k=[5]", "--run", out)
    assert again[0] == 0 and "is finished" in again[1]


def test_views(run, data, tmp_path, monkeypatch):
    out = tmp_path / "views.png"
    grey = ("data.channels=1", "data.mean=[0.5]", "data.std=[1]", "augment.locals=2")
    code, said, _ = run("views", data, *grey, "--images", "2", "--out", out)
    assert code == 0 and said.strip() == str(out)
    assert Image.open(out).width == 5 * 136 - 8  # the picture and four views
    (odd := tmp_path / "[2024]: #1").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    assert run("views", odd.name, *grey, "--images", "1", "--out", out)[0] == 0
    refused(run("views", data, "--loader", "gpu"), "no loader 'gpu'; there are cpu, dali, pillow")
    refused(run("views", data, "--out", tmp_path / "no" / "v.png"), "cannot be written: No such")
    refused(run("views", tmp_path / "gone"), "no such folder")


def test_a_dry_run_says_what_the_run_needs(run, recipe, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, _ = run("pretrain", recipe, "--dry-run")
    assert code == 0
    said = " ".join(said.split())
    found = re.search(
        r"4 steps of (\S+) s take (\S+) hours, .* memory (\S+) GiB, a checkpoint", said
    )
    assert found and "evaluate" not in said, said
    every = [f"evaluate.{key}={data}" for key in ("train", "test")] + ["evaluate.every=1ep"]
    code, more, _ = run("pretrain", recipe, *every, "--dry-run")
    assert code == 0 and "GiB; evaluate.every comes on top" in " ".join(more.split())
    seconds, hours, gib = map(float, found.groups())
    assert hours == pytest.approx(4 * seconds / 3600, rel=0.02) and 0.1 < gib < 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "small.yaml"]
    refused(run("pretrain", recipe, "train.batch=999", "--dry-run"), "does not fit a data set")
