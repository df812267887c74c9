"""Linear layers by oneDNN, for the CPU: F.linear and mm leave fp32 to another library.

That takes about twice as long (linear_parts.json, by `bench/linear_distill.py --parts`).
"""

import torch
from torch import Tensor


def usable(device: str, dtype: torch.dtype) -> bool:
    """Whether `linear` takes tensors of this type of device and dtype; it has no gradient."""
    onednn = torch.backends.mkldnn
    known = dtype in (torch.float32, torch.bfloat16)
    return device == "cpu" and known and onednn.is_available() and bool(onednn.enabled)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """gelu(x @ weight.T + bias), [.., D] and [N, D] -> [.., N]; x must not be empty."""
    then: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, *then)
    return found
