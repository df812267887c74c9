"""BatchNorm layers and timm's residual blocks, whose sum and ReLU are made in the pass that
normalises (ops/batch_norm.py). Modules, keys and hooks stay timm's own: `quicken` changes classes,
and what a class here cannot do as one it does as timm.
"""

from typing import Any

import timm.layers
from timm.models import checkpoint_seq, resnet
from torch import Tensor, nn

from ..ops import batch_norm
from .blocks import watched
from .checkpointing import keeps_statistics
from .tally import Counted

ACTIVATIONS = ("act1", "act2", "act3")
NOTHING = ("drop_block", "aa")  # nn.Identity unless asked for
OPTIONAL = ("se", "drop_path")  # and None


class BatchNorm2d(Counted, nn.BatchNorm2d):
    """nn.BatchNorm2d, then + `added` and ReLU if asked for."""

    def forward(self, x: Tensor, added: Tensor | None = None, relu: bool = False) -> Tensor:
        self._check_input_dim(x)
        return _normalised(self, x, added, relu)


class BatchNormAct2d(Counted, timm.layers.BatchNormAct2d):
    """timm's, where its activation is a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or not (_is(self.drop, nn.Identity) and _is(self.act, nn.ReLU)):
            found: Tensor = super().forward(x)
            return found
        return _normalised(self, x, None, True)


def _normalised(norm: Any, x: Tensor, added: Tensor | None, relu: bool) -> Tensor:
    """What nn.BatchNorm2d.forward says of statistics."""
    moves = norm.training and norm.track_running_stats
    momentum = norm.momentum or 0.0
    if moves and norm.num_batches_tracked is not None:
        if norm.momentum is None:  # a cumulative average
            norm.num_batches_tracked.add_(1)
            momentum = 1.0 / float(norm.num_batches_tracked)
        else:
            norm.count()
    mean, var = norm.running_mean, norm.running_var
    own = norm.training or (mean is None and var is None)
    if norm.training and not norm.track_running_stats:
        mean = var = None
    arguments = mean, var, norm.weight, norm.bias, own, momentum, norm.eps
    return batch_norm(x, *arguments, added=added, relu=relu)


class _Residual:
    """relu(norm(conv(... relu(norm(conv(x))))) + shortcut), of two or three convolutions."""

    downsample: Any

    def forward(self, x: Tensor) -> Tensor:
        if not _joins(self):  # type: ignore[arg-type]
            found: Tensor = super().forward(x)  # type: ignore[misc]
            return found
        y, count = x, _count(self)
        for i in range(1, count):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y), relu=True)
        y = getattr(self, f"conv{count}")(y)
        shortcut = x if self.downsample is None else self.downsample(x)
        result: Tensor = getattr(self, f"bn{count}")(y, shortcut, relu=True)
        return result


class BasicBlock(_Residual, resnet.BasicBlock):
    pass


class Bottleneck(_Residual, resnet.Bottleneck):
    pass


class ResNet(resnet.ResNet):
    """timm's, whose stem has a BatchNorm and a ReLU as well."""

    def forward_features(self, x: Tensor) -> Tensor:
        if not (_takes_more(self.bn1) and _is(self.act1, nn.ReLU)):
            found: Tensor = super().forward_features(x)
            return found
        x = self.maxpool(self.bn1(self.conv1(x), relu=True))
        stages: list[Any] = [self.layer1, self.layer2, self.layer3, self.layer4]
        if self.grad_checkpointing:
            x = checkpoint_seq(stages, x, flatten=True)
            return x
        for stage in stages:
            x = stage(x)
        return x


def _count(block: Any) -> int:
    return 3 if hasattr(block, "conv3") else 2


def _joins(block: nn.Module) -> bool:
    """Whether a block is no more than _Residual says and nobody looks between its parts."""
    parts = block._modules
    return (
        all(_takes_more(parts[f"bn{i}"]) for i in range(1, _count(block) + 1))
        and all(_is(parts[name], nn.ReLU) for name in ACTIVATIONS if name in parts)
        and all(_is(parts[name], nn.Identity) for name in NOTHING if name in parts)
        and all(getattr(block, name, None) is None for name in OPTIONAL)
    )


def _takes_more(norm: nn.Module | None) -> bool:
    return _is(norm, BatchNorm2d)


def _is(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether it is of this very class and has no hooks but those of checkpointing."""
    if type(module) is not kind or watched():
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(map(keeps_statistics, hooks))


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: BatchNorm2d,
    timm.layers.BatchNormAct2d: BatchNormAct2d,
    resnet.BasicBlock: BasicBlock,
    resnet.Bottleneck: Bottleneck,
    resnet.ResNet: ResNet,
}
