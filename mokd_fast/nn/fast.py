"""The libraries' layers, run the way that is fastest on the CPU. Modules, parameters and keys stay
the libraries' own; the mathematics too."""

import torch
from timm.models.vision_transformer import Attention, Block
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
            module.fused_attn = False  # type: ignore[misc]


def compile_blocks(model: nn.Module) -> int:
    """torch.compile for the transformer blocks of `model`, in place; how many there are.

    One block's code serves all of its kind, so that it takes seconds, not minutes. Of ViT-S blocks
    in bf16 on the CPU it makes 1.08x, of fp32 ones and of a whole ResNet-50 nothing (0.94 to 1.01).
    """
    # Students, teachers and searches, with gradient and without, in many sizes: each is compiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)
    return len(blocks)
