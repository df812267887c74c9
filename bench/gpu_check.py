"""What the fused operators must do on a device, checked without pytest.

    python bench/gpu_check.py [--device cuda] [--backends cuda,triton] [--only NAME,NAME] [--small]
                              [--jobs 8] [--json FILE]

Every check is a function of a backend; each runs, whatever the ones before it did, and the exit
status says whether all passed. Those in `bench/gpu_stream.py` and each module's ON_GPU need a GPU:
they are left out, and named, for --device cpu. --small takes few and short rows, for slow machines,
compute-sanitizer and Triton's interpreter. --jobs runs the checks in so many processes side by
side, those that compile for long a dtype at a time: compilers need processors, the GPU has time.
"""

import argparse
import io
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench import augment_gpu, batch_norm_gpu, gpu_linear, gpu_search, gpu_stream
from bench.baseline.losses import DINOLoss as Official
from bench.timing import machine, write_json
from mokd_fast.interop.dino import DINOLoss
from mokd_fast.ops import Target, cross_view_pairs, distill_cross_entropy, matched_pairs
from mokd_fast.ops import weight_norm as normalized
from mokd_fast.ops.dispatch import ENVIRONMENT

# V, T, B, K: below, at and off the kernels' tiles and 16-byte loads; then the sizes of training.
SMALL = [(3, 2, 2, 97), (2, 1, 3, 263), (4, 3, 1, 1032)]
FULL = [*SMALL, (18, 8, 2, 4097), (2, 16, 2, 1000), (10, 2, 1, 262144), (10, 2, 3, 65537)]
FULL += [(10, 2, 4, 65536), (10, 2, 64, 65536)]


@dataclass(frozen=True)
class Where:
    """The backend under test, where it runs, and how much is asked of it."""

    backend: str
    device: str
    small: bool
    only: torch.dtype | None = None

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        return SMALL if self.small else FULL

    @property
    def dtypes(self) -> list[torch.dtype]:
        if self.only is not None:
            return [self.only]
        if self.backend != "triton":
            return [torch.float32, torch.bfloat16, torch.float16, torch.float64]
        interpreted = self.device == "cpu"  # where bf16 is cut off, not rounded as by a GPU
        return [torch.float32, torch.float16, *([] if interpreted else [torch.bfloat16])]

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 0.2) -> Tensor:
        """Flat enough, at a temperature of 0.1, that every column counts in what comes out."""
        return (torch.randn(*shape, device=self.device) * scale).to(dtype)

    @contextmanager
    def forcing(self, backend: str) -> Iterator[None]:
        """Another one for calls that take it from the environment."""
        os.environ[ENVIRONMENT] = backend
        try:
            yield
        finally:
            os.environ[ENVIRONMENT] = self.backend

    def run(self, student: Tensor, *targets: Target, backend: str = "", **options: Any) -> list:
        """Loss, terms and gradient."""
        leaf = student.detach().requires_grad_()
        loss, terms = distill_cross_entropy(
            leaf, targets, backend=backend or self.backend, **options
        )
        return [loss.detach(), terms, *torch.autograd.grad(loss, leaf)]

    def dino(
        self, v: int, t: int, b: int, k: int, dtype: torch.dtype = torch.float32, scale: float = 0.2
    ) -> tuple[Tensor, Target]:
        """Student logits [V, B, K] and a target with a centre."""
        student, teacher = (self.randn(n, b, k, dtype=dtype, scale=scale) for n in (v, t))
        return student, Target(cross_view_pairs(t, v), teacher, None, 0.05, self.randn(k))


def wide(target: Target) -> Target:
    tensors = {n: getattr(target, n) for n in ("logits", "probs", "center", "row_weight")}
    return replace(target, **{n: x.double() for n, x in tensors.items() if x is not None})


