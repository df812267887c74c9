"""Any timm or torchvision network as a pooled feature and a token map.

The backbone stays the library's own module, so its state dict is the library's; `features` runs
it. Letters: B images, C channels, N = h * w tokens.
"""

import difflib
import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import DropPath
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import StochasticDepth

from ..errors import UserError
from . import packed, tiny  # noqa: F401  (tiny registers its models with timm)

ALIASES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
}


class Features(NamedTuple):
    pooled: Tensor  # [B, C]
    tokens: Tensor  # [B, N, C], row by row
    grid: tuple[int, int]  # (h, w) of the tokens


class Layout(NamedTuple):
    """What a backbone gives at the global crop size."""

    width: int  # C
    grid: tuple[int, int]
    is_map: bool  # a CNN's map, not a transformer's tokens


def features(model: nn.Module, x: Tensor) -> Features:
    """Pooled feature and token map of pictures x [B, channels, H, W] under `model`."""
    if type(model) is VisionTransformer:  # its subclasses embed positions in ways of their own
        tokens, grid = _embedded(model, x)
        again = model.grad_checkpointing
        tokens = checkpoint_seq(model.blocks, tokens) if again else model.blocks(tokens)
        return _vit_features(model, tokens, grid)
    if isinstance(model, torch.fx.GraphModule):  # torchvision, see _torchvision
        y = model(x)["map"]
        pooled = y.mean(dim=(2, 3))
    else:
        y = model.forward_features(x)  # type: ignore[operator]
        pooled = model.forward_head(y, pre_logits=True)  # type: ignore[operator]
    if not isinstance(y, Tensor):
        raise UserError(f"its forward_features gives a {type(y).__name__}, not one map")
    if y.ndim == 3:
        y = y[:, getattr(model, "num_prefix_tokens", 0) :]
        return Features(pooled, y, _grid_of(model, x, y.shape[1]))
    if y.shape[1] == getattr(model, "num_features", pooled.shape[1]):
        y = y.permute(0, 2, 3, 1)  # [B, h, w, C]; a channels_last map needs no copy
    return Features(pooled, y.flatten(1, 2), (y.shape[1], y.shape[2]))


def packed_features(model: VisionTransformer, groups: Sequence[Tensor]) -> list[Features]:
    """`features` of each group of pictures, all in one pass of the blocks (see `packed`)."""
    embedded = [_embedded(model, x) for x in groups]
    found = packed.run(model.blocks, [tokens for tokens, _ in embedded])
    return [
        _vit_features(model, tokens, grid)
        for tokens, (_, grid) in zip(found, embedded, strict=True)
    ]


def _vit_features(model: VisionTransformer, x: Tensor, grid: tuple[int, int]) -> Features:
    tokens = model.norm(x)
    pooled = model.forward_head(tokens, pre_logits=True)
    return Features(pooled, tokens[:, model.num_prefix_tokens :], grid)


