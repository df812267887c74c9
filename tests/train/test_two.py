"""A run of two processes beside one: online kNN, a backbone from a file, unreadable pictures."""

import time

import pytest
import torch

import mokd_fast
from mokd_fast.interop.export import export_backbone
from mokd_fast.nn.backbones import build_backbone
from mokd_fast.nn.build import NetworkConfig
from mokd_fast.train.loop import pretrain
from tests.train.recipes import pictures, silent, small
from tests.train.test_distributed import PAIR, SIZES, fork, start, wait
from tests.train.test_loop import final_state, metrics

BAD = ("000.png", "005.png", "011.png", "020.png")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(one process, two processes, what each of the two said) of one recipe, 12 steps."""
    folder = tmp_path_factory.mktemp("two")
    data, labelled = pictures(folder / "data", 26), pictures(folder / "labelled", 21)
    for path in data.rglob("*.png"):
        if path.name in BAD:
            path.write_bytes(b"no picture")
    roots = (f"evaluate.train={labelled}", f"evaluate.test={labelled}", "evaluate.k=[3,5]")
    sizes = {"models": PAIR, "augment": SIZES}
    torch.manual_seed(7)
    backbone = build_backbone("test_vit", channels=1, size=(32, 32))
    network = NetworkConfig(name="test_vit")
    file = export_backbone(backbone, network, folder / "a.safetensors", channels=1, size=(32, 32))
    recipe = small(
        data, "train.batch=8", "train.log_every=1", "train.checkpoint_every=6it",
        "evaluate.every=5it", "data.check=false", f"models.0.weights={file}", "train.seed=5",
        *roots, **sizes,
    )  # fmt: skip
    one = pretrain(recipe, run=folder / "one", console=silent())
    found = fork(recipe, folder / "two", 2, "--run", folder / "two")
    assert [code for code, *_ in found] == [0, 0], found
    return one, folder / "two", [out + err for _, out, err in found]


def test_the_first_evaluates_and_the_other_waits(runs):
    """One voice, and the scores of the command on the last checkpoint."""
    _, run, said = runs
    assert said[0].count("knn_2_k5") == 3 and "knn" not in said[1]
    found = {row["step"]: row for row in metrics(run) if "knn_1_k3" in row}
    assert list(found) == [5, 10, 12]
    for i, row in enumerate(list(mokd_fast.knn(run).values())[:2], start=1):
        assert {k: found[12][f"knn_{i}_k{k}"] for k in row["knn"]} == row["knn"]


def test_both_start_from_the_file(runs):
    one, two = (final_state(run)["model"] for run in runs[:2])
    assert runs[2][0].count("models.0.weights: ") == 1 and "models.0" not in runs[2][1]
    for name, value in one.items():
        if not name.endswith("qkv.bias"):  # a key's has no gradient; AdamW makes steps of its noise
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_unreadable_pictures_of_both_are_counted(runs):
    """Row by row as in one process, which reads the same pictures; each once."""
    one, two = ([row["bad_files"] for row in metrics(run)] for run in runs[:2])
    assert one == two and one[0] < one[-1] == len(BAD)
    assert len(final_state(runs[1])["bad_files"]) == len(BAD)


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_during_an_evaluation(told, tmp_path):
    """One of them is told while the first evaluates for long: both end with one checkpoint, and the
    run that goes on makes up for the scores."""
    data, bank = pictures(tmp_path / "data", 26), pictures(tmp_path / "bank", 20000)
    recipe = small(
        data, "train.batch=8", "train.checkpoint_every=3it", f"evaluate.train={bank}",
        f"evaluate.test={data}", "evaluate.every=4it", models=PAIR, augment=SIZES,
    )  # fmt: skip
    run = tmp_path / "run"
    processes = start(recipe, run, 2)
    while (
        not (run / "metrics.jsonl").exists()
        or '"step": 3,' not in (run / "metrics.jsonl").read_text()
    ):
        assert processes[0].poll() is None
        time.sleep(0.05)
    time.sleep(3)  # into the evaluation after step 4
    processes[told].terminate()
    codes, said = wait(processes)
    assert codes == [143, 143], said
    assert final_state(run)["step"] in ((4,) if told == 0 else (4, 5, 6))
    codes, said = wait(start(recipe, run, 2))
    assert codes == [0, 0], said
    found = [row["step"] for row in metrics(run) if "knn_1_k10" in row]
    assert found == [4, 8, 12]
