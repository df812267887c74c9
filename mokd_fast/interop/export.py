"""A trained backbone as safetensors with the library's own key names."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import UserError
from ..nn.backbones import ALIASES
from ..nn.build import NetworkConfig


def export_backbone(
    backbone: nn.Module,
    network: NetworkConfig,
    path: Path,
    *,
    channels: int,
    size: tuple[int, int],
    **facts: Any,
) -> Path:
    """Writes the backbone's state dict to `path`; returns it.

    The file's metadata hold, as JSON, `create_model`: the arguments with which timm builds a
    network that takes the state dict strictly; and whatever else is passed as `facts`. For a
    network of torchvision alone they hold `get_model` instead, the arguments of
    torchvision.models.get_model, and the state dict lacks what follows the last map.
    Raises UserError when the file cannot be written.

    Example:
        >>> with safetensors.safe_open(path, "pt") as file:  # doctest: +SKIP
        ...     arguments = json.loads(file.metadata()["create_model"])
        >>> model = timm.create_model(**arguments)  # doctest: +SKIP
        >>> model.load_state_dict(safetensors.torch.load_file(path))  # doctest: +SKIP
    """
    name = ALIASES.get(network.name, network.name)
    if timm.is_model(name):
        facts["create_model"] = _timm_arguments(name, network.kwargs, channels, size)
    else:
        facts["get_model"] = {"name": name, **network.kwargs}
    state = {  # cloned: safetensors refuses tensors that share memory, as tied weights do
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in backbone.state_dict().items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path, {key: json.dumps(value) for key, value in facts.items()})
    except Exception as error:  # safetensors has an error type of its own for I/O
        raise UserError(f"{path} cannot be written: {error}") from error
    return path


def _timm_arguments(
    name: str, kwargs: dict[str, Any], channels: int, size: tuple[int, int]
) -> dict[str, Any]:
    arguments = {"model_name": name, "num_classes": 0, "in_chans": channels, **kwargs}
    try:  # position embeddings and bias tables have the grid of this size
        sized = {"img_size": size, **arguments}
        timm.create_model(**sized)  # only the constructor knows whether it takes one
    except TypeError:
        return arguments
    return sized
