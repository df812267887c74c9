"""linear_distill_cross_entropy: prototypes and loss, forward + backward, time and peak memory.

    python bench/linear_distill.py [--quick] [--parts] [--default-malloc] [--json FILE]

From features [V, B, D] and prototypes [K, D] of a student and a teacher to the loss and the
gradients dX and dW, against linear layers with: the official loop (bench/baseline), lightly's loss,
torch.compile of both, our fused loss on stored logits (`stored`), PyTorch's own
`linear_cross_entropy` with soft targets, and Liger's chunked distillation (lightly and Liger where
they are installed). No centre moves in any of them. Before anything is timed, every form's loss and
gradients are compared with the official's.

`extra` is the peak beyond inputs and the gradients of features and prototypes: of what is freed
again, the most that there is at one time. autocast: fp32
features and prototypes, products in bf16.
"""

import argparse
import gc
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.distill import T, V, official_loop
from bench.timing import calibrate, extra_bytes, interleave, keep_memory, machine, write_json
from mokd_fast.ops import (
    LinearTarget,
    Target,
    cross_view_pairs,
    distill_cross_entropy,
    linear_distill_cross_entropy,
    onednn,
)
from mokd_fast.ops.dispatch import pick
from mokd_fast.ops.linear_chunks import chunk_size

K, D = 65536, 256
TAU, CENTER = 0.04, 0.1  # teacher temperature; every entry of the centre
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
PRODUCTS = {**KINDS, "autocast": torch.bfloat16}
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x [V,B,D], w, h [T,B,D], w_t -> loss


def ours(x: Tensor, w: Tensor, h: Tensor, wt: Tensor, chunk: int | None = None) -> Tensor:
    target = LinearTarget(cross_view_pairs(T, len(x)), h, wt, TAU, w.new_full((len(w),), CENTER))
    return linear_distill_cross_entropy(x, w, [target], chunk=chunk)[0]


