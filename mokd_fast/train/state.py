"""What a checkpoint holds: everything that the next step depends on, and nothing of NumPy."""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .resume import load_weights

if TYPE_CHECKING:
    from .loop import Trainer


def capture(trainer: Trainer) -> dict[str, Any]:
    """The state after `trainer.done` steps."""
    state: dict[str, Any] = {
        "step": trainer.done,  # of schedules and sampler too
        "recipe": trainer.recipe.model_dump(mode="json"),
        "data": trainer.fingerprint,
        "loader": trainer.loader.loader,
        "world": trainer.world.size,
        "versions": versions(trainer),
        "model": trainer.mokd.state_dict(),
        "optimizers": [optimizer.torch.state_dict() for optimizer in trainer.optimizers],
        "scalers": [scaler.state_dict() for scaler in trainer.scalers],
        "skipped": trainer.skipped,
        "bad_files": trainer.loader.bad_files,
        "known_bad": sorted(trainer.known_bad),
    }
    rng = {"cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(trainer.device)
    others = trainer.world.gather(rng)[1:]
    return state | {"rng": rng, "rng of the others": others}


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """The inverse of `capture`; what had other versions is said, not refused."""
    mine, theirs = versions(trainer), state.get("versions", {})
    other = [f"{k} {theirs[k]} then, {v} now" for k, v in mine.items() if theirs.get(k, v) != v]
    if other:
        trainer.say(f"warning: not bit-equal to a run in one piece: {', '.join(other)}")
    load_weights(trainer.mokd, state, trainer.run)
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load(saved)
    for scaler, saved in zip(trainer.scalers, state.get("scalers", []), strict=True):
        scaler.load_state_dict(saved)
    trainer.skipped = state.get("skipped", [])
    trainer.loader.bad_files.update(state.get("bad_files", {}))
    trainer.done = state["step"]
    rng = [state["rng"], *state.get("rng of the others", [])][trainer.world.rank]
    torch.set_rng_state(rng["cpu"])  # last: what is above may draw numbers
    if trainer.device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], trainer.device)


def versions(trainer: Trainer) -> dict[str, str]:
    """What else the bits of a result depend on."""
    packages = ("mokd_fast", "torchvision", "timm", "numpy", "pillow")
    found = {"torch": str(torch.__version__)} | {name: version(name) for name in packages}
    if trainer.loader.loader == "dali":
        found["dali"] = str(import_module("nvidia.dali").__version__)
    found |= {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    if trainer.device.type == "cuda":
        name = torch.cuda.get_device_name(trainer.device)
    else:
        name = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return found | {"device": name, "precision": trainer.precision, "prototype loss": trainer.way}


def not_finite(trainer: Trainer) -> str | None:
    """The name of the first weight, centre or optimizer state that is not finite.

    One host read. Of 1e20 in fp32 the norm is infinite as well: no weight that anybody wants.
    """
    named: dict[str, Tensor] = dict(trainer.mokd.state_dict())
    for i, optimizer in enumerate(trainer.optimizers, start=1):
        for j, (_, row) in enumerate(optimizer.torch.state.items()):
            named |= {f"{key} {j} of optimizer {i}": value for key, value in row.items()}
    device = trainer.device.type  # step counters may stay on the host
    named = {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and value.numel()
        and value.device.type == device
    }
    norms = torch._foreach_norm(list(named.values()))
    finite = torch.stack([norm.isfinite() for norm in norms]).tolist()
    return next((name for name, good in zip(named, finite, strict=True) if not good), None)
