"""column_mean: the mean teacher logits of a batch, from which the centre moves."""

import torch
from torch import Tensor

from . import cpu, reference
from .dispatch import pick, register


@torch.no_grad()
def column_mean(logits: Tensor) -> Tensor:
    """Mean over every dimension but the last, accumulated in fp32 (fp64 for fp64). [K]

    Without rows it is 0, as the loss is. No gradient flows.
    """
    # Compiled code fuses the plain form; FakeTensors and the like have no memory to read.
    if torch.compiler.is_compiling() or type(logits) not in (Tensor, torch.nn.Parameter):
        return reference.column_mean(logits)
    mean: Tensor = pick("column_mean", logits).run(logits)
    return mean


register("column_mean", "cpu", cpu.column_mean, cpu.why_not)
register("column_mean", "reference", reference.column_mean)
