"""matvec: the mean logits of a batch, from its mean features and the prototypes."""

import torch
from torch import Tensor

from . import cpu, distill
from .dispatch import pick, register


@torch.no_grad()
def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix [K, D] @ vector [D] in the vector's dtype, whatever the matrix's. [K], no gradient.

    ValueError for other shapes.
    """
    if matrix.ndim != 2 or vector.shape != matrix.shape[1:]:
        raise ValueError(
            f"matvec takes a matrix [K, D] and a vector [D], "
            f"got {list(matrix.shape)} and {list(vector.shape)}"
        )
    with torch.autocast(vector.device.type, enabled=False):
        found: Tensor = pick("matvec", matrix, vector).run(matrix, vector)
    return found


@torch.library.custom_op("mokd_fast::matvec", mutates_args=())
def _operator(matrix: Tensor, vector: Tensor) -> Tensor:
    return cpu.matvec(matrix, vector)


@_operator.register_fake
def _(matrix, vector):
    return vector.new_empty(len(matrix))


def _cpu(matrix: Tensor, vector: Tensor) -> Tensor:
    if vector.dtype != torch.float32 or matrix.dtype == torch.float64:
        return _reference(matrix, vector)
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in (matrix, vector))
    if torch.compiler.is_compiling() or not plain:
        return _operator(matrix, vector)
    return cpu.matvec(matrix, vector)


def _cpu_why_not(matrix: Tensor, vector: Tensor) -> str | None:
    return distill.transformed(matrix, vector) or cpu.why_not(matrix, [vector])


def _reference(matrix: Tensor, vector: Tensor) -> Tensor:
    return matrix.to(vector.dtype) @ vector


register("matvec", "cpu", _cpu, _cpu_why_not)
register("matvec", "reference", _reference)
