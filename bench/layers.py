"""Layers and passes of a step that the trainer runs another way than PyTorch does, on the CPU.

    python bench/layers.py [--quick] [--json FILE]

A bf16 row is under autocast, from fp32 weights; with gradient unless it says otherwise. What is
compared starts from the same numbers. step.json has what all of them are worth in a step.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.timing import calibrate, interleave, keep_memory, machine, write_json
from mokd_fast.nn.fast import quicken
from mokd_fast.ops import (
    Clip,
    Ema,
    WeightNormed,
    batch_norm,
    clip_grad_per_tensor_,
    cpu,
    foreach,
    grad_norms,
    prototype_linear,
    self_attention,
    update_,
    weight_norm,
)
from mokd_fast.ops.block import add_norm
from mokd_fast.ops.matvec import matvec

K = 65536
# Convolutions of the last two stages of a ResNet-50, 8 global and 32 local crops:
# images, channels in and out, side, kernel, stride
CONVOLUTIONS = [
    (8, 1024, 256, 14, 1, 1),
    (8, 2048, 512, 7, 1, 1),
    (8, 512, 512, 7, 3, 1),
    (32, 1024, 256, 6, 1, 1),
    (32, 1024, 2048, 6, 1, 2),
    (32, 512, 512, 6, 3, 2),
    (32, 2048, 512, 3, 1, 1),
    (32, 512, 512, 3, 3, 1),
]
ATTENTION = (8, 197, 6, 64)  # images, tokens, heads, width of a head
# BatchNorms of a ResNet-50: images, channels, side, and whether a shortcut is added to them
NORMS = [
    (8, 64, 112, False),
    (8, 64, 56, False),
    (8, 256, 56, True),
    (8, 512, 28, True),
    (8, 256, 14, False),
    (8, 1024, 14, True),
    (8, 2048, 7, True),
    (32, 256, 24, True),
    (32, 512, 12, True),
    (32, 256, 6, False),
    (32, 2048, 3, True),
]
LINEAR = (1576, 384, 1536)  # tokens, width in and out: the first layer of a ViT-S block's MLP

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Pair = tuple[Callable[[], Any], Callable[[], Any]]  # ours, PyTorch's


def both(layer: nn.Module, x: Tensor, dtype: str, *, gradient: bool = True) -> Pair:
    ours = copy.deepcopy(layer)
    quicken(ours, x.device, dtype)

    def run(layer: nn.Module) -> None:
        inputs = x.detach().requires_grad_(gradient)
        with (
            torch.set_grad_enabled(gradient),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"),
        ):
            y = layer(inputs)
        if gradient:
            y.backward(torch.ones((), dtype=y.dtype).expand_as(y).contiguous())
            layer.zero_grad()

    return lambda: run(ours), lambda: run(layer)


def norm(shape: tuple[int, ...], dtype: torch.dtype, adds: bool) -> Pair:
    """BatchNorm, with `adds` the sum with a shortcut, and ReLU, as timm's blocks have them."""
    x, added, grad = (
        torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(3)
    )
    numbers = [torch.ones(shape[1]), torch.zeros(shape[1])]
    running = [t.clone() for t in reversed(numbers)]
    inputs = [t.requires_grad_() for t in ([x, added] if adds else [x]) + numbers]

    def ours() -> None:
        more = added if adds else None
        y = batch_norm(x, *running, *numbers, training=True, added=more, relu=True)
        torch.autograd.grad(y, inputs, grad)

    def theirs() -> None:
        y = F.batch_norm(x, *running, *numbers, training=True)
        if adds:
            y += added
        torch.autograd.grad(F.relu(y, inplace=True), inputs, grad)

    return ours, theirs


def prototypes(width: int) -> Pair:
    v, g = torch.randn(K, width, requires_grad=True), torch.ones(K, 1)
    grad = torch.randn(K, width).bfloat16()

    def run(make: Callable[[], Tensor]) -> None:
        make().backward(grad)
        v.grad = None

    return (
        lambda: run(lambda: weight_norm(v, g, torch.bfloat16)),
        lambda: run(lambda: torch._weight_norm(v, g, 0).bfloat16()),
    )