def _embedded(model: VisionTransformer, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """What timm's blocks get, with the official position embedding. [B, prefix + N, C]"""
    x = model.patch_embed(x)  # [B, h, w, C]: built with dynamic_img_size
    grid = (x.shape[1], x.shape[2])
    x = x.flatten(1, 2)
    learned = [token for token in (model.cls_token, model.reg_token) if token is not None]
    prefix = [token.expand(len(x), -1, -1) for token in learned]
    if model.pos_embed is None:
        x = torch.cat([*prefix, x], dim=1)
    else:
        taken = 0 if model.no_embed_class else model.num_prefix_tokens
        patches = resize_positions(model.pos_embed[:, taken:], model.patch_embed.grid_size, grid)
        x = torch.cat([*prefix, x + patches], dim=1)
        if taken:
            x = x + F.pad(model.pos_embed[:, :taken], (0, 0, 0, x.shape[1] - taken))
    return model.norm_pre(model.patch_drop(model.pos_drop(x))), grid


def resize_positions(pos: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embedding [1, h*w, C] of grid `old` for grid `new`: bicubic, no antialias.

    The scale is (n + 0.1) / N as in DINO and official MOKD; timm's own resize differs from it by
    up to 81 %.
    """
    if old == new:
        return pos
    grid = pos.unflatten(1, old).permute(0, 3, 1, 2)
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def build_backbone(
    name: str,
    *,
    channels: int = 3,
    size: tuple[int, int] = (224, 224),
    drop_path: float = 0.0,
    kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """The network called `name`, randomly initialised, without a classifier.

    A timm name first, a torchvision name otherwise. timm's ResNets are built as torchvision's
    (no zero-init of the last BatchNorm); a ViT's class token starts with std 0.02 (official MOKD).
    `size` is the global crop size (H, W), `kwargs` go to the network's own constructor. Without
    `drop_path` and a drop rate in `kwargs` nothing is random, whatever the library's default.

    Raises UserError for an unknown name, with the nearest ones, and for kwargs it does not take.
    """
    name = ALIASES.get(name, name)
    kwargs = dict(kwargs or {})
    if drop_path:
        kwargs["drop_path_rate"] = drop_path
    try:
        if timm.is_model(name):
            return _without_drop(_timm(name, channels, size, kwargs), kwargs)
        if name in torchvision.models.list_models(module=torchvision.models):
            return _without_drop(_torchvision(name, channels, kwargs), kwargs)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"model {name!r} cannot be built with {kwargs}: {error}") from error
    known = [*ALIASES, *timm.list_models(), *torchvision.models.list_models()]
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
    raise UserError(f"unknown model {name!r}: neither timm nor torchvision has it; {hint}")


def is_drop_rate(key: str) -> bool:
    """Whether a constructor's keyword sets drop-path or a dropout, in either library."""
    return "drop" in key or key == "stochastic_depth_prob"


def _without_drop(model: nn.Module, kwargs: dict[str, Any]) -> nn.Module:
    """Drop-path and dropout at 0 unless `kwargs` set a rate: Swin's is 0.1 by default."""
    if any(is_drop_rate(key) for key in kwargs):
        return model
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, (StochasticDepth, nn.modules.dropout._DropoutNd)):
            module.p = 0.0
    return model


def _timm(name: str, channels: int, size: tuple[int, int], kwargs: dict[str, Any]) -> nn.Module:
    if inspect.getmodule(timm.model_entrypoint(name)) is timm.models.resnet:
        kwargs.setdefault("zero_init_last", False)
    build = partial(timm.create_model, name, num_classes=0, in_chans=channels)
    # Only the constructor knows whether it has a position grid, and whether that can move.
    for sized in ({"img_size": size, "dynamic_img_size": True}, {"img_size": size}):
        try:
            model = build(**kwargs, **sized)
            break
        except TypeError:
            continue
    else:
        model = build(**kwargs)
    if type(model) is VisionTransformer and model.cls_token is not None:
        nn.init.trunc_normal_(model.cls_token, std=0.02)
    return model


def _torchvision(name: str, channels: int, kwargs: dict[str, Any]) -> nn.Module:
    """A torchvision CNN cut after its last map, which `create_feature_extractor` finds by name."""
    if channels != 3:
        raise UserError(f"model {name!r} of torchvision takes 3 channels, data.channels={channels}")
    if name.startswith(("vit_", "maxvit_")):
        raise UserError(f"model {name!r} of torchvision gives no token map; take a vit_* of timm")
    model = torchvision.models.get_model(name, weights=None, **kwargs)
    maps = []
    graph = create_feature_extractor(model, _node_names(model))
    with torch.no_grad():
        for node, value in graph.eval()(torch.zeros(2, 3, 224, 224)).items():
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] > 1:
                maps.append((node, value.shape[1]))
    if not maps:
        raise UserError(f"model {name!r} gives no token map, only a pooled feature")
    return create_feature_extractor(model, {maps[-1][0]: "map"}).train()


def _node_names(model: nn.Module) -> list[str]:
    train, evaluation = torchvision.models.feature_extraction.get_graph_node_names(model)
    return [node for node in train if node in set(evaluation)][1:]


def _grid_of(model: nn.Module, x: Tensor, count: int) -> tuple[int, int]:
    """(h, w) of `count` tokens. From the patch embedding, or from the picture's aspect ratio."""
    embed = getattr(model, "patch_embed", None)
    if embed is not None and hasattr(embed, "dynamic_feat_size"):
        h, w = embed.dynamic_feat_size(tuple(x.shape[-2:]))
    else:
        h = round((count * x.shape[-2] / x.shape[-1]) ** 0.5)
        w = count // max(h, 1)
    if h * w != count:
        raise UserError(f"its {count} tokens are not a grid for a picture of {list(x.shape[-2:])}")
    return h, w


def inspect_backbone(
    model: nn.Module, name: str, channels: int, sizes: dict[str, tuple[int, int]]
) -> Layout:
    """Runs `model` on a blank picture of every crop size and says what it gives at the first.

    Raises UserError, naming the model and the size's key, when it cannot take the size or gives
    no pooled feature [B, C] with a token map [B, h, w, C] of the same width.
    """
    layouts = []
    for key, size in sizes.items():
        x = next(model.parameters()).new_zeros(2, channels, *size)
        was_training = model.training
        try:
            with torch.no_grad():
                pooled, tokens, grid = features(model.eval(), x)
        except Exception as error:  # a library's own message, with the model and size beside it
            raise UserError(
                f"model {name!r} cannot take {key}={list(size)}: {error or type(error).__name__}"
            ) from error
        finally:
            model.train(was_training)
        if pooled.ndim != 2 or tokens.ndim != 3 or pooled.shape[1] != tokens.shape[2]:
            raise UserError(
                f"model {name!r} gives a pooled feature of shape {list(pooled.shape)} and tokens "
                f"of shape {list(tokens.shape)}; [B, C] and [B, N, C] of one width are needed"
            )
        layouts.append(Layout(pooled.shape[1], grid, not _has_token_sequence(model)))
    return layouts[0]


def _has_token_sequence(model: nn.Module) -> bool:
    """Transformers of tokens (ViT and its kin), as against networks of maps."""
    return hasattr(model, "num_prefix_tokens") or hasattr(model, "cls_token")


def is_map_network(name: str, channels: int = 3) -> bool:
    """Whether `name` is a CNN (gives a map) and not a transformer of tokens."""
    with torch.device("meta"):
        return not _has_token_sequence(build_backbone(name, channels=channels))