def agree(at: Where, student: Tensor, *targets: Target) -> list[Tensor]:
    """Against float64, no error is larger than the reference's in the same dtype, up to 1e-6 of
    the largest value (1e-12 in fp64)."""
    exact = at.run(student.double(), *map(wide, targets), backend="reference")
    rough, mine = at.run(student, *targets, backend="reference"), at.run(student, *targets)
    tolerance = 1e-12 if student.dtype == torch.float64 else 1e-6
    for name, m, r, e in zip(("loss", "terms", "gradient"), mine, rough, exact, strict=True):
        error, allowed, top = (m - e).abs().max(), (r - e).abs().max(), e.abs().max()
        assert top.isfinite() and m.dtype == r.dtype
        assert error <= allowed + tolerance * top, (
            f"{name} of {student.dtype} {list(student.shape)}: error {error:.3g}, "
            f"the reference's {allowed:.3g}, largest value {top:.3g}"
        )
    return mine


def values(at: Where) -> None:
    for dtype in at.dtypes:
        for shape in at.shapes:
            for scale in (0.2, 3.0):  # flat, and a peak a row
                agree(at, *at.dino(*shape, dtype, scale))


def targets(at: Where) -> None:
    """MOKD's call (self, cross, search) and more: weights, row weights, given probabilities."""
    v, t, b, k = at.shapes[-1]
    for dtype in at.dtypes:
        student, own = at.dino(v, t, b, k, dtype)
        other = replace(own, logits=at.randn(t, b, k, dtype=dtype), center=None, weight=0.1)
        searched = at.randn(v - 1, b, k, dtype=dtype)
        search = Target(matched_pairs(v, 1), searched, None, 0.04, None, -2.0)
        probs = 0.7 * at.randn(1, b, k).softmax(-1)  # need not sum to 1
        row = at.randn(b).abs()
        agree(at, student, own, other, search, Target(((0.5,) * v,), probs=probs, row_weight=row))


def strides(at: Where) -> None:
    student, target = at.dino(4, 2, 3, 515)
    expected = at.run(student, target)
    shifted = at.randn(student.numel() + 1)[1:].view(student.shape).copy_(student)  # 4 bytes off
    columns = student.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    sliced = torch.cat([student, student], -1)[..., :515]
    for moved in (shifted, columns, sliced):
        torch.testing.assert_close(at.run(moved, target), expected)
    one = replace(target, logits=target.logits[:, :1].expand(2, 3, 515))
    copy = replace(one, logits=one.logits.contiguous())
    torch.testing.assert_close(at.run(student, one), at.run(student, copy))


def extremes(at: Where) -> None:
    student, target = at.dino(3, 2, 2, 1032)
    for offset in (1e4, -1e4):
        gradient = agree(at, student + offset, target)[2]
        assert gradient.double().sum(-1).abs().max() <= 1e-5 * gradient.abs().max()
    target.logits[..., :512] = -torch.inf  # probability 0, over whole tiles
    assert (agree(at, student, target)[2][..., :512] >= 0).all()
    student[2, 1, 700] = torch.nan
    loss, _, gradient = at.run(student, target)
    assert loss.isnan() and gradient[2, 1].isnan().any() and gradient[:, 0].isfinite().all()
    empty, none = at.dino(3, 2, 0, 97)
    loss, _, gradient = at.run(empty, none)
    assert loss == 0 and gradient.shape == (3, 0, 97)


def repeats(at: Where) -> None:
    student, target = at.dino(*at.shapes[-1])
    first = at.run(student, target)
    assert all(map(torch.equal, first, at.run(student, target)))


def scaled(at: Where) -> None:
    """A factor as a GradScaler's reaches the kernel, with a stride of 0: rounded once, to fp16."""
    student, target = at.dino(*at.shapes[-1], torch.float16)
    exact = at.run(student.double(), wide(target), backend="reference")[2] * 4096
    leaf = student.requires_grad_()
    loss = distill_cross_entropy(leaf, [target], backend=at.backend)[0]
    (loss.expand(4).sum() * 1024).backward()
    error = (leaf.grad.double() - exact).abs()
    assert (error <= 2**-10 * exact.abs() + 1e-6 * exact.abs().max()).all()