def stored(x: Tensor, w: Tensor, h: Tensor, wt: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(h, wt)
    center = w.new_full((len(w),), CENTER)
    target = Target(cross_view_pairs(T, len(x)), teacher, None, TAU, center)
    return distill_cross_entropy(F.linear(x, w), [target])[0]


def official(x: Tensor, w: Tensor, h: Tensor, wt: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(h, wt)
    return official_loop(len(w), CENTER, w.device)(F.linear(x, w), teacher)


def soft_targets(x: Tensor, w: Tensor, h: Tensor, wt: Tensor) -> Tensor:
    """PyTorch's chunked linear_cross_entropy: it wants the targets Q of every view stored."""
    with torch.no_grad():
        q = ((F.linear(h, wt).float() - CENTER) / TAU).softmax(-1)
        pairs = torch.tensor(cross_view_pairs(T, len(x)))
        mixed = torch.einsum("tv,tbk->vbk", pairs, q).flatten(0, 1)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    rows, weight = (x / 0.1).flatten(0, 1).to(dtype), w.to(dtype)
    options = torch.nn.LinearCrossEntropyOptions()
    with torch.autocast("cpu", enabled=False):
        total = F.linear_cross_entropy(
            rows, weight, mixed.to(dtype), reduction="sum", options=options
        )
    return total / x.shape[1]


def lightly() -> Form:
    from lightly.loss import DINOLoss

    def run(x: Tensor, w: Tensor, h: Tensor, wt: Tensor) -> Tensor:
        loss = DINOLoss(output_dim=len(w), teacher_temp=TAU, warmup_teacher_temp=TAU)
        loss.center.fill_(CENTER)
        loss.update_center = lambda teacher: None  # type: ignore[method-assign, assignment]
        with torch.no_grad():
            teacher = F.linear(h, wt)
        return loss(list(teacher.unbind()), list(F.linear(x, w).unbind()), TAU)

    return run


def liger() -> Form:
    """Liger takes one teacher row for each student row: a row for every pair of views."""
    from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase

    class Pairs(LigerFusedLinearDistillationBase):
        @staticmethod
        def distillation_loss_fn(student: Tensor, teacher: Tensor, **unused: Any) -> Tensor:
            q = ((teacher.float() - CENTER) / TAU).softmax(-1)
            return -(q * (student.float() / 0.1).log_softmax(-1)).sum()

        @classmethod
        def forward(cls, ctx: Any, *args: Any) -> Any:  # eager: compiled it takes no longer rows
            rows = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "compiled": False}
            return LigerFusedLinearDistillationBase.forward(cls, ctx, *args, chunk_size=64, **rows)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return *LigerFusedLinearDistillationBase.backward(ctx, grad)[:2], None, None, None

    def run(x: Tensor, w: Tensor, h: Tensor, wt: Tensor) -> Tensor:
        pairs = [(t, v) for t in range(T) for v in range(len(x)) if t != v]
        students = torch.cat([x[v] for _, v in pairs])
        teachers = torch.cat([h[t] for t, _ in pairs])
        labels = torch.zeros(len(students), dtype=torch.long)
        return Pairs.apply(students, w, teachers, wt, labels)  # type: ignore[no-any-return]

    return run


def forms() -> dict[str, Form]:
    found: dict[str, Form] = {"ours": ours, "stored": stored, "official": official}
    for name, make in (("lightly", lightly), ("Liger", liger)):
        try:
            found[name] = make()
        except ImportError:
            print(f"{name} is not installed: its form is left out")
    for name in ("official", "lightly"):
        if name in found:
            found[f"{name}, compiled"] = torch.compile(found[name], dynamic=False)
    found["linear_cross_entropy"] = soft_targets
    return found


def tensors(kind: str, images: int, columns: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    unit = lambda *shape: F.normalize(torch.randn(*shape), dim=-1).to(KINDS[kind])  # noqa: E731
    x, w = unit(V, images, D).requires_grad_(), unit(columns, D).requires_grad_()
    return x, w, unit(T, images, D), unit(columns, D)


def step(form: Form, kind: str, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        inputs[0].grad = inputs[1].grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "float32"):
            loss = form(*inputs)
        loss.backward()
        return loss.detach()

    return run


def agree(runs: dict[str, Callable[[], Tensor]], inputs: Sequence[Tensor], kind: str) -> None:
    """Every form computes the official loss and its gradients."""
    x, w = inputs[:2]
    tolerance = 1e-4 if kind == "float32" else 3e-2
    want = float(runs["official"]()), x.grad, w.grad
    for name, run in runs.items():
        loss = float(run())
        assert abs(loss - want[0]) <= tolerance * want[0], (name, loss, want[0])
        for have, good in zip((x.grad, w.grad), want[1:], strict=True):
            error = (have.float() - good.float()).norm() / good.float().norm()
            assert error <= tolerance, (name, kind, float(error))


def extra(run: Callable[[], Any], inputs: Sequence[Tensor]) -> int:
    inputs[0].grad = inputs[1].grad = None
    gc.collect()
    return extra_bytes(run)


def compare(kind: str, images: int, columns: int, chosen: dict[str, Form], rounds: int) -> list:
    inputs = tensors(kind, images, columns)
    torch._dynamo.reset()
    runs = {name: step(form, kind, inputs) for name, form in chosen.items()}
    agree(runs, inputs, kind)
    times = interleave(runs, rounds)
    extra_of = {name: extra(run, inputs) for name, run in runs.items()}
    common = {
        **about(kind, images, columns),
        "median_s": times["ours"],
        "extra_bytes": extra_of["ours"],
        "discarded_rounds": times.discarded,
    }
    rows = [
        {
            **common,
            "baseline": name,
            "baseline_s": times[name],
            "ratio": times[name] / times["ours"],
            "baseline_extra_bytes": extra_of[name],
        }
        for name in runs
        if name != "ours"
    ]
    report(rows)
    return rows


def about(kind: str, images: int, columns: int) -> dict[str, Any]:
    x, w, h, wt = (t.detach()[:1] for t in tensors(kind, 1, 1))
    features = torch.empty(V, images, D, device="meta")
    target = LinearTarget(((1.0,),), h, wt)
    return {
        "op": "linear_distill_cross_entropy",
        "backend": pick("linear_distill_cross_entropy", x, w, [target], 0.1, None).name,
        "dtype": kind,
        "shape": {"V": V, "T": T, "B": images, "K": columns, "D": D},
        "chunk": chunk_size(features, (V + T) * images, PRODUCTS[kind]),
    }


def chunks(kind: str, images: int) -> dict[str, Any]:
    """Seconds and extra bytes for chunks of so many columns."""
    inputs = tensors(kind, images, K)
    columns = [1024 << i for i in range(7)]
    runs = {str(n): step(partial(ours, chunk=n), kind, inputs) for n in columns}
    times = interleave(runs, 5)
    row = {
        **about(kind, images, K),
        "seconds": {name: times[name] for name in runs},
        "extra": {name: extra(run, inputs) for name, run in runs.items()},
    }
    cells = (f"{n}: {times[n] * 1e3:.1f} ms, {row['extra'][n] / 2**20:.1f} MiB" for n in runs)
    print(f"{kind} B={images}, chunks of {'; '.join(cells)}", flush=True)
    return row


def parts() -> dict[str, Any]:
    """Seconds of what the package leaves to PyTorch: oneDNN's linear layer against F.linear, in
    the shapes of a chunk and of a T-Head's layer, and weight_norm against copies of its matrix."""
    shapes = {"chunk": (V * 16, D, 4096), "512 tokens": (512, 384, 1536),
              "1600 tokens": (1600, 384, 1536)}  # fmt: skip
    layers = {name: (torch.randn(n, d), torch.randn(o, d)) for name, (n, d, o) in shapes.items()}
    runs: dict[str, Callable[[], Any]] = {}
    for name, arguments in layers.items():
        runs[f"{name}, F.linear"] = partial(F.linear, *arguments)
        runs[f"{name}, oneDNN"] = partial(onednn.linear, *arguments)
    v, grad, place = torch.randn(K, D, requires_grad=True), torch.randn(K, D), torch.empty(K, D)
    runs["copy of the prototypes"] = partial(place.copy_, grad)

    def normed(backward: bool) -> None:
        v.grad = None
        with torch.set_grad_enabled(backward):
            w = torch._weight_norm(v, v.new_ones(K, 1), 0)
        if backward:
            w.backward(grad)

    runs["weight_norm"] = partial(normed, False)
    runs["weight_norm with backward"] = partial(normed, True)
    with torch.no_grad():
        times = interleave(runs, 21)
    print(*(f"{name}: {times[name] * 1e3:.2f} ms" for name in runs), sep="\n")
    return {name: times[name] for name in runs}


# Where stored logits no longer fit: a machine of LIMIT bytes of address space, one run a process.
LIMIT, FAR = 8 << 30, {"images": 192, "columns": 262144}


def beyond() -> list[dict[str, Any]]:
    rows = []
    for name in ("ours", "stored", "official"):
        command = [sys.executable, __file__, "--alone", name]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        fits = found.returncode == 0
        assert fits or "allocate" in found.stderr or "Memory" in found.stderr, found.stderr
        seconds = float(found.stdout.split()[-1]) if fits else None
        rows.append({**about("float32", **FAR), "form": name, "limit_bytes": LIMIT,
                     "seconds": seconds})  # fmt: skip
        print(f"{name} at B={FAR['images']}, K={FAR['columns']} within {LIMIT >> 30} GiB: "
              + (f"{seconds:.1f} s" if fits else "out of memory"), flush=True)  # fmt: skip
    return rows


def alone(name: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    form = {"ours": ours, "stored": stored, "official": official}[name]
    run = step(form, "float32", tensors("float32", **FAR))
    print(interleave({name: run}, 1)[name])


def report(rows: list[dict[str, Any]]) -> None:
    row = rows[0]
    shape = row["shape"]
    print(
        f"{row['dtype']} B={shape['B']} K={shape['K']} {row['backend']}, chunks of {row['chunk']}: "
        f"{row['median_s'] * 1e3:.1f} ms, {row['extra_bytes'] / 2**20:.1f} MiB extra; "
        f"{row['discarded_rounds']} rounds discarded"
    )
    for other in rows:
        print(
            f"  time {row['median_s'] / other['baseline_s']:.2f} of {other['baseline']}'s "
            f"({other['baseline_s'] * 1e3:.1f} ms), memory "
            f"1/{other['baseline_extra_bytes'] / row['extra_bytes']:.1f} "
            f"({other['baseline_extra_bytes'] / 2**20:.1f} MiB)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one batch size, no growth")
    parser.add_argument("--default-malloc", action="store_true", help="see timing.keep_memory")
    parser.add_argument("--parts", action="store_true", help="only what PyTorch does of it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.default_malloc:
        keep_memory()
    if options.alone:
        return alone(options.alone)
    result: dict[str, Any] = {"machine": machine(), "calibration": calibrate(), "rows": []}
    result["malloc"] = "default" if options.default_malloc else "keeps freed memory"
    print(result["machine"], result["calibration"], sep="\n")
    if options.parts:
        result["rows"] = parts()
        return write_json(options.json, result) if options.json else None
    every, rounds = forms(), 3 if options.quick else 7
    for kind in KINDS:
        for images in (4,) if options.quick else (4, 16, 32):
            result["rows"] += compare(kind, images, K, every, rounds)
            if options.json:
                write_json(options.json, result)
    if not options.quick:
        few = {name: every[name] for name in ("ours", "stored", "official")}
        result["growth"] = []
        for columns in (4096, 16384, 65536, 262144):
            result["growth"] += compare("float32", 16, columns, few, 3)
        result["chunks"] = [chunks(kind, 16) for kind in KINDS]
        result["beyond"] = beyond()
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
