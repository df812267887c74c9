"""The libraries' layers, run the way that is fastest on the CPU. Modules, parameters and keys stay
the libraries' own; the mathematics too."""

from typing import Any, cast

import timm.models.vision_transformer as vit
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops import cpu, onednn
from . import batch_norm, blocks
from .blocks import Linear, half_precision
from .heads import Between

# `Conv2d` is a product where its windows have at most FEW pixels and it has MANY weights or more.
FEW, MANY = 1 << 12, 1 << 16


class Conv2d(nn.Conv2d):
    """nn.Conv2d that is a product of its windows with its weights where few windows meet many
    weights: there oneDNN's convolution spends its time on moving weights, most of all for their
    gradient (layers.json has what it takes in the last stages of a ResNet).
    Of a product there are gradients of first order alone.

    It is right for a map smaller than the stride, too: oneDNN leaves the taps of a bf16 weight
    gradient that lie beside such a map as the memory was (torch 2.14). Padded by hand, it has none.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _plain(self) or x.ndim != 4:
            return super().forward(x)
        if self._few_windows(x):
            return self._product(x)
        if min(x.shape[2], x.shape[3]) >= max(self.stride):
            return super().forward(x)
        rows, columns = cast(tuple[int, int], self.padding)
        x = F.pad(x, (columns, columns, rows, rows))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _few_windows(self, x: Tensor) -> bool:
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return False
        if self.groups > 1:
            return False
        (down, across), (rows, columns) = self.kernel_size, cast(tuple[int, int], self.padding)
        height = (x.shape[2] + 2 * rows - down) // self.stride[0] + 1
        width = (x.shape[3] + 2 * columns - across) // self.stride[1] + 1
        pixels = len(x) * height * width * down * across
        fits = height > 0 and width > 0 and x.shape[1] == self.in_channels
        return fits and pixels <= FEW and self.weight.numel() >= MANY

    def _product(self, x: Tensor) -> Tensor:
        half = half_precision(x) and torch.is_grad_enabled()
        weight = onednn.half(self.weight) if half else self.weight
        matrix = weight.permute(0, 2, 3, 1).flatten(1)  # no copy where it is channels_last
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            down, right = self.stride
            rows = x[:, :, ::down, ::right].permute(0, 2, 3, 1)
        else:
            rows = _Windows.apply(x, self.kernel_size, self.stride, self.padding)
        return onednn.trained_linear(rows, matrix, self.bias).permute(0, 3, 1, 2)


class _Windows(torch.autograd.Function):
    """The windows of a convolution: [B, C, H, W] -> [B, h, w, C * taps], channels innermost."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int]
    ) -> Tensor:
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad[1], pad[1], pad[0], pad[0]))
        ctx.padded, ctx.window = x.shape, (kernel, stride, pad)
        view = x.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # [B,h,w,C,kh,kw]
        return view.permute(0, 1, 2, 4, 5, 3).flatten(3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kernel, stride, pad), (_, H, W, C) = ctx.window, ctx.padded
        taps = grad.unflatten(3, (*kernel, C))
        total = grad.new_zeros(ctx.padded, dtype=torch.promote_types(grad.dtype, torch.float32))
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                rows = slice(i, i + stride[0] * (taps.shape[1] - 1) + 1, stride[0])
                columns = slice(j, j + stride[1] * (taps.shape[2] - 1) + 1, stride[1])
                total[:, rows, columns] += taps[:, :, :, i, j]
        inner = total[:, pad[0] : H - pad[0], pad[1] : W - pad[1]]
        return inner.to(grad.dtype).permute(0, 3, 1, 2), None, None, None


# How a library's class is fastest. Subclasses, which may do something else, are left alone.
KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    **batch_norm.KINDS,
}


def quicken(model: nn.Module, device: torch.device, precision: str, recorded: bool = False) -> None:
    """Changes, in place, how layers of `model` compute, not what.

    On a GPU, where the step is `recorded` as a CUDA graph, BatchNorm with a ResNet's sums and ReLUs
    in its pass (batch_norm.py); unrecorded its launches would take the host longer than PyTorch's.
    On the CPU, in fp32 and bf16, such BatchNorm too, linear layers by oneDNN (of bf16 those that
    need no gradient), convolutions as `Conv2d` here. bf16: timm's blocks as in blocks.py, their
    attention by a kernel of its own, or by batched products where there is none: PyTorch's fused
    one is slow there, most of all backward. step.json has what all this is worth.
    """
    kinds: dict[type[nn.Module], type[nn.Module]] = {}
    if device.type == "cuda" and recorded:
        kinds = dict(batch_norm.KINDS)
    elif device.type == "cpu" and precision in ("fp32", "bf16"):
        kinds = KINDS | (blocks.KINDS if precision == "bf16" else {})
    if cpu.bf16_why_not() is not None:
        kinds.pop(vit.Attention, None)
    for module in model.modules():
        if device.type == "cpu" and precision == "bf16" and isinstance(module, vit.Attention):
            module.fused_attn = False  # type: ignore[misc]
        kind = kinds.get(type(module))
        if kind and (kind is not Conv2d or _plain(module)):  # type: ignore[arg-type]
            module.__class__ = kind


def _plain(conv: nn.Conv2d) -> bool:
    numbers = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return numbers and set(conv.dilation) == {1}


def compile_blocks(model: nn.Module) -> int:
    """torch.compile for the transformer blocks of `model`, in place; how many there are. And for
    what a T-Head's search, which calls no block, does between its attentions (heads.py).

    One block's code serves all of its kind: seconds each, though every size, every drop-path rate
    and "with gradient or without" is compiled for itself. What it makes of a step: step.json.
    """
    # Students, teachers and searches, with gradient and without, in many sizes: each is compiled.
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    found = [module for module in model.modules() if isinstance(module, vit.Block | Between)]
    for module in found:
        module.compile(fullgraph=True, dynamic=False)
    return sum(isinstance(module, vit.Block) for module in found)
