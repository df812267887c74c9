"""The whole evaluation: what is in it, what is read, what it refuses."""

import io
import json

import pytest
import torch
from rich.console import Console

from mokd_fast.errors import UserError
from mokd_fast.evaluate import (
    evaluate,
    extract,
    few_shot_indices,
    format_table,
    knn,
    linear_probe,
    pixels,
)

OPTIONS = {"size": 12, "resize": 12, "channels": 1, "mean": (0.3,), "std": (0.3,)}


def halves(x):
    """Brightness of the left and of the right half: right wherever the square is."""
    w = x.shape[3] // 2
    return torch.stack([x[..., :w].mean((1, 2, 3)), x[..., w:].mean((1, 2, 3))], dim=1)


@pytest.fixture
def scored(squares, generators_untouched):
    train, test, calls = squares(60), squares(30, seed=1), []
    result = evaluate(
        {"halves": halves, "flat": lambda x: torch.ones(len(x), 3)}, train, test,
        ks=(3, 100), shift=2, per_class=4, progress=lambda *call: calls.append(call), **OPTIONS,
    )  # fmt: skip
    return result, train, test, calls


def test_result_holds_every_score_of_every_model(scored):
    result, *_ = scored
    assert list(result) == ["halves", "flat", "pixels"]
    assert json.loads(json.dumps(result)) == result
    for scores in result.values():
        assert set(scores["knn"]) == set(scores["knn_shifted"]) == {"3", "60"}  # k > bank
        assert set(scores["knn_few"]) == {"4"}
        assert (scores["bank"], scores["test"]) == (60, 30)
    assert result["halves"]["knn"]["3"] == result["halves"]["knn_shifted"]["3"] == 100.0
    assert result["halves"]["linear"] == 100.0 and result["halves"]["knn_few"]["4"] == 100.0
    flat = result["flat"]
    assert flat["knn"]["60"] == flat["linear"] == flat["linear_few"] == 50.0
    assert [scores["width"] for scores in result.values()] == [2, 3, 144]


def test_scores_are_those_of_the_parts(squares):
    faint = {"noise": 256, "bright": 160}  # so that chance decides some pictures
    train, test = squares(60, **faint), squares(30, seed=1, **faint)
    options = {"shift": 2, "per_class": 4, "seed": 3}
    scores = evaluate({}, train, test, ks=(3,), **options, **OPTIONS)["pixels"]
    bank, labels = extract({"p": pixels}, train, **OPTIONS)
    clean, queries = extract({"p": pixels}, test, **OPTIONS)
    moved, _ = extract({"p": pixels}, test, shift=2, seed=3, **OPTIONS)
    for key, features in (("knn", clean), ("knn_shifted", moved)):
        assert scores[key]["3"] == knn(bank["p"], labels, features["p"], queries, ks=(3,))[3]
    assert scores["knn"] != scores["knn_shifted"]

    few = [few_shot_indices(labels, 4, seed) for seed in range(3, 8)]
    near = [knn(bank["p"][i], labels[i], clean["p"], queries, ks=(4,))[4] for i in few]
    probes = [linear_probe(bank["p"][i], labels[i], clean["p"], queries, seed=3).top1 for i in few]
    assert scores["knn_few"]["4"] == pytest.approx(sum(near) / 5) != near[0]
    assert scores["linear_few"] == pytest.approx(sum(probes) / 5) != probes[0]
    probe = linear_probe(bank["p"], labels, clean["p"], queries, seed=3)
    assert (scores["linear"], scores["linear_lr"]) == (probe.top1, probe.lr)


def test_pictures_are_read_once_for_all_models(scored):
    _, train, test, calls = scored
    assert train.reads == list(range(60)) and test.reads == 2 * list(range(30))
    ends = [what for what, done, total in calls if done == total]
    assert ends == ["train pictures", "test pictures", "shifted test pictures", "scores"]


def test_parts_can_be_left_out(squares):
    train, test = squares(40), squares(20)
    options = {"linear": False, "shift": 0, "train_limit": 12, "test_limit": 7}
    scores = evaluate({}, train, test, **options, **OPTIONS)["pixels"]
    assert set(scores) == {"bank", "test", "width", "knn", "knn_few"}
    assert (scores["bank"], scores["test"]) == (12, 7) and len(test.reads) == 7


def test_table_shows_every_score(scored):
    result, *_ = scored
    console = Console(file=io.StringIO(), width=200)
    console.print(format_table(result))
    text = console.file.getvalue()
    for word in (*result, "kNN k=3", "kNN k=60", "shift k=3", "few k=4", "linear"):
        assert word in text, word
    line = next(line for line in text.splitlines() if "pixels" in line)
    scores = result["pixels"]
    cells = [*scores["knn"].values(), *scores["knn_shifted"].values(), *scores["knn_few"].values()]
    cells += [scores["linear_few"], scores["linear"]]
    assert line.split()[1:] == [f"{cell:.1f}" for cell in cells]


def test_table_fits_a_terminal():
    row = {"knn": {"10": 1.0, "20": 2.0}, "knn_shifted": {"10": 3.0, "20": 4.0}}
    row |= {"knn_few": {"10": 5.0}, "linear_few": 6.0, "linear": 7.0}
    console = Console(file=io.StringIO(), width=80)
    console.print(format_table({"1 mokd_cnn_tiny teacher": row}))
    text = console.file.getvalue()
    assert "1 mokd_cnn_tiny teacher" in text and "…" not in text


def test_differing_classes_are_refused(squares):
    train, test = squares(10), squares(10)
    test.classes = ("class0", "other")
    with pytest.raises(UserError, match=r"only in train: class1; only in test: other"):
        evaluate({}, train, test, **OPTIONS)


def test_the_controls_name_is_taken(squares):
    with pytest.raises(ValueError, match="'pixels' is the control's name"):
        evaluate({"pixels": halves}, squares(4), squares(4), **OPTIONS)
