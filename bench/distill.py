"""distill_cross_entropy, forward + backward, on the CPU, against the forms in use elsewhere.

    python bench/distill.py [--quick] [--default-malloc] [--json FILE]

What is compared is a whole DINO loss with its centre: ours is the drop-in `interop.dino.DINOLoss`,
the others are the official loop (bench/baseline), lightly's (from PyPI, where installed) and
torch.compile of both. The operator alone is set against the official loop alone (`loop_ratio`: no
centre moves on either side) and against the memory floor, the (2 (V + T) + V) B K numbers that two
passes must move, at the copy rate of the same rounds. `alive` is what is kept between forward and
backward, the student's logits included. On a GPU: bench/distill_gpu.py.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.baseline.official import DINOLoss as Official
from bench.timing import calibrate, interleave, keep_memory, machine, peak_bytes, write_json
from mokd_fast.interop.dino import DINOLoss
from mokd_fast.ops import Target, cross_view_pairs, distill_cross_entropy, matched_pairs
from mokd_fast.ops import distill as ops_distill
from mokd_fast.ops.dispatch import pick

V, T, K = 10, 2, 65536
ODD = (65535, 65537, 65541)  # no row but the first starts on a cache line
CALLS = 3  # in a row, see `interleave`
Form = Callable[[Tensor, Tensor], Tensor]  # student [V, B, K], teacher [T, B, K] -> loss


def logits(rows: int, images: int, columns: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, images, columns) * 3).to(dtype)


def operator(views: int, columns: int) -> Form:
    pairs, center = cross_view_pairs(T, views), torch.zeros(columns)

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        target = Target(pairs, teacher, temperature=0.04, center=center)
        return distill_cross_entropy(student, [target])[0]

    return run


def official_loop(columns: int, center: float = 0.0, device: Any = "cpu") -> Form:
    """The official loss without the update of its centre."""
    with torch.device(device):
        loss = Official(columns, V, [0.04])
    loss.center.fill_(center)
    loss.update_center = lambda teacher: None  # type: ignore[method-assign, assignment]
    return lambda s, t: loss(s.flatten(0, 1), t.flatten(0, 1), 0)


def forms() -> dict[str, Form]:
    """The losses as their users call them: logits of one type, softmax in fp32 by autocast."""
    ours = DINOLoss(K, V, 0.04, 0.04, 0, 1)
    official = Official(K, V, [0.04])
    found: dict[str, Form] = {
        "ours": lambda s, t: ours(s.flatten(0, 1), t.flatten(0, 1), 0),
        "official": lambda s, t: official(s.flatten(0, 1), t.flatten(0, 1), 0),
    }
    try:
        from lightly.loss import DINOLoss as Lightly
    except ImportError:
        print("lightly is not installed (pip install lightly): its form is left out")
    else:
        lightly = Lightly(output_dim=K, teacher_temp=0.04, warmup_teacher_temp=0.04)
        found["lightly"] = lambda s, t: lightly(list(t.unbind()), list(s.unbind()), 0.04)
    return found


def step(form: Form, student: Tensor, teacher: Tensor) -> Callable[[], None]:
    def run() -> None:
        student.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=student.dtype == torch.bfloat16):
            loss = form(student, teacher)
        loss.backward()

    return run


def alive(form: Form, student: Tensor, teacher: Tensor) -> int:
    """Bytes that autograd keeps for backward, every storage once, with the student's logits."""
    kept = {student.untyped_storage().data_ptr(): student.untyped_storage().nbytes()}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step(form, student, teacher)()
    return sum(kept.values())


def copy_rate(numbers: int = 1 << 25) -> tuple[Callable[[], Any], int]:
    """A copy beyond any cache, and the bytes it moves."""
    x = torch.zeros(numbers)
    y = torch.zeros(numbers)
    return lambda: y.copy_(x), 2 * 4 * numbers


def floor_bytes(views: int, images: int, columns: int, dtype: torch.dtype) -> int:
    return (2 * (views + T) + views) * images * columns * dtype.itemsize


