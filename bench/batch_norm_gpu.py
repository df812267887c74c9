"""batch_norm on a GPU: its check, and its time beside PyTorch's passes, forward + backward.

    python bench/batch_norm_gpu.py [--device cuda] [--quick] [--sweep] [--json FILE]

The layers of a ResNet-50 for 64 pictures: two views of 224 in one batch, eight of 96 in another.
Seconds are those of CUDA graphs, in turns; inputs rotate, so that no call finds its maps in a
cache. `floor_fraction` is the share of the copy rate that the bytes of the two passes each way are
moved at: three maps forward, five backward, one more each where something is added. --sweep times
our layers in fp16 with other tiles, fastest last; it takes minutes.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.device import Run, captured, copy, medians, rotations, turn
from bench.timing import machine, write_json
from mokd_fast.ops import batch_norm
from mokd_fast.ops.dispatch import ENVIRONMENT

if TYPE_CHECKING:
    from bench.gpu_check import Where

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width and blocks of a ResNet-50
VIEWS = {224: 2, 96: 8}
Layer = tuple[int, int, bool, bool]  # channels, side, something is added, ReLU
SWEPT = {  # constants of kernels/batch_norm.py
    "TILE": (2048, 4096),
    "WIDEST": (64, 128),
    "WARPS": (2, 4, 8),
    "PROGRAMS": (512, 1024),
    "STAGES": (1, 3, 4),
}
Tensors = list[Tensor]  # x, weight, bias, added, gradient


def layers(side: int) -> dict[Layer, int]:
    """Each kind of a ResNet-50's, and how many there are."""
    found: dict[Layer, int] = {(64, side // 2, False, True): 1}
    side //= 4
    for i, (width, blocks) in enumerate(STAGES):
        for block in range(blocks):
            inner, side = side, side // 2 if i and not block else side
            kinds = [(width, inner, False, True), (width, side, False, True)]
            kinds += [(4 * width, side, True, True)]
            kinds += [(4 * width, side, False, False)] if not block else []
            for kind in kinds:
                found[kind] = found.get(kind, 0) + 1
    return found


def tensors(layer: Layer, images: int, dtype: torch.dtype, device: str) -> Tensors:
    channels, side, *_ = layer

    def one() -> Tensor:
        x = torch.randn(images, channels, side, side, device=device)
        return x.to(dtype, memory_format=torch.channels_last)

    weight, bias = (torch.randn(channels, device=device) for _ in range(2))
    return [t.requires_grad_() for t in (one() + 1, weight, bias, one())] + [one()]


def ours(x: Tensor, w: Tensor, b: Tensor, added: Tensor | None, relu: bool, moving: Any) -> Tensor:
    return batch_norm(x, *moving, w, b, True, added=added, relu=relu)


def plain(x: Tensor, w: Tensor, b: Tensor, added: Tensor | None, relu: bool, moving: Any) -> Tensor:
    y = F.batch_norm(x, *moving, w, b, True)
    if added is not None:
        y = y + added
    return F.relu(y, inplace=True) if relu else y


def call(form: Any, layer: Layer, given: Tensors) -> Run:
    x, weight, bias, added, grad = given
    _, _, add, relu = layer
    inputs = [x, weight, bias, added][: 3 + add]
    moving = torch.zeros_like(weight).detach(), torch.ones_like(weight).detach()

    def run() -> tuple[Tensor, ...]:
        y = form(x, weight, bias, added if add else None, relu, moving)
        return y, *torch.autograd.grad(y, inputs, grad), *moving

    return run


def normalised(at: "Where") -> None:
    """Against float64, no error larger than that of PyTorch's own passes, up to 1e-6."""
    sizes = [(4, 7, 5), (2, 64, 6)] if at.small else [(5, 100, 33), (64, 256, 28), (16, 2048, 7)]
    for dtype in at.dtypes:
        if dtype == torch.float64:
            continue
        for images, channels, side in sizes:
            for add, relu in itertools.product((False, True), repeat=2):
                layer = channels, side, add, relu
                given = tensors(layer, images, dtype, at.device)
                wide = [t.detach().double().requires_grad_() for t in given]
                exact, rough, mine = (
                    call(form, layer, each)()
                    for form, each in ((plain, wide), (plain, given), (ours, given))
                )
                through = (mine[0] > 0) != (rough[0] > 0)  # a gradient there is all wrong or right
                for m, r, e in zip(mine, rough, exact, strict=True):
                    assert m.dtype == r.dtype and m.shape == r.shape
                    off, allowed = ((t.double() - e).abs() for t in (m, r))
                    off = off.masked_fill(through, 0) if off.ndim == 4 else off
                    limit = allowed.max() + 1e-6 * e.abs().max().clamp(min=1)
                    assert off.max() <= limit, (
                        f"{dtype} {images} x {layer}: error {off.max():.3g}, PyTorch's "
                        f"{allowed.max():.3g}, largest value {e.abs().max():.3g}"
                    )


def measure(
    layer: Layer, images: int, dtype: torch.dtype, device: str, rounds: int, alone: bool = False
) -> dict[str, Any]:
    channels, side, add, relu = layer
    moved = (8 + 2 * add) * images * channels * side**2 * dtype.itemsize
    sets = [tensors(layer, images, dtype, device) for _ in range(rotations(moved // 2, device))]
    forms = {"ours": ours} if alone else {"ours": ours, "plain": plain}
    runs = {
        name: captured(turn([call(form, layer, given) for given in sets]), device)
        for name, form in forms.items()
    }
    copying, copied = copy(device, 1 << 27 if device == "cuda" else 1 << 20)
    times = medians({"copy": copying, **runs}, rounds, device, ahead=True)
    rate, seconds = copied / times["copy"], times["ours"] / len(sets)
    row = {
        "op": "batch_norm", "backend": "triton", "dtype": str(dtype).removeprefix("torch."),
        "shape": {"B": images, "C": channels, "side": side, "added": add, "relu": relu},
        "median_s": seconds, "copy_GB_per_s": rate / 1e9, "floor_fraction": moved / rate / seconds,
    }  # fmt: skip
    if not alone:
        other = times["plain"] / len(sets)
        row |= {"baseline": "F.batch_norm", "baseline_s": other, "ratio": other / seconds}
    return row


def network(
    side: int, pictures: int, dtype: torch.dtype, device: str, rounds: int, alone: bool = False
) -> list[dict[str, Any]]:
    images = VIEWS[side] * pictures
    return [
        measure(layer, images, dtype, device, rounds, alone) | {"view": side, "layers": count}
        for layer, count in layers(side).items()
    ]


def total(rows: list[dict[str, Any]], key: str) -> float:
    return sum(float(row[key]) * row["layers"] for row in rows)


def sweep(pictures: int, device: str, rounds: int) -> None:
    from mokd_fast.kernels import batch_norm as kernels

    found = {}
    for values in itertools.product(*SWEPT.values()):
        with mock.patch.multiple(kernels, **dict(zip(SWEPT, values, strict=True))):
            found[values] = [
                total(network(side, pictures, torch.float16, device, rounds, True), "median_s")
                for side in VIEWS
            ]
    print(*SWEPT, *VIEWS)
    for values, seconds in sorted(found.items(), key=lambda pair: -sum(pair[1])):
        print(*values, *(f"{s * 1e3:.3f} ms" for s in seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a picture, few rounds")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pictures, rounds = (1, 2) if options.quick else (options.pictures, 11)
    if options.sweep:
        return sweep(pictures, options.device, rounds // 2)
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    with mock.patch.dict("os.environ", {ENVIRONMENT: "triton"}):
        for side, dtype in itertools.product(VIEWS, (torch.float16, torch.bfloat16)):
            rows = network(side, pictures, dtype, options.device, rounds)
            mine, other = total(rows, "median_s"), total(rows, "baseline_s")
            print(f"{side} {rows[0]['dtype']}: {mine * 1e3:.2f} ms, PyTorch's passes "
                  f"{other * 1e3:.2f} ms, {other / mine:.2f}x", flush=True)  # fmt: skip
            for row in rows:
                print(f"  {row['layers']} x {row['shape']}: {row['median_s'] * 1e6:.0f} us, "
                      f"{row['ratio']:.2f}x, {row['floor_fraction']:.0%}", flush=True)  # fmt: skip
            result["rows"] += rows
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
