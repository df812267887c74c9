"""Activation checkpointing: what backward needs of a block is made again there, and not kept.

timm says where it cuts a network (`set_grad_checkpointing`), the T-Head is cut into its blocks, and
a network that is not cut (torchvision's, some of timm's) is made again as a whole: then one forward
pass's activations are there at a time, and not those of both students and all crops.

The second pass is the first bit by bit: torch brings the generator's state and autocast back, so
drop-path drops the same. Only running statistics (BatchNorm) would move twice.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .mokd import Model


def checkpoint_activations(model: "Model", enable: bool = True) -> None:
    """Makes the activations of a student's backbone and T-Head again in backward, or keeps them.

    Losses, gradients and running statistics keep their bits. To be called after
    `convert_sync_batchnorm`, which replaces modules. A teacher has no backward: nothing to save.
    """
    cut = _cut(model.backbone, enable)
    model.whole_again = enable and not cut
    if model.t_head is not None:
        model.t_head.grad_checkpointing = enable
    for module in model.backbone.modules():
        if any(map(is_statistic, module._buffers)) and not _moves_once(module):
            _MovesOnce(module)


def is_statistic(name: str) -> bool:
    """Whether a buffer of this name is a running statistic, which a forward pass moves."""
    return name.startswith("running_") or name == "num_batches_tracked"


def _cut(backbone: nn.Module, enable: bool) -> bool:
    """Whether timm makes this network's blocks again."""
    if not hasattr(backbone, "set_grad_checkpointing"):  # torchvision's
        return False
    try:
        backbone.set_grad_checkpointing(enable)  # type: ignore[operator]
    except AssertionError:  # timm's way to say that it does not cut this one
        return False
    return True


class _MovesOnce:
    """Hooks of a module with running statistics: in a second pass it moves copies of them."""

    def __init__(self, module: nn.Module) -> None:
        self.kept: dict[str, Tensor] = {}
        module.register_forward_pre_hook(self.lend)
        # Always: a second pass breaks off by an exception when it has all that backward asked for.
        module.register_forward_hook(self.put_back, always_call=True)

    def lend(self, module: nn.Module, _: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # not in backward, as FSDP finds out
            return
        for name, value in module.named_buffers(recurse=False):
            if is_statistic(name):
                self.kept[name] = value
                setattr(module, name, value.clone())

    def put_back(self, module: nn.Module, *_: Any) -> None:
        for name, value in self.kept.items():
            setattr(module, name, value)
        self.kept = {}


def keeps_statistics(hook: Any) -> bool:
    """Whether a hook is one of these, which look at no result."""
    return isinstance(getattr(hook, "__self__", None), _MovesOnce)


def _moves_once(module: nn.Module) -> bool:
    return any(map(keeps_statistics, module._forward_pre_hooks.values()))
