"""The libraries' layers, run the way that is fastest on the CPU. Modules, parameters and keys stay
the libraries' own; the mathematics too."""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from ..ops import onednn


class Linear(nn.Linear):
    """nn.Linear whose products are oneDNN's (ops/onednn.py says when and why)."""

    def forward(self, x: Tensor) -> Tensor:
        return onednn.trained_linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """nn.Conv2d, right for a map that is smaller than the stride: oneDNN leaves the taps of a bf16
    weight gradient that lie beside such a map as the memory was (torch 2.14). Padded by hand, it
    has no taps beside it."""

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) >= max(self.stride):
            return super().forward(x)
        rows, columns = (int(n) for n in self.padding)  # numbers: see `_strides`
        x = F.pad(x, (columns, columns, rows, rows))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def quicken(model: nn.Module, device: torch.device, precision: str) -> None:
    """Changes, in place, how layers of `model` compute, not what.

    fp32: linear layers by oneDNN. bf16: attention of timm's blocks by batched products, for
    PyTorch's fused one is slow there, most of all backward (step.json has what both are worth in a
    step); convolutions with a stride as `Conv2d` here.
    """
    if device.type != "cpu":
        return
    for module in model.modules():
        if precision == "fp32" and type(module) is nn.Linear:
            module.__class__ = Linear
        elif precision == "bf16" and isinstance(module, Attention):
            module.fused_attn = False  # type: ignore[misc]
        elif precision == "bf16" and type(module) is nn.Conv2d and _strides(module):
            module.__class__ = Conv2d


def _strides(conv: nn.Conv2d) -> bool:
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return plain and max(conv.stride) > 1


def compile_blocks(model: nn.Module) -> int:
    """torch.compile for the transformer blocks of `model`, in place; how many there are.

    One block's code serves all of its kind: seconds each, though every size, every drop-path rate
    and "with gradient or without" is compiled for itself. What it makes of a step: step.json.
    """
    # Students, teachers and searches, with gradient and without, in many sizes: each is compiled.
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)
    return len(blocks)
