"""Weights of a file for a backbone, by the names of its own library: timm or torchvision."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.models import adapt_input_conv, load_state_dict
from torch import Tensor, nn

from ..errors import UserError

# Where libraries keep what follows the pooled feature; heads of distillation and of training too.
_CLASSIFIERS = ("fc.", "head.", "head_dist.", "classifier.", "aux1.", "aux2.", "AuxLogits.")
_SHOWN = 3  # how many names an error lists of each kind

State = dict[str, Tensor]


def load_backbone(backbone: nn.Module, name: str, path: Path, channels: int) -> str:
    """Loads `path` into `backbone`, in place; returns a sentence on what was adapted or left out.

    path: safetensors, or a .pth or .bin state dict (alone, or as "model" or "state_dict" of a
    training checkpoint, the EMA's first), which is loaded with weights_only. A classifier is left
    out, position embeddings and bias tables of another size are resized by timm's own filter, and
    a first convolution of other channels becomes one of `channels` as in timm. name: for messages.
    Raises UserError, with the first names of each kind, unless then every weight has its own.
    """
    state, size = _read(path)
    before = {key: tuple(value.shape) for key, value in state.items() if _is_tensor(value)}
    mine = backbone.state_dict()
    same = all(before.get(key) == value.shape for key, value in mine.items())
    if not (same and size is not None and size == _size_of(backbone)):  # no export of this network
        state = _filtered(backbone, state, size, path)
    _fit_first_conv(backbone, state, channels)
    heads = _classifiers(backbone)
    dropped = sorted(k for k in state if k not in mine and k.startswith(heads))
    state = {key: value for key, value in state.items() if key not in dropped}
    if faults := _faults(state, mine):
        raise UserError(
            f"{path} does not fit {name}: {'; '.join(faults)}. Give a file of this network with "
            "the names of timm (or of torchvision for its networks), or change name and kwargs"
        )
    backbone.load_state_dict(state, strict=False)  # num_batches_tracked may be absent
    changed = [
        f"{key} {list(before[key])} -> {list(value.shape)}"
        for key, value in state.items()
        if before.get(key, value.shape) != value.shape
    ]
    parts = [f"{len(state)} tensors of {path}"]
    parts += [f"left out: {_few(dropped)}"] if dropped else []
    parts += [f"adapted: {_few(changed)}"] if changed else []
    return "; ".join(parts)


def check_file(path: Path) -> None:
    """Raises UserError unless there is a file."""
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; give a .safetensors, .pth or .bin file of weights")


def _read(path: Path) -> tuple[dict[str, Any], Any]:
    """The state dict of a file, and the picture's size that an export of ours says it is for."""
    check_file(path)
    size = None
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            size = json.loads(metadata.get("create_model", "{}")).get("img_size")
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # each format has errors of its own
        reason = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{path} cannot be read as weights ({reason}): expected safetensors, or a state dict "
            "of tensors alone that torch.save wrote"
        ) from error
    if any(key.startswith("students.0.") for key in state):
        raise UserError(
            f"{path} is a checkpoint of mokd-fast, of whole models: export a backbone of it "
            "(mokd-fast export), or take all of it with --warm-start"
        )
    return state, size


def _filtered(backbone: nn.Module, state: State, size: Any, path: Path) -> State:
    """What timm's own filter of this family makes of other names, grids and windows."""
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    if size is not None:  # of the file, where the grid cannot be guessed from the count
        backbone.pretrained_model_args = {"img_size": size}  # type: ignore[assignment]
    try:
        return dict(convert(state, backbone))
    except Exception as error:  # it looks for what its own files have
        raise UserError(
            f"{path} is of another kind of network: timm's {convert.__module__} cannot convert it "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        if size is not None:
            del backbone.pretrained_model_args


def _fit_first_conv(backbone: nn.Module, state: State, channels: int) -> None:
    for name in _first_convs(backbone):
        weight, conv = state.get(f"{name}.weight"), backbone.get_submodule(name)
        if weight is None or weight.ndim != 4 or not isinstance(conv, nn.Conv2d):
            continue
        theirs = weight.shape[1] * conv.groups * channels // conv.in_channels
        if theirs != channels and theirs > 0:
            state[f"{name}.weight"] = adapt_input_conv(channels, weight, theirs)


def _first_convs(backbone: nn.Module) -> tuple[str, ...]:
    names = (getattr(backbone, "pretrained_cfg", None) or {}).get("first_conv")
    if names is None:
        convs = (name for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d))
        names = next(convs, ())
    return (names,) if isinstance(names, str) else tuple(names)


def _classifiers(backbone: nn.Module) -> tuple[str, ...]:
    names = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    return (*_CLASSIFIERS, *(f"{name}." for name in names))


def _faults(state: State, mine: State) -> list[str]:
    missing = [k for k in mine if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in mine]
    others = [
        f"{key} is {list(value.shape) if _is_tensor(value) else type(value).__name__} there, "
        f"{list(mine[key].shape)} here"
        for key, value in state.items()
        if key in mine and (not _is_tensor(value) or value.shape != mine[key].shape)
    ]
    broken = [
        key
        for key, value in state.items()
        if not others and key in mine and value.is_floating_point() and not value.isfinite().all()
    ]
    kinds = {"not in it": missing, "unknown here": unknown, "other shape": others}
    kinds["not finite"] = broken
    return [f"{kind}: {_few(names)}" for kind, names in kinds.items() if names]


def _few(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _size_of(backbone: nn.Module) -> Any:
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    return None if size is None else list(size)
