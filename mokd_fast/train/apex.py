"""NVIDIA apex's fused optimizers, where the genuine apex is installed.

What is used of it (read in NVIDIA/apex 6424da3), none of which apex promises to keep:
* `zero_grad()` takes no argument, and `FusedSGD` looks at an int32 flag, `_dummy_overflow_buf`;
* `FusedAdam(capturable=True)` and `FusedMixedPrecisionLamb` (the arithmetic of `FusedLAMB`, which
  knows no flag and counts on the host) ask a GradScaler for the flag and the scale, and read a
  group's `lr` (fp32) and `step` (int32) on the device;
* both count the steps of a group, even one without a gradient; LAMB fails on such a group, and
  its `load_state_dict` leaves tensors on the device that they come from.
"""

import contextlib
import inspect
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from .adapters import Adapter, Row, groups_of, start_momentum
from .recipe import OptimizerConfig

DEVICE = "cuda"  # apex has kernels for nothing else
INSTEAD = {"apex-sgd": "sgd", "apex-adamw": "adamw", "apex-lamb": "adamw"}
INSTALL = (
    "Build NVIDIA's from source: git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ."
)


def check(key: str, name: str, device: torch.device) -> None:
    """Raises UserError where the optimizer `name`, set by the recipe's `key`, cannot run."""
    if name not in INSTEAD:
        return
    if device.type != DEVICE:
        raise UserError(
            f"{key}={name} needs a CUDA device, and this run is on {device.type}: NVIDIA apex has "
            f"kernels for nothing else. Set {key}={INSTEAD[name]}"
        )
    if reason := why_not():
        raise UserError(f"{key}={name}: {reason} Or set {key}={INSTEAD[name]}")


def is_nvidia() -> bool:
    """Whether the package apex is NVIDIA's. It is not imported: PyPI's fails on what it needs."""
    spec = find_spec("apex")
    folders = (spec and spec.submodule_search_locations) or []
    return any((Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders)


def why_not() -> str | None:
    """In sentences, why NVIDIA's apex cannot be used here and what to do; None where it can."""
    spec = find_spec("apex")
    if spec is None:
        return f"NVIDIA apex is not installed (PyPI's apex is another package). {INSTALL}"
    where = next(iter(spec.submodule_search_locations or []), spec.origin)
    if not is_nvidia():
        return (
            f"the apex in {where} is not NVIDIA's (that of PyPI is a toolkit for the Pyramid web "
            f"framework): pip uninstall apex. {INSTALL}"
        )
    if find_spec("amp_C") is None:
        return (
            f"the NVIDIA apex in {where} was built without its CUDA extension (there is no module "
            f"amp_C). {INSTALL}"
        )
    try:
        import_module("amp_C")
        adam = import_module("apex.optimizers").FusedAdam
        old = "capturable" not in inspect.signature(adam).parameters
    except (ImportError, OSError, AttributeError) as error:
        return f"the NVIDIA apex in {where} does not load with this torch ({error}). {INSTALL}"
    return f"the NVIDIA apex in {where} is older than 2022. {INSTALL}" if old else None


class SGD(Adapter):
    def __init__(self, rows: list[Row], config: OptimizerConfig) -> None:
        fused = import_module("apex.optimizers").FusedSGD
        self.torch = fused(groups_of(rows), lr=0.0, momentum=config.momentum, set_grad_none=True)

    def step(self, skip: Tensor) -> None:
        start_momentum(self.torch)
        self.torch._dummy_overflow_buf.copy_(skip)  # type: ignore[attr-defined]
        self.torch.step()


class _OnDevice(Adapter):
    """FusedAdam and LAMB with rate, flag and counters on the device."""

    counts_groups = True
    _beside: ClassVar[str]  # apex's list of fp32 copies, one a group (ours is fp32: of None)

    def step(self, skip: Tensor) -> None:
        with self._started() as groups:
            rates = [group["lr"] for group in groups]
            counts = [self._count(group, skip.device) for group in groups]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = torch.full((), rate, device=skip.device)
            # FusedAdam's first group counts by the flag of the step before, the others by this one.
            self.torch._dummy_overflow_buf.zero_()  # type: ignore[attr-defined]
            self.torch.step(grad_scaler=_Scaler(skip))  # type: ignore[call-overload]
            for group, rate, count in zip(groups, rates, counts, strict=True):
                group["lr"] = rate  # a number, as in every other checkpoint
                group["step"].copy_(count + ~skip)

    def load(self, state: dict[str, Any]) -> None:
        """With the tensors on the device of the parameters."""
        device = self.torch.param_groups[0]["params"][0].device

        def moved(rows: dict[str, Any]) -> dict[str, Any]:
            return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in rows.items()}

        groups = [moved(group) for group in state["param_groups"]]
        of_tensors = {i: moved(row) for i, row in state["state"].items()}
        self.torch.load_state_dict({"state": of_tensors, "param_groups": groups})

    @staticmethod
    def _count(group: dict[str, Any], device: torch.device) -> Tensor:
        """Steps of a group so far, a copy. FusedAdam would start at 1 from the host."""
        if "step" not in group:
            group["step"] = torch.zeros(1, dtype=torch.int32, device=device)
        return group["step"].clone()

    @contextlib.contextmanager
    def _started(self) -> Iterator[list[dict[str, Any]]]:
        """The groups that have a gradient; apex sees no others."""
        apex, beside = self.torch, getattr(self.torch, self._beside)
        groups = apex.param_groups
        live = [any(p.grad is not None for p in group["params"]) for group in groups]
        apex.param_groups = [g for g, is_live in zip(groups, live, strict=True) if is_live]
        setattr(apex, self._beside, [b for b, is_live in zip(beside, live) if is_live])  # noqa: B905
        try:
            yield apex.param_groups
        finally:
            apex.param_groups = groups
            setattr(apex, self._beside, beside)


class AdamW(_OnDevice):
    _beside = "param_groups_master"

    def __init__(self, rows: list[Row], config: OptimizerConfig) -> None:
        fused = import_module("apex.optimizers").FusedAdam
        self.torch = fused(groups_of(rows), lr=0.0, adam_w_mode=True, capturable=True)


class Lamb(_OnDevice):
    """LAMB (arXiv:1904.00962): AdamW whose step of a decayed tensor w has the length lr * |w|.

    Its clip of the norm of all gradients together is off: the recipe's `clip` was there before.
    """

    by_layer = True
    _beside = "param_groups_full_precision"  # empty before the first step, which fills it

    def __init__(self, rows: list[Row], config: OptimizerConfig) -> None:
        fused = import_module("apex.optimizers").FusedMixedPrecisionLamb
        self.torch = fused(groups_of(rows), lr=0.0, max_grad_norm=float("inf"))


class _Scaler:
    """What apex asks of a GradScaler. The gradients were unscaled before they were clipped."""

    def __init__(self, skip: Tensor) -> None:
        self._found = skip.float().view(1)

    def _check_inf_per_device(self, optimizer: object) -> dict[torch.device, Tensor]:
        return {self._found.device: self._found}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self._found)
