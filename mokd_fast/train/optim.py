"""Optimizers with their parameter groups and schedules, as the official code sets them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..ops.update import Clip, Ema
from . import adapters, apex
from .adapters import Adapter, Fused, Row
from .recipe import ModelConfig
from .schedule import Schedule, cosine

LAST_LAYERS = ".last_layer."  # in the names of both heads' prototypes

KINDS: dict[str, type[Adapter]] = {
    "sgd": adapters.SGD,
    "adamw": adapters.AdamW,
    "lars": adapters.Lars,
    "apex-sgd": apex.SGD,
    "apex-adamw": apex.AdamW,
    "apex-lamb": apex.Lamb,
}


class ScheduledOptimizer:
    """An optimizer whose groups follow (lr, weight decay) schedules; `torch` is the optimizer."""

    def __init__(
        self, config: ModelConfig, model: nn.Module, *, total: int, warmup: int, lr_scale: float
    ) -> None:
        kind = KINDS[config.optimizer.name]
        rows = _rows(config, model, kind)
        self.schedules: list[tuple[Schedule, Schedule | None]] = [
            (
                cosine(rates.lr * lr_scale, rates.final_lr, total, warmup),
                cosine(rates.weight_decay, rates.final_weight_decay, total) if decayed else None,
            )
            for _, rates, decayed in rows
        ]
        self._adapter = kind(rows, config.optimizer)
        self.torch = self._adapter.torch

    def schedule(self, step: int) -> None:
        """Sets lr and weight decay for optimizer step number `step` from 0."""
        for group, (lr, decay) in zip(self.torch.param_groups, self.schedules, strict=True):
            group["lr"] = float(lr[step])
            if decay is not None:
                group["weight_decay"] = float(decay[step])
        if isinstance(self._adapter, Fused):
            self._adapter.fill_rates()

    def rates_on_device(self) -> None:
        """For a CUDA graph of `step`, which takes the rates of the last `schedule` then."""
        assert isinstance(self._adapter, Fused)  # refuse_graph refuses the others
        self._adapter.rates_on_device([decay is not None for _, decay in self.schedules])

    def step(self, skip: Tensor, clip: Clip | None = None, ema: Ema | None = None) -> None:
        """A step at the rates of the last `schedule`, after the clip and before the EMA; then no
        gradients. Moves nothing but the teacher if `skip` (0-d bool, read on the device) is set."""
        self._adapter.update(skip, clip, ema)
        for group in self.torch.param_groups:  # apex's zero_grad takes no set_to_none
            for parameter in group["params"]:
                parameter.grad = None

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `torch.state_dict()`; tensors may be on any device."""
        self._adapter.load(state)


def _rows(config: ModelConfig, model: nn.Module, kind: type[Adapter]) -> list[Row]:
    """The parameter groups of one kind of optimizer."""
    main, own = config.optimizer, config.t_head_optimizer
    groups = parameter_groups(model, own_t_head=own is not None)
    rows = [Row(groups[0], main, True), Row(groups[1], main, False)]
    if own is not None:
        # The official group has biases and norms in it: tensors that a rate for the norm of each,
        # 0 at first for a bias, would hold fast.
        named = list(model.named_parameters())
        plain = {p for name, p in named if kind.by_layer and _is_plain(name, p)}
        rows.append(Row([p for p in groups[2] if p not in plain], own, True))
        if plain:
            rows.append(Row([p for p in groups[2] if p in plain], own, False))
    if kind.counts_groups:
        last = {p for name, p in model.named_parameters() if LAST_LAYERS in name}
        parts = [
            row._replace(parameters=[p for p in row.parameters if (p in last) == frozen])
            for row in rows
            for frozen in (False, True)
        ]
        rows = [part for part in parts if part.parameters]
    return rows


def parameter_groups(model: nn.Module, *, own_t_head: bool) -> list[list[nn.Parameter]]:
    """[decayed, not decayed] or, with `own_t_head`, [decayed, not decayed, T-Head].

    Not decayed are `.bias` and 1-D tensors alone: class token, position embedding and both parts
    of the weight norm are decayed. In the official CNN optimizer the T-Head is a group of its
    own, biases and norms included.
    """
    decayed, plain, t_head = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if own_t_head and name.startswith("t_head."):
            t_head.append(parameter)
        elif _is_plain(name, parameter):
            plain.append(parameter)
        else:
            decayed.append(parameter)
    return [decayed, plain, t_head] if own_t_head else [decayed, plain]


def _is_plain(name: str, parameter: nn.Parameter) -> bool:
    return name.endswith(".bias") or parameter.ndim == 1


def freeze_last_layers(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """No gradient, so no update and no decay, for the prototypes of both heads."""
    for name, parameter in named:
        if LAST_LAYERS in name:
            parameter.grad = None
