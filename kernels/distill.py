"""distill_cross_entropy in Triton. Formula: mokd_fast/ops/distill.py.

    z_v = s_v / tau_s     u_t = (l_t - center_t) / tau_t     q_t = softmax(u_t)
    CE[t,v]   = log sum exp z_v - <q_t, z_v>
    dL/ds_v   = (n_v softmax(z_v) - sum_t c_tv q_t) / (tau_s B)
    c_tv      = pairs[t,v] * weight * row_weight     n_v = sum_t c_tv (times the mass of probs)

V student views, T teacher rows, B images, K prototypes (columns). Two streaming passes over
(image, tile of columns): forward reads (V + T) B K logits, backward reads them again and writes
V B K. A program loads the teacher tiles once and loops over the views. What the tiles of an image
say is merged exactly by a second, small kernel in a fixed order: no lock, no atomic, same bits.
The columns may come in chunks (mokd_fast/ops/linear_distill.py): their tiles are merged together.

Maxima are those of the logits, before the temperature: s - max is exact where s / tau is not, and
(s - max) / tau leaves the compiler nothing to contract in one pass and not in the other.
Not here: fp64 students; more than 24 teacher rows.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, choose

TYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # the oldest GPU that is compiled for in the tests
ROWS = 24  # of all targets, each padded to a power of two: their tiles stay in registers
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 before the import: on the CPU
# These are 64-bit, and so are the offsets they make; no value of theirs compiles a kernel again.
SIZES = ("V", "T", "B", "tiles")
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # a tile of -inf has a finite maximum


@triton.jit
def _inverse(temperature):
    return tl.div_rn(1.0, tl.load(temperature))


@triton.jit
def _load(rows, stride, center, b, k, K, COUNT: tl.constexpr, PAD: tl.constexpr,
          CENTERED: tl.constexpr, PROBS: tl.constexpr):  # fmt: skip
    """Logits minus center, or probabilities, of one target's rows: [PAD, BLOCK] in fp32."""
    t = tl.arange(0, PAD).to(tl.int64)
    mask = (t < COUNT)[:, None] & (k < K)[None, :]
    at = rows + b * stride[1] + t[:, None] * stride[0] + k[None, :] * stride[2]
    x = tl.load(at, mask=mask, other=0.0 if PROBS else float("-inf")).to(tl.float32)
    if CENTERED:
        x -= tl.load(center + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _exponentials(x, temperature, PAD: tl.constexpr, PROBS: tl.constexpr):
    """max [PAD] and exp((x - max) / tau) [PAD, BLOCK] of logits; 0 and x of probabilities."""
    top = tl.zeros([PAD], tl.float32)
    if not PROBS:
        top = tl.maximum(tl.max(x, 1), LOWEST)
        x = tl.exp((x - top[:, None]) * _inverse(temperature))
    return top, x


@triton.jit
def _probabilities(x, temperature, stats, table, B, V, COUNT: tl.constexpr, PAD: tl.constexpr,
                   PROBS: tl.constexpr):  # fmt: skip
    """q [PAD, BLOCK] from the rows' stats; 0 for a row without a pair, which may hold NaN."""
    t = tl.arange(0, PAD)
    if not PROBS:
        top = tl.load(stats + t * B * 2, mask=t < COUNT, other=0.0)
        mass = tl.load(stats + t * B * 2 + 1, mask=t < COUNT, other=1.0)
        x = tl.exp((x - top[:, None]) * _inverse(temperature)) * (1.0 / mass)[:, None]
    paired = tl.load(table + t * (V + 3) + V, mask=t < COUNT, other=0.0) != 0
    return tl.where(paired[:, None], x, 0.0)


@triton.jit
def _coefficients(table, mass, weight, row_weight, B, V, COUNT: tl.constexpr, PAD: tl.constexpr,
                  WEIGHTED: tl.constexpr, PROBS: tl.constexpr):  # fmt: skip
    """c [PAD] of one target for one view, and c * mass summed: its part of n_v."""
    t = tl.arange(0, PAD)
    c = tl.load(table + t * (V + 3), mask=t < COUNT, other=0.0) * weight
    if WEIGHTED:
        c *= tl.load(row_weight).to(tl.float32)
    if PROBS:  # given probabilities need not sum to 1; a row without this pair may hold NaN
        rows = tl.load(mass + t * B * 2, mask=(t < COUNT) & (c != 0), other=0.0)
        return c, tl.sum(c * rows, 0)
    else:
        return c, tl.sum(c, 0)


@triton.jit(do_not_specialize=SIZES)
def _forward(student, stride_v: tl.int64, stride_b: tl.int64, stride_k, rows, strides, centers,
             scalars, partials, dots, V: tl.int64, B: tl.int64, K, tiles: tl.int64, N: tl.constexpr,
             COUNTS: tl.constexpr, PADS: tl.constexpr, CENTERED: tl.constexpr,
             PROBS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One tile: (max, sum) of every row to partials [V+T, B, 2, tiles], and of every pair
    sum e_t (s - max) to dots [T, V, B, tiles]."""
    b = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    k = tile * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    e = ()  # of each target [PAD, BLOCK]
    row = V
    for i in tl.static_range(N):
        x = _load(rows[i], strides[i], centers[i], b, k, K, COUNTS[i], PADS[i], CENTERED[i],
                  PROBS[i])  # fmt: skip
        high, x = _exponentials(x, scalars + 1 + i, PADS[i], PROBS[i])
        t = tl.arange(0, PADS[i])
        to = partials + ((row + t) * B + b) * 2 * tiles + tile
        tl.store(to, high, mask=t < COUNTS[i])
        tl.store(to + tiles, tl.sum(x, 1), mask=t < COUNTS[i])
        e = e + (x,)  # noqa: RUF005
        row += COUNTS[i]
    inverse = _inverse(scalars)
    source = student + b * stride_b + k * stride_k
    for v in tl.range(V, num_stages=STAGES):
        s = tl.load(source + v * stride_v, mask=k < K, other=float("-inf")).to(tl.float32)
        top = tl.maximum(tl.max(s, 0), LOWEST)
        s -= top
        at = partials + (v * B + b) * 2 * tiles + tile
        tl.store(at, top)
        tl.store(at + tiles, tl.sum(tl.exp(s * inverse), 0))
        s = tl.where(k < K, s, 0.0)  # 0 * -inf beyond the last column
        first = V - V  # 0 in 64 bits
        for i in tl.static_range(N):
            j = tl.arange(0, PADS[i])
            at = dots + (((first + j) * V + v) * B + b) * tiles + tile
            tl.store(at, tl.sum(e[i] * s[None, :], 1), mask=j < COUNTS[i])
            first += COUNTS[i]


@triton.jit(do_not_specialize=SIZES)
def _merge(scalars, partials, dots, table, stats, entropies, V: tl.int64, T: tl.int64, B: tl.int64,
           tiles: tl.int64, TILES: tl.constexpr):  # fmt: skip
    """One image and teacher row: its stats and entropies[t, b] = sum_v pairs[t,v] CE[t,v]."""
    b = tl.program_id(0).to(tl.int64) // T
    t = tl.program_id(0).to(tl.int64) % T
    i = tl.arange(0, TILES)
    mask = i < tiles
    at = partials + ((V + t) * B + b) * 2 * tiles + i
    teacher_max = tl.load(at, mask=mask, other=LOWEST)
    teacher_sum = tl.load(at + tiles, mask=mask, other=0.0)
    high = tl.max(teacher_max, 0)
    line = table + t * (V + 3) + V
    given = tl.load(line + 1) != 0  # probabilities need not sum to 1
    target = tl.load(line + 2).to(tl.int64)
    scale = tl.exp((teacher_max - high) * _inverse(scalars + 1 + target))
    scale = tl.where(given, 1.0, scale)  # their temperature says nothing
    inverse = _inverse(scalars)
    mass = tl.sum(teacher_sum * scale, 0)
    tl.store(stats + ((V + t) * B + b) * 2, high)
    tl.store(stats + ((V + t) * B + b) * 2 + 1, mass)
    entropy = tl.zeros([], tl.float32)
    for v in range(V):
        at = partials + (v * B + b) * 2 * tiles + i
        student_max = tl.load(at, mask=mask, other=LOWEST)
        top = tl.max(student_max, 0)
        decay = tl.exp((student_max - top) * inverse)
        total = tl.sum(tl.load(at + tiles, mask=mask, other=0.0) * decay, 0)
        # The approximate logarithm of fp32 keeps no relative digit near 1: a sharp, matched row.
        log_sum = tl.log(total.to(tl.float64)).to(tl.float32)
        tl.store(stats + (v * B + b) * 2, top, mask=t == 0)
        tl.store(stats + (v * B + b) * 2 + 1, log_sum, mask=t == 0)
        dot = tl.load(dots + ((t * V + v) * B + b) * tiles + i, mask=mask, other=0.0)
        dot = tl.where(mask, scale * (dot + teacher_sum * (student_max - top)), 0.0)
        dot = tl.sum(dot, 0) * inverse
        ce = tl.where(given, mass * log_sum - dot, log_sum - dot / mass)
        pair = tl.load(table + t * (V + 3) + v)
        entropy += tl.where(pair != 0, pair * ce, 0.0)  # an unpaired row may hold NaN
    tl.store(entropies + t * B + b, entropy)


@triton.jit(do_not_specialize=SIZES)
def _total(entropies, row_weights, scalars, loss, terms, B: tl.int64, N: tl.constexpr,
           COUNTS: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """terms[i] = mean_b row_weight[b] sum_t entropies[t, b]; loss = sum_i weight_i terms[i]."""
    total = tl.zeros([], tl.float32)
    at = entropies
    for i in tl.static_range(N):
        sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, B, BLOCK):
            b = first + tl.arange(0, BLOCK)
            x = tl.zeros([BLOCK], tl.float32)
            for t in range(COUNTS[i]):
                x += tl.load(at + t * B + b, mask=b < B, other=0.0)
            if WEIGHTED[i]:
                x *= tl.load(row_weights[i] + b, mask=b < B, other=0.0).to(tl.float32)
            sums += x
        term = tl.sum(sums, 0) / B
        tl.store(terms + i, term)
        total += tl.load(scalars + 1 + N + i) * term
        at += COUNTS[i] * B
    tl.store(loss, total)


@triton.jit(do_not_specialize=SIZES)
def _backward(grad, stats, student, stride_v: tl.int64, stride_b: tl.int64, stride_k, rows, strides,
              centers, row_weights, scalars, table, out, V: tl.int64, B: tl.int64, K,
              tiles: tl.int64, N: tl.constexpr, COUNTS: tl.constexpr, PADS: tl.constexpr,
              CENTERED: tl.constexpr, WEIGHTED: tl.constexpr, PROBS: tl.constexpr,
              BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One tile of the gradient of every view: out [V, B, K]. From the last one to the first: what
    forward read last is still in the L2."""
    piece = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    b = piece // tiles
    tile = piece % tiles
    k = tile * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    q = ()  # of each target [PAD, BLOCK]
    weights = ()
    row = V - V  # 0 in 64 bits
    for i in tl.static_range(N):
        x = _load(rows[i], strides[i], centers[i], b, k, K, COUNTS[i], PADS[i], CENTERED[i],
                  PROBS[i])  # fmt: skip
        x = _probabilities(x, scalars + 1 + i, stats + ((V + row) * B + b) * 2,
                           table + row * (V + 3), B, V, COUNTS[i], PADS[i], PROBS[i])  # fmt: skip
        q = q + (x,)  # noqa: RUF005
        weights = weights + (tl.load(scalars + 1 + N + i),)  # noqa: RUF005
        row += COUNTS[i]
    inverse = _inverse(scalars)
    scale = tl.load(grad).to(tl.float32) * inverse / B
    source = student + b * stride_b + k * stride_k
    for v in tl.range(V, num_stages=STAGES):
        s = tl.load(source + v * stride_v, mask=k < K, other=float("-inf")).to(tl.float32)
        n = tl.zeros([], tl.float32)
        mix = tl.zeros([BLOCK], tl.float32)  # sum_t c_tv q_t
        first = V - V  # 0 in 64 bits
        for i in tl.static_range(N):
            c, part = _coefficients(
                table + first * (V + 3) + v, stats + ((V + first) * B + b) * 2 + 1, weights[i],
                row_weights[i] + b, B, V, COUNTS[i], PADS[i], WEIGHTED[i], PROBS[i])  # fmt: skip
            mix += tl.sum(tl.where(c[:, None] != 0, c[:, None] * q[i], 0.0), 0)
            n += part
            first += COUNTS[i]
        at = stats + (v * B + b) * 2
        p = tl.exp((s - tl.load(at)) * inverse) * (n * tl.exp(-tl.load(at + 1)))
        p = tl.where(n != 0, p, 0.0)  # a view without a pair may hold NaN
        to = out + (v * B + b) * K + k
        tl.store(to, (scale * (p - mix)).to(out.dtype.element_ty), mask=k < K)


@functools.lru_cache(maxsize=64)
def _table(
    pairs: tuple[float, ...],
    targets: tuple[int, ...],
    given: tuple[bool, ...],
    device: torch.device,
) -> Tensor:
    """[T, V + 3]: of each teacher row its pairs, whether there are any, whether its values are
    probabilities, its target. Copied to the device once for these values, never again."""
    views = len(pairs) // len(targets)
    rows = [pairs[t * views : (t + 1) * views] for t in range(len(targets))]
    lines = [[*row, any(row), given[i], i] for row, i in zip(rows, targets, strict=True)]
    return torch.tensor(lines, dtype=torch.float32, device=device)


def why_not(student: Tensor, rows: Sequence[Tensor]) -> str | None:
    """Why these kernels cannot take the student and its targets' logits or probs, or None."""
    if student.dtype not in TYPES:
        return f"it takes fp32, bf16 and fp16, the student is {student.dtype}"
    padded = sum(_pad(len(r)) for r in rows)
    if padded > ROWS:
        return (
            f"it takes {ROWS} teacher rows, those of each target rounded up to a power of two: "
            f"here they are {padded}"
        )
    return None


def gpu_why_not(device: torch.device) -> str | None:
    """Why no kernel here runs on a device, or None."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"it takes tensors on a GPU, this one is on {device}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return "it takes GPUs of compute capability 8.0 and above"
    return None


def _pad(n: int) -> int:
    """The power of two from n on."""
    return 1 << (n - 1).bit_length()


def _arguments(
    student: Tensor,
    rows: Sequence[Tensor],
    centers: Sequence[Tensor],
    scalars: Tensor,
    probabilities: Sequence[bool],
    config: Config,
) -> dict[str, Any]:
    """What both passes take, by name."""
    views, images, columns = student.shape
    stride_v, stride_b, stride_k = student.stride()
    return {
        "student": student,
        "stride_v": stride_v,
        "stride_b": stride_b,
        "stride_k": stride_k,
        "rows": tuple(rows),
        "strides": tuple(r.stride() for r in rows),
        "centers": tuple(c.contiguous() for c in centers),
        "scalars": scalars,
        "V": views,
        "B": images,
        "K": columns,
        "tiles": triton.cdiv(columns, config.columns),
        "N": len(rows),
        "COUNTS": tuple(len(r) for r in rows),
        "PADS": tuple(_pad(len(r)) for r in rows),
        "CENTERED": tuple(c.numel() > 0 for c in centers),
        "PROBS": tuple(probabilities),
        "BLOCK": config.columns,
        "STAGES": config.stages,
        "num_warps": config.warps,
    }


def _pairs(rows: Sequence[Tensor], pairs: Sequence[float], probabilities: Sequence[bool]) -> Tensor:
    targets = tuple(i for i, r in enumerate(rows) for _ in r)
    return _table(tuple(pairs), targets, tuple(probabilities), rows[0].device)


def distill_forward(
    student: Tensor, rows: Sequence[Tensor], *rest: Any, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], terms [targets], stats [V + T, B, 2]; arguments as `distill._forward`."""
    chunks = ForwardChunks(student.shape[2])
    chunks.add(student, rows, *rest, config=config)
    return chunks.outputs


class ForwardChunks:
    """`distill_forward` for K columns that come in chunks, from left to right.

    All that is kept of a chunk is what its tiles say, which is merged once, in the end:
    2 (V + T) + V T numbers a tile and image.
    """

    def __init__(self, columns: int) -> None:
        self._left = columns
        self._found: list[tuple[Tensor, Tensor]] = []  # partials and dots of each chunk

    def add(
        self, student: Tensor, rows: Sequence[Tensor], *rest: Any, config: Config | None = None
    ) -> None:
        """Some columns of all arguments of `distill_forward`, centers too."""
        centers, row_weights, scalars, pairs, probabilities = rest
        if student.numel():
            run = partial(_both_passes, student, rows, *rest)
            config = config or _config(student, rows, run)
            common = _arguments(student, rows, centers, scalars, probabilities, config)
            views, images, tiles = *student.shape[:2], common["tiles"]
            teachers = sum(common["COUNTS"])
            partials = _new(student, views + teachers, images, 2, tiles)
            dots = _new(student, teachers, views, images, tiles)
            with torch.cuda.device_of(student):
                _forward[(images * tiles,)](partials=partials, dots=dots, **common)
            self._found.append((partials, dots))
        self._left -= student.shape[2]
        if not self._left:
            table = _pairs(rows, pairs, probabilities)
            self.outputs = _merged(self._found, student, rows, row_weights, scalars, table)


def _merged(
    found: Sequence[tuple[Tensor, Tensor]],
    student: Tensor,
    rows: Sequence[Tensor],
    row_weights: Sequence[Tensor],
    scalars: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results, from the partials and dots of all chunks."""
    (views, images, _), counts = student.shape, tuple(len(r) for r in rows)
    teachers = sum(counts)
    loss, terms = _new(student), _new(student, len(rows))
    stats = _new(student, views + teachers, images, 2)
    if not images:
        return loss.zero_(), terms.zero_(), stats
    partials, dots = (torch.cat(x, -1) if len(x) > 1 else x[0] for x in zip(*found, strict=True))
    tiles, entropies = dots.shape[-1], _new(student, teachers, images)
    row_weights = tuple(w.contiguous() for w in row_weights)
    weighted = tuple(w.numel() > 0 for w in row_weights)
    with torch.cuda.device_of(student):
        _merge[(images * teachers,)](
            scalars, partials, dots, table, stats, entropies, views, teachers, images, tiles,
            _pad(tiles),
        )  # fmt: skip
        _total[(1,)](
            entropies, row_weights, scalars, loss, terms, images, len(rows), counts, weighted, 256
        )
    return loss, terms, stats


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _config(
    student: Tensor, rows: Sequence[Tensor], run: Callable[[Config], Any] | None = None
) -> Config:
    """For the columns that one launch covers: a chunk is a case of its own."""
    return choose("triton", student, sum(_pad(len(r)) for r in rows), run)


def distill_backward(
    grad: Tensor,
    stats: Tensor,
    student: Tensor,
    rows: Sequence[Tensor],
    centers: Sequence[Tensor],
    row_weights: Sequence[Tensor],
    scalars: Tensor,
    pairs: Sequence[float],
    probabilities: Sequence[bool],
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Gradient [V, B, K] of the student's dtype, in `out`, contiguous, if there is one; arguments
    after `student` as in the forward. It needs no more of other columns than the stats say."""
    if out is None:
        out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    if not student.numel():
        return out
    common = _arguments(
        student, rows, centers, scalars, probabilities, config or _config(student, rows)
    )
    row_weights = tuple(w.contiguous() for w in row_weights)
    with torch.cuda.device_of(student):
        _backward[(student.shape[1] * common["tiles"],)](
            grad=grad,
            stats=stats,
            row_weights=row_weights,
            table=_pairs(rows, pairs, probabilities),
            out=out,
            WEIGHTED=tuple(w.numel() > 0 for w in row_weights),
            **common,
        )
    return out


def _both_passes(*arguments: Any) -> None:
    """The arguments of `distill_forward`, its configuration last: what is timed to choose one."""
    *call, config = arguments
    stats = distill_forward(*call, config=config)[2]
    distill_backward(torch.ones_like(stats[0, 0, 0]), stats, *call, config=config)