def attention(way: str) -> Pair:
    """Of 8 crops of 224 x 224 in a ViT-S, forward and backward, against PyTorch's own way or its
    products one after the other."""
    B, N, H, d = ATTENTION
    qkv, grad = torch.randn(B, N, 3, H, d).bfloat16(), torch.randn(B, N, H, d).bfloat16()

    def products(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return (((q * d**-0.5) @ k.mT).softmax(dim=-1) @ v).transpose(1, 2)

    def run(attend: Callable[[Tensor], Tensor]) -> None:
        attend(qkv.detach().requires_grad_()).backward(grad)

    def fused(qkv: Tensor) -> Tensor:
        return self_attention(qkv, backend="sdpa")

    theirs = {"fused": fused, "products": products}[way]
    return lambda: run(self_attention), lambda: run(theirs)


def logits(rows: int, width: int, dtype: torch.dtype) -> Pair:
    """Of a student's views, from prototypes that a step has just changed."""
    v, g = torch.randn(K, width, requires_grad=True), torch.ones(K, 1, requires_grad=True)
    x = F.normalize(torch.randn(rows, width), dim=-1).requires_grad_()
    grad = torch.randn(rows, K).to(dtype)

    def run(make: Callable[[], Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            made = make()
        made.backward(grad)
        v.grad = g.grad = x.grad = None

    return (
        lambda: run(lambda: prototype_linear(x, WeightNormed(v, g), dtype)),
        lambda: run(lambda: F.linear(x, torch._weight_norm(v, g, 0))),
    )


def made_logits(rows: int, width: int, dtype: torch.dtype) -> Pair:
    """Of a teacher's views."""
    w, x = torch.randn(K, width).to(dtype), torch.randn(rows, width).to(dtype)
    return lambda: prototype_linear(x, w), lambda: F.linear(x, w)


def sum_and_norm(width: int) -> Pair:
    """A residual sum, and its LayerNorm in bf16, of ATTENTION's tokens."""
    x, dsum = torch.randn(2, *ATTENTION[:2], width)
    y, dnormed = torch.randn(2, *ATTENTION[:2], width).bfloat16()
    inputs = [t.requires_grad_() for t in (x, y, torch.ones(width), torch.zeros(width))]

    def theirs() -> tuple[Tensor, Tensor]:
        sums = x + y
        return sums, F.layer_norm(sums, (width,), *inputs[2:], 1e-6).bfloat16()

    def run(make: Callable[[], tuple[Tensor, Tensor]]) -> None:
        torch.autograd.grad(make(), inputs, (dsum, dnormed))

    return lambda: run(lambda: add_norm(*inputs, 1e-6, torch.bfloat16)), lambda: run(theirs)


def vit_small() -> tuple[list[nn.Parameter], list[Tensor]]:
    """Parameters of a ViT-S with its prototypes, and their gradients."""
    block = [(1152, 384), (384, 384), (1536, 384), (384, 1536), *[(384,)] * 8]
    parameters = [nn.Parameter(torch.zeros(size)) for size in [*block * 12, (K, 384), (K, 256)]]
    for p in parameters:
        p.grad = 1e-5 * torch.randn(p.shape)
    return parameters, [p.grad for p in parameters if p.grad is not None]


def clip() -> Pair:
    """None of the gradients is too long."""
    parameters, grads = vit_small()
    return lambda: clip_grad_per_tensor_(parameters, 3.0), lambda: foreach._clip(grads, 3.0)


def end_of_step(kind: type[torch.optim.Optimizer], **options: float) -> Pair:
    """The clip, the optimizer's fused step and the teacher's EMA. Every gradient is too long, after
    a clip in place by a rounding."""
    student, grads = vit_small()
    torch._foreach_mul_(grads, 1e5)
    teacher = [p.detach().clone() for p in student]
    optimizer = kind(student, lr=1e-3, fused=True, **options)  # type: ignore[call-arg]
    optimizer.step()  # which makes its state

    def ours() -> None:
        norms = grad_norms(student)
        update_(optimizer, Clip(norms, 3.0), Ema(teacher, student, 0.996))

    def theirs() -> None:
        foreach._clip(grads, 3.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(teacher, student, 0.004)

    return ours, theirs


def cases(quick: bool) -> dict[tuple[str, str], Callable[[], Pair]]:
    """(what, dtype) -> both ways."""
    found: dict[tuple[str, str], Callable[[], Pair]] = {}
    for dtype in ("fp32", "bf16"):
        for images, channels, out, side, kernel, stride in CONVOLUTIONS[-1 if quick else 0 :]:
            x = torch.randn(images, channels, side, side).to(memory_format=torch.channels_last)
            layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
            layer.to(memory_format=torch.channels_last)
            name = f"convolution {kernel} x {kernel} / {stride}, [{images}, {channels}, {side}, "
            name += f"{side}] to {out}"
            given = x if dtype == "fp32" else x.bfloat16()
            found[name, dtype] = lambda m=layer, x=given, d=dtype: both(m, x, d)
        for *size, adds in NORMS[-1 if quick else 0 :]:
            images, channels, side = size
            shape, kind = (images, channels, side, side), DTYPES[dtype]
            name = f"batch norm{' + shortcut' if adds else ''} + ReLU, {list(shape)}"
            found[name, dtype] = lambda s=shape, k=kind, a=adds: norm(s, k, a)
    tokens, width, out = LINEAR
    x, linear = torch.randn(tokens, width), nn.Linear(width, out)
    name = f"linear layer, [{tokens}, {width}] to {out}"
    found[name, "fp32"] = lambda: both(linear, x, "fp32")
    teacher = f"{name}, without gradient"
    found[teacher, "bf16"] = lambda: both(linear, x.bfloat16(), "bf16", gradient=False)
    name = f"residual sum, LayerNorm and cast, [{ATTENTION[0]}, {ATTENTION[1]}, {width}]"
    found[name, "bf16"] = lambda: sum_and_norm(width)
    mlp = Mlp(width, out)
    name = f"MLP with GELU, [{tokens}, {width}] to {out} and back"
    found[name, "bf16"] = lambda: both(mlp, x.bfloat16(), "bf16")
    for way in ("fused", "products"):
        name = f"self-attention, {list(ATTENTION)}, PyTorch's {way}"
        found[name, "bf16"] = lambda w=way: attention(w)
    found[f"weight_norm, [{K}, 384]", "bf16"] = lambda: prototypes(384)
    for dtype, kind in DTYPES.items():
        for rows in (40, 320):
            name = f"logits, [{rows}, 384] and weight_norm of [{K}, 384]"
            found[name, dtype] = lambda rows=rows, kind=kind: logits(rows, 384, kind)
        name = f"logits, [8, 384] and [{K}, 384], without gradient"
        found[name, dtype] = lambda kind=kind: made_logits(8, 384, kind)
    matrix, vector = torch.randn(K, 384).bfloat16(), torch.randn(384)
    found[f"matvec of a centre, [{K}, 384]", "bf16"] = lambda: (
        lambda: matvec(matrix, vector),
        lambda: matrix.float() @ vector,
    )
    found["clip of a ViT-S and its prototypes", "fp32"] = clip
    end = "clip, step and EMA of a ViT-S and its prototypes, by"
    found[f"{end} AdamW", "fp32"] = lambda: end_of_step(torch.optim.AdamW)
    found[f"{end} SGD", "fp32"] = lambda: end_of_step(torch.optim.SGD, momentum=0.9)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_memory()
    if cpu.native is None:
        sys.exit(f"nothing to compare: {cpu.missing}")
    result: dict[str, Any] = {"machine": machine(), "calibration": calibrate(), "rows": []}
    print(result["machine"], result["calibration"], sep="\n")
    for (what, dtype), make in cases(options.quick).items():
        ours, theirs = make()
        times = interleave({"ours": ours, "PyTorch": theirs}, 5 if options.quick else 31, 3)
        row = {
            "op": what,
            "backend": "cpu",
            "dtype": dtype,
            "median_s": times["ours"],
            "baseline": "PyTorch",
            "baseline_s": times["PyTorch"],
            "ratio": times["PyTorch"] / times["ours"],
            "discarded_rounds": times.discarded,
        }
        result["rows"].append(row)
        print(f"{what}, {dtype}: {row['median_s'] * 1e3:.2f} ms, {row['ratio']:.2f}x", flush=True)
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
