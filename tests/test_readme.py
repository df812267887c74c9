"""What the README shows is generated from results, and its Python runs."""

import re
from pathlib import Path

from bench.readme import ROOT, render
from tests.train.recipes import pictures

README = (ROOT / "README.md").read_text()


def test_generated_parts_are_fresh():
    assert render(README) == README, "run python bench/readme.py"


def test_links_exist():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_python_examples_run(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", 64)
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example.replace("train.duration=20it", "train.duration=2it"), {})
    assert (tmp_path / "runs/mine/exported").is_dir()
