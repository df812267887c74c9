"""Tables of whole runs: the demo, the ablation of the search, the alarms and their cost."""

import statistics
from itertools import combinations
from typing import Any

from bench.report.results import load, machine, measured, spread, text

K = "20"  # neighbours in the table


def output() -> str:
    """What the two commands printed, as it was kept."""
    texts = [text(name).strip() for name in ("demo", "test")]
    return "```\n$ make demo\n{}\n\n$ make test\n...\n{}\n```".format(*texts)


def demo_table() -> str:
    """Mean over the seeds, with the range."""
    result = load("demo")
    tables = [seed["table"] for seed in result["seeds"].values()]
    lines = ["| | clean | shifted | 10 labels | linear |", "|---|---|---|---|---|"]
    for name in tables[0]:
        rows = [table[name] for table in tables]
        few = [next(iter(row["knn_few"].values())) for row in rows]
        columns = [
            [row["knn"][K] for row in rows],
            [row["knn_shifted"][K] for row in rows],
            few,
            [row["linear"] for row in rows],
        ]
        lines.append(f"| {name} | " + " | ".join(spread(values) for values in columns) + " |")
    seeds = list(result["seeds"].values())
    facts = {key: statistics.median(s[key] for s in seeds if key in s) for key in FACTS}
    lines += ["", "; ".join(FACTS[key].format(value) for key, value in facts.items()) + ". "]
    lines[-1] += f"Seeds {', '.join(sorted(result['seeds']))}. {machine(seeds[-1])}"
    if "profile" in result:
        top = ", ".join(f"`{name}` {share:.0%}" for name, share in result["profile"].items())
        lines += ["", f"Where the processor time of a step goes: {top}."]
    return "\n".join(lines)


FACTS = {
    "data_wait": "Data wait {:.1%} of the time",
    "loader_cpu_share": "the loader {:.1%} of the processor time",
}


def ablation_table() -> str:
    """Mean over the seeds with the range, one line a search; then what is beyond the seeds."""
    result = load("ablation")
    runs: dict[str, list[dict[str, Any]]] = {m: list(r.values()) for m, r in result["runs"].items()}
    first = next(iter(runs.values()))
    columns = {
        f"{name.removesuffix(' teacher')}, {what}": {
            search: [row["knn"][name][what] for row in rows] for search, rows in runs.items()
        }
        for name in first[0]["knn"]
        if name.endswith(" teacher")
        for what in ("clean", "shifted")
    }
    ways = list(first[0]["pointing"]["joint"]["directions"])
    heads = [*columns, *(f"pointing {way} (control)" for way in ways)]
    lines = [f"| search | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for search, rows in runs.items():
        cells = [spread(values[search]) for values in columns.values()]
        for way in ways:
            blocks = [row["pointing"]["joint"]["directions"][way]["blocks"][0] for row in rows]
            own, control = (
                statistics.mean(b[k]["mean"] for b in blocks) for k in ("own", "random")
            )
            cells.append(f"{own:.2f} ({control:.2f})")
        lines.append(f"| {search} | {' | '.join(cells)} |")
    random = [name.replace(" teacher", " random") for name in first[0]["knn"] if "teacher" in name]
    cells = [
        spread([row["knn"][n][what] for row in first])
        for n in random
        for what in ("clean", "shifted")
    ]
    lines.append(f"| not trained | {' | '.join([*cells, *['-'] * len(ways)])} |")
    seeds = sorted(next(iter(result["runs"].values())))
    text = f"{result['steps']} steps, seeds {', '.join(seeds)}, kNN k = {K}, pointing in block 1."
    return "\n".join([*lines, "", f"{text} {beyond_the_seeds(columns)} {machine(result)}"])


def beyond_the_seeds(columns: dict[str, dict[str, list[float]]]) -> str:
    """Which differences of means are larger than the range of either search over its seeds, and
    which have one sign in every seed (whose runs start from the same weights)."""
    large, alike, count = [], [], 0
    for pair in combinations(next(iter(columns.values())), 2):
        for name, values in columns.items():
            a, b = (values[search] for search in pair)
            each = [x - y for x, y in zip(a, b, strict=True)]
            mean, count = statistics.mean(each), count + 1
            said = f"{pair[0]} against {pair[1]} {mean:+.1f} ({name})"
            large += [said] if abs(mean) > max(max(x) - min(x) for x in (a, b)) else []
            alike += [said] if min(each) > 0 or max(each) < 0 else []
    return (
        f"Larger than the range of either search over its seeds: {'; '.join(large) or 'none'} of "
        f"{count} differences of two searches. Of one sign in every seed: "
        f"{'; '.join(alike) or 'none'}; by chance it would be {count * 2 ** (1 - len(each)):.0f}."
    )


def alarms_table() -> str:
    """Lowest and highest end value over heads, and over the healthy seeds; the alarms raised."""
    result = load("alarms")
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, row in result["runs"].items():
        groups.setdefault("healthy" if name.startswith("healthy") else name, []).append(row)
    names = sorted(groups, key=lambda name: name != "healthy")
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for prefix in DIAGNOSTICS:
        cells = []
        for name in names:
            ends = [end for row in groups[name] for end in row["end"].items()]
            values = [value for key, value in ends if key.startswith(prefix)]
            cells.append(f"{min(values):.2g} to {max(values):.2g}")
        lines.append(f"| `{prefix}*` | {' | '.join(cells)} |")
    raised = [{e["alarm"]: 0 for row in groups[name] for e in row["alarms"]} for name in names]
    lines.append("| alarms | " + " | ".join(", ".join(each) or "none" for each in raised) + " |")
    seeds = len(groups["healthy"])
    text = f"Medians over the last 100 of {result['steps']} steps, {seeds} healthy seeds."
    return "\n".join([*lines, "", f"{text} {machine(result)}"])


DIAGNOSTICS = ["self_", "teacher_entropy_", "student_entropy_", "kl_"]
DIAGNOSTICS += ["prototypes_used_", "center_norm_", "feature_std_"]


def watch_sentence() -> str:
    result = load("watch")
    low, high = result["share_95"]
    return (
        f"That flag and the diagnostics take {result['share']:.1%} of the demo's step "
        f"(95 % interval {low:.1%} to {high:.1%}, `python bench/watch.py`): "
        f"{result['plain_more_s'] * 1e3:.1f} ms of {result['watched_s'] * 1e3:.0f}, and "
        f"{result['logged_more_s'] * 1e3:.1f} ms in the one of {result['steps_per_interval']} that "
        f"is logged; steps that the system interrupted do not count. {measured(result)}"
    )
