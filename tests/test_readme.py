"""What the README shows is generated from results, and its Python runs."""

import re
from pathlib import Path

import pytest

from bench import readme
from bench.readme import ROOT, render
from bench.report import plots, results
from tests.train.recipes import pictures

README = (ROOT / "README.md").read_text()
PAGES = {page: (ROOT / page).read_text() for page in readme.PAGES}


def test_generated_parts_are_fresh():
    for page, text in PAGES.items():
        assert render(text) == text, f"{page}: run python bench/readme.py"
    assert not plots.stale(), "run python bench/readme.py"


def test_missing_results_are_said(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    both = "".join(map(render, PAGES.values()))
    assert both.count("Not measured yet.") == len(readme.PARTS)
    assert "step-table: not measured yet, no step.json" in capsys.readouterr().out


def test_check_fails_on_a_stale_readme_or_plot(tmp_path: Path, monkeypatch):
    page = tmp_path / "bench/README.md"
    page.parent.mkdir()
    (tmp_path / "README.md").write_text("")
    page.write_text("<!-- generated: step-table -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["readme.py", "--check"])
    with pytest.raises(SystemExit, match=r"stale: bench/README.md; run python bench/readme.py"):
        readme.main()
    page.write_text("")
    monkeypatch.setattr(plots, "stale", lambda: {"speed": {}})
    with pytest.raises(SystemExit, match=r"stale: plots/speed.svg; run"):
        readme.main()


def test_links_exist():
    shown = 0
    for page, text in PAGES.items():
        images = re.findall(r'<img[^>]* src="([^"]+)"', text)
        shown += len(images)
        for link in [*re.findall(r"\]\((?!http)([^)]+)\)", text), *images]:
            path, _, title = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            assert not title or title in titles(target.read_text()), link
    assert shown == 3


def titles(text: str) -> list[str]:
    """As GitHub links to them; of equal ones to the first."""
    found = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in found]


def test_python_examples_run(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", 64)
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        exec(example.replace("train.duration=20it", "train.duration=2it"), {})
    assert (tmp_path / "runs/mine/exported").is_dir()
