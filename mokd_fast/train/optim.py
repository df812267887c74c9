"""Optimizers with their parameter groups and schedules, as the official code sets them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .recipe import ModelConfig, ScheduleConfig
from .schedule import Schedule, cosine


class ScheduledOptimizer:
    """A torch optimizer whose groups follow (lr, weight decay) schedules."""

    def __init__(
        self, config: ModelConfig, model: nn.Module, *, total: int, warmup: int, lr_scale: float
    ) -> None:
        groups = parameter_groups(model, own_t_head=config.t_head_optimizer is not None)
        main = config.optimizer
        rows: list[tuple[ScheduleConfig, bool]] = [(main, True), (main, False)]
        if config.t_head_optimizer is not None:
            rows.append((config.t_head_optimizer, True))
        self.schedules: list[tuple[Schedule, Schedule | None]] = [
            (
                cosine(row.lr * lr_scale, row.final_lr, total, warmup),
                cosine(row.weight_decay, row.final_weight_decay, total) if decayed else None,
            )
            for row, decayed in rows
        ]
        options = [{"params": group, "weight_decay": 0.0} for group in groups]
        if main.name == "sgd":
            self.torch: torch.optim.Optimizer = torch.optim.SGD(
                options, lr=0.0, momentum=main.momentum, fused=True
            )
        else:
            self.torch = torch.optim.AdamW(options, lr=0.0, fused=True)

    def schedule(self, step: int) -> None:
        """Sets lr and weight decay for this optimizer step."""
        for group, (lr, decay) in zip(self.torch.param_groups, self.schedules, strict=True):
            group["lr"] = float(lr[step])
            if decay is not None:
                group["weight_decay"] = float(decay[step])

    def step(self, step: int, skip: Tensor) -> None:
        """Optimizer step number `step` from 0, then no gradients. Moves nothing if `skip` is set.

        `skip` (0-d bool) is read on the device: torch's fused optimizers take it as GradScaler's
        `found_inf`, and take back AdamW's step counters.
        """
        self.schedule(step)
        self._start_momentum()
        self.torch.found_inf = skip.float()  # type: ignore[attr-defined]
        self.torch.step()
        self.torch.zero_grad(set_to_none=True)

    def _start_momentum(self) -> None:
        """Zero momentum for tensors of SGD that have none yet.

        torch's fused SGD wants momentum for all tensors or for none, but the last layers, frozen at
        first, start later than the rest. Without dampening a start at 0 is the same arithmetic:
        m * 0 + g = g. A first step that is skipped leaves 0, where torch would leave its garbage.
        """
        for group in self.torch.param_groups:
            started = group["params"] if group.get("momentum") else []
            for parameter in (p for p in started if p.grad is not None):
                state = self.torch.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


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
        elif name.endswith(".bias") or parameter.ndim == 1:
            plain.append(parameter)
        else:
            decayed.append(parameter)
    return [decayed, plain, t_head] if own_t_head else [decayed, plain]


def freeze_last_layers(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """No gradient, so no update and no decay, for the prototypes of both heads."""
    for name, parameter in named:
        if ".last_layer." in name:
            parameter.grad = None
