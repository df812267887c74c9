"""column_mean: the mean teacher logits of a batch, from which the centre moves."""

import torch
from torch import Tensor

from . import cpu, reference
from .dispatch import pick, register


@torch.no_grad()
def column_mean(logits: Tensor) -> Tensor:
    """Mean over every dimension but the last, accumulated in fp32 (fp64 for fp64). [K]

    Without rows it is 0, as the loss is. No gradient flows. ValueError for anything but floating
    logits [..., K] with K >= 1.
    """
    if logits.ndim == 0 or logits.shape[-1] == 0 or not logits.is_floating_point():
        raise ValueError(
            "logits must be floating [..., K] with K >= 1, "
            f"got {logits.dtype} of shape {list(logits.shape)}"
        )
    mean: Tensor = pick("column_mean", logits).run(logits)
    return mean


@torch.library.custom_op("mokd_fast::column_mean", mutates_args=())
def _operator(logits: Tensor) -> Tensor:
    return cpu.column_mean(logits)


@_operator.register_fake
def _(logits):
    return logits.new_empty(logits.shape[-1:], dtype=reference.accumulation_dtype(logits))


def _cpu(logits: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or type(logits) not in (Tensor, torch.nn.Parameter):
        return _operator(logits)  # elsewhere it would only cost time, as in ops/eager.py
    return cpu.column_mean(logits)


def _cpu_why_not(logits: Tensor) -> str | None:
    return cpu.why_not(logits)


register("column_mean", "cpu", _cpu, _cpu_why_not)
register("column_mean", "reference", reference.column_mean)
