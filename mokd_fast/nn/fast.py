"""The libraries' layers, run the way that is fastest on the CPU. Modules, parameters and keys stay
the libraries' own; the mathematics too."""

import torch
from timm.layers import Attention
from torch import Tensor, nn

from ..ops import onednn


class Linear(nn.Linear):
    """nn.Linear whose products are oneDNN's (ops/onednn.py says when and why)."""

    def forward(self, x: Tensor) -> Tensor:
        return onednn.trained_linear(x, self.weight, self.bias)


def quicken(model: nn.Module, device: torch.device, precision: str) -> None:
    """Changes, in place, how layers of `model` compute, not what.

    fp32: linear layers by oneDNN. bf16: attention of timm's blocks by three batched products, for
    PyTorch's fused one takes 2.5 to 6 times as long there in training (step_parts.json).
    """
    if device.type != "cpu":
        return
    for module in model.modules():
        if precision == "fp32" and type(module) is nn.Linear:
            module.__class__ = Linear
        elif precision == "bf16" and isinstance(module, Attention):
            module.fused_attn = False
