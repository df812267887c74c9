"""Fills the generated parts of README.md and bench/README.md and draws the plots, all from
bench/results/.

python bench/readme.py [--check]     --check: exit 1 when one of them or a plot is stale
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.report import gpu, gpu_step, plots, summary
from bench.report.data import augment_table, data_table
from bench.report.operators import distill_table, linear_table, scaling_table, search_table
from bench.report.results import ROOT
from bench.report.step import (
    activations_sentence,
    layers_table,
    parts_table,
    step_table,
    ways_table,
)
from bench.report.training import (
    ablation_table,
    alarms_table,
    demo_table,
    output,
    watch_sentence,
)

PAGES = ("README.md", "bench/README.md")
PARTS = {
    "output": output,
    "demo-table": demo_table,
    "ablation-table": ablation_table,
    "alarms-table": alarms_table,
    "watch": watch_sentence,
    "summary-table": summary.table,
    "gpu-summary-table": summary.gpu_table,
    "distill-table": distill_table,
    "scaling-table": scaling_table,
    "linear-table": linear_table,
    "search-table": search_table,
    "augment-table": augment_table,
    "data-table": data_table,
    "step-table": step_table,
    "parts-table": parts_table,
    "ways-table": ways_table,
    "layers-table": layers_table,
    "activations": activations_sentence,
    "gpu-checks": gpu.checks_sentence,
    "gpu-printed": gpu.printed,
    "gpu-distill-table": gpu.distill_table,
    "gpu-linear-table": gpu.linear_table,
    "gpu-search-table": gpu.search_table,
    "gpu-norms-table": gpu.norms_table,
    "gpu-augment-table": gpu.augment_table,
    "gpu-step-table": gpu_step.step_table,
    "gpu-parts-table": gpu_step.parts_table,
    "gpu-means-table": gpu_step.means_table,
}


def filled(name: str, part: Callable[[], str]) -> str:
    try:
        return part()
    except FileNotFoundError as error:
        print(f"{name}: not measured yet, no {Path(error.filename).name}")
        return "Not measured yet."


def render(text: str) -> str:
    for name, part in PARTS.items():
        pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)"
        body = filled(name, part) + "\n"
        text = re.sub(pattern, lambda m, body=body: m[1] + body + m[2], text, flags=re.DOTALL)
    return text


def main() -> None:
    old = {page: (ROOT / page).read_text() for page in PAGES}
    new = {page: render(text) for page, text in old.items()}
    if "--check" in sys.argv:
        stale = [page for page in PAGES if new[page] != old[page]]
        stale += [f"plots/{name}.svg" for name in plots.stale()]
        sys.exit(f"stale: {', '.join(stale)}; run python bench/readme.py" if stale else 0)
    for page, text in new.items():
        (ROOT / page).write_text(text)
    try:
        for drawn in plots.draw_stale():
            print(f"drawn: {drawn.relative_to(ROOT)}")
    except ImportError:
        sys.exit(f"stale: {', '.join(plots.stale())}; drawing needs matplotlib: pip install it")


if __name__ == "__main__":
    main()