def compare(dtype: torch.dtype, images: int, rounds: int) -> list[dict[str, Any]]:
    """Ours against each baseline at V, T, K."""
    student, teacher = logits(V, images, K, dtype).requires_grad_(), logits(T, images, K, dtype)
    known = forms()
    runs = {name: step(form, student, teacher) for name, form in known.items()}
    torch._dynamo.reset()
    for name in list(known)[1:]:
        known[f"{name}, compiled"] = torch.compile(known[name], dynamic=False)
        runs[f"{name}, compiled"] = step(known[f"{name}, compiled"], student, teacher)
    copy, moved = copy_rate()
    alone = {
        "copy": copy,
        "operator": step(operator(V, K), student, teacher),
        "loop": step(official_loop(K), student, teacher),
    }
    times = interleave({**alone, **runs}, rounds, CALLS)
    floor = floor_bytes(V, images, K, dtype) / (moved / times["copy"])
    kept = {name: alive(form, student, teacher) for name, form in known.items()}
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    common = {
        **about(dtype, images, V, K),
        "median_s": times["operator"],
        "floor_fraction": floor / times["operator"],
        "loop_ratio": times["loop"] / times["operator"],
        "drop_in_s": times["ours"],
        "alive_bytes": kept["ours"],
        "peak_bytes": peaks["ours"],
        "discarded_rounds": times.discarded,
    }
    return [
        {
            **common,
            "baseline": name,
            "baseline_s": times[name],
            "ratio": times[name] / times["ours"],
            "baseline_alive_bytes": kept[name],
            "baseline_peak_bytes": peaks[name],
        }
        for name in runs
        if name != "ours"
    ]


def about(dtype: torch.dtype, images: int, views: int, columns: int) -> dict[str, Any]:
    sample = logits(1, 1, 2, dtype).expand(views, 1, 2)
    target = Target(cross_view_pairs(T, views), logits(T, 1, 2, dtype))
    return {
        "op": "distill_cross_entropy",
        "backend": pick("distill_cross_entropy", sample, [target], 0.1).name,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {"V": views, "T": T, "B": images, "K": columns},
    }


