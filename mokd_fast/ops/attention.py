"""The plain forms of feature_search and joint_attention: PyTorch's attention, or xformers'.

feature_search packs the queries of an image as the rows that share its tokens, nothing repeated;
joint_attention repeats the tokens, once a query. Letters as in `search`.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import register
from .distill import transformed
from .reference import joined

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows [b, H, M, d] over maps [b, H, N, d]


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    rows = (t.transpose(1, 2) for t in (query, key, value))  # theirs are [b, M, H, d]
    out: Tensor = memory_efficient_attention(*rows)
    return out.transpose(1, 2)


def _search(attention: Attention, *given: Any) -> tuple[Tensor, Tensor]:
    query, key, value, _ = given
    out = attention(query.permute(1, 2, 0, 3), key, value)
    return out.permute(2, 0, 1, 3), query.new_empty(0)


def _joint(attention: Attention, *given: Tensor) -> tuple[Tensor, Tensor]:
    Q, B = given[3].shape[:2]
    rows = (joined(x, t).flatten(0, 1) for t, x in zip(given[:3], given[3:], strict=True))
    out = attention(*rows).unflatten(0, (Q, B))
    return out[..., 1:, :], out[..., 0, :]


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(query, key, value)
    if query.device.type != "cpu" or key.shape[2] >= 16:
        return out
    # A row of fewer scores than a vector has, all NaN, it takes for a masked one and makes 0 of it.
    return torch.add(out, query.detach().amax(dim=-1, keepdim=True), alpha=0)


def _run(form: Any, attention: Attention, first: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(first.device.type, enabled=False):
        found: tuple[Tensor, Tensor] = form(attention, first, *rest)
    return found


def _sdpa_why_not(first: Tensor, *rest: Any, weights: bool = False) -> str | None:
    if weights or (rest and rest[-1] is True):
        return "it gives no attention weights"
    return transformed(first, *(t for t in rest if isinstance(t, Tensor)))


@cache  # to look takes as long as a launch, to import it seconds
def xformers_missing() -> str | None:
    """Why xformers has no kernels here, or None."""
    if find_spec("xformers") is None:
        return "xformers is not installed: pip install 'mokd_fast[xformers]'"
    try:
        # Where they do not load, xformers warns, and fails at the first call.
        loaded = import_module("xformers._cpp_lib")._cpp_library_load_exception is None
    except Exception as error:  # it imports much, which may fail in any way
        return f"xformers cannot be imported ({type(error).__name__}: {error})"
    if loaded:
        return None
    return (
        "the xformers here was built for another PyTorch, its kernels do not load (python -m "
        "xformers.info says more): install the one that belongs to this PyTorch"
    )


def _xformers_why_not(first: Tensor, *rest: Any, weights: bool = False) -> str | None:
    if first.device.type != "cuda":
        return f"xformers has no attention for {first.device.type} tensors"
    if first.dtype == torch.float64:
        return "xformers takes fp16, bf16 and fp32"
    return xformers_missing() or _sdpa_why_not(first, *rest, weights=weights)


for _op, _form in (("feature_search", _search), ("joint_attention", _joint)):
    register(_op, "sdpa", partial(_run, _form, _sdpa), _sdpa_why_not)
    register(_op, "xformers", partial(_run, _form, _xformers), _xformers_why_not)
