"""A trained backbone as safetensors with the library's own key names."""

import json
from pathlib import Path
from typing import Any

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
    network that takes the state dict strictly; and whatever else is passed as `facts`.
    Raises UserError when the file cannot be written.

    Example:
        >>> with safetensors.safe_open(path, "pt") as file:  # doctest: +SKIP
        ...     arguments = json.loads(file.metadata()["create_model"])
        >>> model = timm.create_model(**arguments)  # doctest: +SKIP
        >>> model.load_state_dict(safetensors.torch.load_file(path))  # doctest: +SKIP
    """
    arguments = {
        "model_name": ALIASES.get(network.name, network.name),
        "num_classes": 0,
        "in_chans": channels,
        **network.kwargs,
    }
    if getattr(backbone, "pos_embed", None) is not None:
        arguments["img_size"] = size  # the position embedding has this grid
    state = {key: value.detach().cpu().contiguous() for key, value in backbone.state_dict().items()}
    facts["create_model"] = arguments
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path, {key: json.dumps(value) for key, value in facts.items()})
    except Exception as error:  # safetensors has an error type of its own for I/O
        raise UserError(f"{path} cannot be written: {error}") from error
    return path