def scaling(dtype: torch.dtype, shapes: list[tuple[int, int, int]], rounds: int) -> list[dict]:
    """The operator alone over (V, B, K): time a number of the student's logits."""
    rows = []
    for views, images, columns in shapes:
        student = logits(views, images, columns, dtype).requires_grad_()
        teacher = logits(T, images, columns, dtype)
        copy, moved = copy_rate()
        run = step(operator(views, columns), student, teacher)
        many = max(1, 2**22 // student.numel())  # a millisecond or more a turn

        def repeated(run: Callable[[], None] = run, many: int = many) -> None:
            for _ in range(many):
                run()

        times = interleave({"copy": copy, "operator": repeated}, rounds, CALLS)
        seconds = times["operator"] / many
        floor = floor_bytes(views, images, columns, dtype) / (moved / times["copy"])
        rows.append(
            {
                **about(dtype, images, views, columns),
                "median_s": seconds,
                "ns_per_logit": seconds / student.numel() * 1e9,
                "floor_fraction": floor / seconds,
                "discarded_rounds": times.discarded,
            }
        )
    return rows


def odd_columns(dtype: torch.dtype, images: int, rounds: int) -> dict[str, Any]:
    """The operator at odd K against K = 65536 in the same rounds: time a logit."""
    runs = {}
    for columns in (K, *ODD):
        student = logits(V, images, columns, dtype).requires_grad_()
        runs[str(columns)] = step(operator(V, columns), student, logits(T, images, columns, dtype))
    times = interleave(runs, rounds, CALLS)
    ratios = {k: times[k] / times[str(K)] * K / int(k) for k in map(str, ODD)}
    return {**about(dtype, images, V, K), "seconds": dict(times), "ratio_to_65536": ratios}


def combined(dtype: torch.dtype, images: int, rounds: int) -> dict[str, Any]:
    """MOKD's calls (self + cross, self + search, all three) against DINO's on the same student."""
    student = logits(V, images, K, dtype).requires_grad_()
    own, other, searched = (logits(n, images, K, dtype) for n in (T, T, V - T))
    center, every = torch.zeros(K), cross_view_pairs(T, V)
    targets = [
        Target(every, own, temperature=0.04, center=center),
        Target(every, other, temperature=0.04, center=center),
        Target(matched_pairs(V, T), searched, temperature=0.04),
    ]

    def loss(*chosen: int) -> Form:
        return lambda s, t: distill_cross_entropy(s, [targets[i] for i in chosen])[0]

    calls = {"dino": loss(0), "self+cross": loss(0, 1), "self+search": loss(0, 2)}
    calls["self+cross+search"] = loss(0, 1, 2)
    times = interleave(
        {name: step(form, student, own) for name, form in calls.items()}, rounds, CALLS
    )
    ratios = {name: seconds / times["dino"] for name, seconds in times.items()}
    ratios["a step"] = (ratios["self+cross"] + ratios["self+search"]) / 2  # one call a head
    return {**about(dtype, images, V, K), "seconds": dict(times), "ratio_to_dino": ratios}


def compute_bound(dtype: torch.dtype) -> float:
    """Seconds a student's logit takes when all lies in cache, the call's own cost taken off."""
    runs = {}
    for columns in (16, 16384):
        student = logits(V, 2, columns, dtype).requires_grad_()
        runs[str(columns)] = step(operator(V, columns), student, logits(T, 2, columns, dtype))
    times = interleave(runs, 100)
    return (times["16384"] - times["16"]) / (V * 2 * (16384 - 16))


def library_cost() -> float:
    """Seconds that torch.library adds to a call; ops/eager.py avoids it."""
    run = step(operator(V, 16), logits(V, 4, 16, torch.float32).requires_grad_(),
               logits(T, 4, 16, torch.float32))  # fmt: skip

    def through_library() -> None:
        with mock.patch.object(ops_distill, "plain", lambda arguments: False):
            run()

    times = interleave({"eager": run, "library": through_library}, 100)
    return times["library"] - times["eager"]


SHAPES = [(V, 16, k) for k in (1024, 8192, 65535, 65536, 65537, 65541, 262144)]
SHAPES += [(v, 16, K) for v in (2, 4, 18)] + [(V, b, K) for b in (1, 4, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one batch size, no tables")
    parser.add_argument("--default-malloc", action="store_true", help="see timing.keep_memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.default_malloc:
        keep_memory()
    rounds = 5 if options.quick else 11
    result: dict[str, Any] = {"machine": machine(), "calibration": calibrate(), "rows": []}
    result["malloc"] = "default" if options.default_malloc else "keeps freed memory"
    result["library_cost_s"] = library_cost()
    print(result["machine"], result["calibration"], sep="\n")
    print(f"torch.library would add {result['library_cost_s'] * 1e3:.2f} ms to a call")
    for dtype in (torch.float32, torch.bfloat16):
        bound = compute_bound(dtype)
        for images in (4,) if options.quick else (4, 8, 16, 32):
            rows = compare(dtype, images, rounds)
            for row in rows:
                row["compute_bound_s"] = bound * V * images * K
            result["rows"] += rows
            report(rows)
        if not options.quick:
            result.setdefault("combined", []).append(combined(dtype, 16, rounds))
            result.setdefault("scaling", []).extend(scaling(dtype, SHAPES, rounds))
            result.setdefault("odd_columns", []).append(odd_columns(dtype, 16, 2 * rounds))
            print(result["combined"][-1]["ratio_to_dino"])
            print("odd K against 65536:", result["odd_columns"][-1]["ratio_to_65536"])
            for row in result["scaling"]:
                print(row["dtype"], row["shape"], f"{row['ns_per_logit']:.3f} ns a logit, "
                      f"{row['floor_fraction']:.0%} of the floor")  # fmt: skip
        if options.json:
            write_json(options.json, result)


def report(rows: list[dict[str, Any]]) -> None:
    row, images = rows[0], rows[0]["shape"]["B"]
    mib = 2**20 * images
    print(
        f"{row['dtype']} B={images} {row['backend']}: operator {row['median_s'] * 1e3:.2f} ms, "
        f"{row['floor_fraction']:.0%} of the memory floor, compute bound "
        f"{row['compute_bound_s'] * 1e3:.2f} ms, {row['loop_ratio']:.1f}x the official loop alone; "
        f"{row['discarded_rounds']} rounds discarded"
    )
    print(f"  with centre {row['drop_in_s'] * 1e3:.2f} ms, alive {row['alive_bytes'] / mib:.3f}, "
          f"peak {row['peak_bytes'] / mib:.2f} MiB an image")  # fmt: skip
    for other in rows:
        print(
            f"  {other['ratio']:.1f}x {other['baseline']} ({other['baseline_s'] * 1e3:.1f} ms), "
            f"alive {other['baseline_alive_bytes'] / mib:.2f}, "
            f"peak {other['baseline_peak_bytes'] / mib:.2f} MiB an image"
        )


if __name__ == "__main__":
    main()
