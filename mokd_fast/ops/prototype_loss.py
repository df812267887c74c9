"""prototype_loss: a prototype layer and its distillation cross-entropy, whichever way is best here.

    fused         the logits are stored: a product, then distill_cross_entropy
    fused-linear  they are not: linear_distill_cross_entropy
    reference     they are stored, and the loss is plain PyTorch

The automatic choice stores logits where that was measured faster and memory allows.
"""

import os
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .dispatch import constant, pick, register
from .distill import Target, distill_cross_entropy
from .linear_chunks import KEEP_BYTES
from .linear_distill import (
    LinearTarget,
    check_linear,
    linear_distill_cross_entropy,
    product_dtype,
)
from .prototype_linear import needs_no_matrix, prototype_linear
from .weight_norm import WeightNormed

OP = "prototype_loss"
# A step of MOKD has four such calls alive at once: together they may take a quarter.
SHARE = 16  # logits of a call may take this fraction of the device's memory


def prototype_loss(
    features: Tensor,
    weight: Tensor | WeightNormed,
    targets: Sequence[LinearTarget | Target],
    *,
    temperature: float | Tensor = 0.1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_distill_cross_entropy`, with or without stored logits; arguments and results are its.

    weight: may be a `WeightNormed`, which stored logits do without the matrix of.
    backend: "fused", "fused-linear" or "reference" (above); None for the automatic choice, which
        `explain("prototype_loss", features, weight, targets)` gives the reasons of.
    """
    given = weight.v if isinstance(weight, WeightNormed) else weight
    check_linear(features, given, targets, temperature)
    chosen = pick(OP, features, weight, targets, temperature, backend=backend)
    loss, per_target = chosen.run(features, weight, targets, temperature=temperature)
    return loss, per_target


def _stored(
    features: Tensor,
    weight: Tensor | WeightNormed,
    targets: Sequence[LinearTarget | Target],
    *,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    dtype = product_dtype(features)
    logits = prototype_linear(features, weight, dtype)
    stored = [t.stored(dtype) if isinstance(t, LinearTarget) else t for t in targets]
    return distill_cross_entropy(logits, stored, temperature=temperature)


def _made(
    features: Tensor,
    weight: Tensor | WeightNormed,
    targets: Sequence[LinearTarget | Target],
    *,
    temperature: float | Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    if isinstance(weight, WeightNormed):
        weight = weight.matrix(product_dtype(features))
    return linear_distill_cross_entropy(
        features, weight, targets, temperature=temperature, backend=backend
    )


def _slower(
    features: Tensor,
    weight: Tensor | WeightNormed,
    targets: Sequence[LinearTarget | Target],
    temperature: float | Tensor = 0.1,
) -> str | None:
    """Why stored logits are avoided, or None."""
    views, images, _ = features.shape
    dtype = product_dtype(features)
    teachers = sum(len(t.rows) for t in targets if isinstance(t, LinearTarget))
    logits = (views + teachers) * images * len(weight) * dtype.itemsize
    fp32 = features.device.type == "cpu" and dtype == torch.float32
    if fp32 and logits > KEEP_BYTES and not _own_product(features, weight):
        return "but it was measured slower in fp32 on a CPU (bench/linear_distill.py)"
    size = logits + views * images * len(weight) * dtype.itemsize  # the gradient
    memory = device_memory(features.device.type, features.get_device())
    if size * SHARE > memory:
        return f"but its logits take {_gib(size)}, more than 1/{SHARE} of {_gib(memory)}"
    return None


def _smaller(
    features: Tensor,
    weight: Tensor | WeightNormed,
    targets: Sequence[LinearTarget | Target],
    temperature: float | Tensor = 0.1,
) -> str | None:
    """Why the chunks are avoided, or None."""
    if _slower(features, weight, targets, temperature):
        return None
    kind, dtype = features.device.type, product_dtype(features)
    if (kind, dtype) == ("cpu", torch.float32):
        if _own_product(features, weight):
            return "but storing was measured faster with a weight norm on a CPU (bench/step.py)"
        return "but so few logits are stored as well"  # it would keep them all
    if (kind, dtype) == ("cpu", torch.bfloat16):
        return "but storing was measured faster in bf16 on a CPU (bench/linear_distill.py)"
    if kind == "cuda":
        return "but storing takes about half its time on a GPU (bench/linear_distill_gpu.py)"
    return "but the logits fit; which is faster has not been measured"


def _own_product(features: Tensor, weight: Tensor | WeightNormed) -> bool:
    """Whether a CPU multiplies prototypes in fp32 without making their matrix."""
    if not isinstance(weight, WeightNormed):
        return False
    return needs_no_matrix(features, weight, torch.float32)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


@constant
def device_memory(kind: str, index: int) -> int:
    """Bytes of memory that a device has, used or not."""
    if kind == "cuda":
        return torch.cuda.get_device_properties(index).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


register(OP, "fused", _stored, avoid=_slower)
register(OP, "fused-linear", _made, avoid=_smaller)
register(OP, "reference", partial(_made, backend="reference"))