def drop_in(at: Where) -> None:
    """The DINO loss with its centre, two steps under autocast, against the official loop."""
    v, t, b, k = 10, 2, 2, 97 if at.small else 65536
    mine, official = DINOLoss(k, v, 0.04, 0.04, 0, 1), Official(k, v, [0.04])
    mine, official = mine.to(at.device), official.to(at.device)
    for _ in range(2):
        student, teacher = at.randn(v * b, k).requires_grad_(), at.randn(t * b, k)
        with torch.autocast(at.device, torch.bfloat16):
            loss = mine(student, teacher, 0)
        expected = official(student, teacher, 0)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        grads = [torch.autograd.grad(x, student)[0] for x in (loss, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6 * grads[1].abs().max().item())
        torch.testing.assert_close(mine.center, official.center, rtol=1e-5, atol=1e-6)


def compiled(at: Where) -> None:
    """Whole, and once for temperatures and weights that change; by inductor on a GPU."""
    student, target = at.dino(3, 2, 2, 97)
    leaf = student.requires_grad_()

    def loss(leaf: Tensor, tau: Tensor) -> Tensor:
        changed = replace(target, temperature=tau, weight=3 * tau)
        return distill_cross_entropy(leaf, [changed], temperature=2 * tau, backend=at.backend)[0]

    name = "aot_eager" if at.device == "cpu" else "inductor"
    counter = CompileCounterWithBackend(name)
    whole = torch.compile(loss, backend=counter, fullgraph=True)
    for number in (0.04, 0.05, 0.07):
        tau = torch.tensor(number, device=at.device)
        grads = [torch.autograd.grad(f(leaf, tau), leaf)[0] for f in (whole, loss)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


def weight_norm(at: Where) -> None:
    """Matrix and gradients, by the rule of `agree`, the same bits twice and of any strides; a row
    of zeros is NaN, alone."""

    def run(*call: Any, backend: str = at.backend) -> list[Tensor]:
        *tensors, grad, dtype = call
        leaves = [t.detach().requires_grad_() for t in tensors]
        with at.forcing(backend):
            w = normalized(*leaves, dtype)
        return [w.detach(), *torch.autograd.grad(w, leaves, grad)]

    for dtype in (dtype for dtype in at.dtypes if dtype.itemsize == 2):
        for k, d in [(7, 97), (1000, 384), *([] if at.small else [(65536, 256)])]:
            v, g, grad = at.randn(k, d), at.randn(k, 1) + 1, at.randn(k, d, dtype=dtype)
            exact = run(v.double(), g.double(), grad.double(), torch.float64, backend="reference")
            rough, mine = run(v, g, grad, dtype, backend="reference"), run(v, g, grad, dtype)
            for name, m, r, e in zip(("matrix", "dv", "dg"), mine, rough, exact, strict=True):
                error, allowed, top = (m - e).abs().max(), (r - e).abs().max(), e.abs().max()
                assert top.isfinite() and m.dtype == r.dtype and m.shape == r.shape
                assert error <= allowed + 1e-6 * top, (
                    f"{name} of {dtype} {[k, d]}: error {error:.3g}, the reference's "
                    f"{allowed:.3g}, largest value {top:.3g}"
                )
            moved = v.t().contiguous().t(), g, grad.t().contiguous().t()
            for again in (run(v, g, grad, dtype), run(*moved, dtype)):
                assert all(map(torch.equal, mine, again))
            v[k - 1] = 0
            for m, before in zip(run(v, g, grad, dtype), mine, strict=True):
                assert m[k - 1].isnan().all() and torch.equal(m[: k - 1], before[: k - 1])


Check = Callable[[Where], None]
Keep = Callable[[Check, Where, bool], None]
CHECKS: tuple[Check, ...] = (values, targets, strides, extremes, repeats, scaled, drop_in, compiled)
# Operators without CUDA C++.
NO_CUDA: tuple[Check, ...] = (augment_gpu.augmented, batch_norm_gpu.normalised, weight_norm)
CHECKS += (*gpu_linear.CHECKS, *gpu_search.CHECKS, *NO_CUDA)
ON_GPU: tuple[Check, ...] = gpu_stream.CHECKS + gpu_linear.ON_GPU + gpu_search.ON_GPU
KNOWN = {check.__name__: check for check in (*CHECKS, *ON_GPU)}
# A loop over dtypes each, the ones that Triton compiles longest for first.
LONG: tuple[Check, ...] = (gpu_search.search, augment_gpu.augmented, values, gpu_linear.linear)
LONG += (targets,)


def passes(check: Check, at: Where) -> bool:
    os.environ[ENVIRONMENT] = at.backend  # for the drop-in loss and the T-Heads
    torch.manual_seed(0)
    begin, error = time.perf_counter(), ""
    try:
        check(at)
    except Exception:  # the next check still runs
        error = traceback.format_exc()
    seconds = time.perf_counter() - begin
    name = " ".join(filter(None, (at.backend, check.__name__, name_of(at.only))))
    print(f"{'FAIL' if error else 'ok  '} {name} {seconds:.1f} s\n{error}", end="", flush=True)
    return not error


def heard(name: str, at: Where) -> tuple[bool, str]:
    """`passes`, in a process of `side_by_side`, with all that was printed."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        passed = passes(KNOWN[name], at)
    return passed, said.getvalue()


def pieces(pairs: list[tuple[Check, Where]]) -> list[tuple[Check, Where]]:
    """The same checks, the long ones a dtype at a time and first."""
    found = []
    for check, at in pairs:
        dtypes = at.dtypes if check in LONG else [None]
        found += [(check, replace(at, only=dtype)) for dtype in dtypes]
    place = {check: i for i, check in enumerate(LONG)}
    return sorted(found, key=lambda p: (p[1].backend != "triton", place.get(p[0], len(LONG))))


def side_by_side(pairs: list[tuple[Check, Where]], jobs: int, keep: Keep) -> None:
    """`passes` of each by `jobs` processes. What a check prints comes when it is over; where its
    process dies it has failed, and another process takes the next one."""
    waiting, lock, jobs = iter(pairs), threading.Lock(), min(jobs, len(pairs))
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def process() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,))

    def worker() -> None:
        pool = process()
        while True:
            with lock:
                part = next(waiting, None)
            if part is None:
                return pool.shutdown()
            check, at = part
            try:
                passed, said = pool.submit(heard, check.__name__, at).result()
            except Exception as error:  # of the process: those of a check are in what it said
                passed, said = False, f"FAIL {at.backend} {check.__name__}: {error}\n"
                pool.shutdown()
                pool = process()
            with lock:
                print(said, end="", flush=True)
                keep(check, at, passed)

    with ThreadPoolExecutor(jobs) as workers:
        for ended in [workers.submit(worker) for _ in range(jobs)]:
            ended.result()


class Results:
    """One row a check, in a file from the start: `passed` is None until it has run."""

    def __init__(self, pairs: list[tuple[Check, Where]], path: Path | None) -> None:
        self.path, self.machine = path, machine()
        self.rows: dict[tuple[Check, Where], dict[str, Any]] = {
            (check, at): {"check": check.__name__, "backend": at.backend, "dtype": name_of(at.only),
                          "small": at.small, "passed": None}
            for check, at in pairs
        }  # fmt: skip
        self.write()

    def keep(self, check: Check, at: Where, passed: bool) -> None:
        self.rows[check, at]["passed"] = passed
        self.write()

    def write(self) -> None:
        if self.path:
            write_json(self.path, {"machine": self.machine, "rows": list(self.rows.values())})


def name_of(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backends", default="cuda,triton", type=lambda x: x.split(","))
    parser.add_argument("--only", default=[], type=lambda x: x.split(","), help="names of checks")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := set(options.only) - KNOWN.keys():
        parser.error(f"no check {', '.join(sorted(unknown))}; there are {', '.join(KNOWN)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: --device cpu checks what needs none")
    chosen = [check for name, check in KNOWN.items() if not options.only or name in options.only]
    if options.device == "cpu":
        print("need a GPU and are left out:", *(c.__name__ for c in chosen if c in ON_GPU))
        chosen = [check for check in chosen if check not in ON_GPU]
    at = [Where(backend, options.device, options.small) for backend in options.backends]
    pairs = [(check, where) for where in at for check in chosen]
    pairs = [(c, w) for c, w in pairs if c not in NO_CUDA or w.backend != "cuda"]
    pairs = pieces(pairs) if options.jobs > 1 else pairs
    results = Results(pairs, options.json)
    if options.jobs > 1:
        side_by_side(pairs, options.jobs, results.keep)
    else:
        for check, where in pairs:
            results.keep(check, where, passes(check, where))
    passed = [row["passed"] for row in results.rows.values()]
    print(f"{sum(passed)} of {len(passed)} checks passed")
    sys.exit(0 if passed and all(passed) else 1)


if __name__ == "__main__":
    main()
