"""From a configuration to a MOKD module; everything a user can get wrong is said here."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ..config import Config
from ..errors import UserError
from .backbones import Layout, build_backbone, inspect_backbone, is_drop_rate
from .heads import MLPHead, THead
from .mokd import MOKD, Model

CNN_PAIR_DIM = 384  # ViT-S's width: the official code takes D from its ViT, two CNNs have none


class MLPHeadConfig(Config):
    hidden: PositiveInt = 2048
    bottleneck: PositiveInt = 256
    layers: PositiveInt = 3
    batch_norm: bool = False
    train_norm: bool = False  # official: the ViT's prototype norms are trained, the CNN's stay 1


class THeadConfig(Config):
    dim: PositiveInt | None = None  # None: the last transformer's width; 384 for two CNNs
    depth: PositiveInt = 3
    heads: PositiveInt = 6
    mlp_ratio: PositiveFloat = 4.0
    # Official: joint; see THead. none leaves the search losses out.
    search: Literal["joint", "cross", "none"] = "joint"
    queries: Literal["local", "all"] = "local"  # official: local crops; see MOKD
    maps: Literal["first", "both"] = "first"  # official: the first global view's

    @model_validator(mode="after")
    def _who_searches(self) -> "THeadConfig":
        if self.search == "none" and (self.queries, self.maps) != ("local", "first"):
            raise ValueError("search=none searches nothing: leave queries and maps out")
        return self


class NetworkConfig(Config):
    name: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    drop_path: float = Field(0.0, ge=0, lt=1)
    mlp_head: MLPHeadConfig = MLPHeadConfig()


def build_mokd(
    networks: Sequence[NetworkConfig],
    t_head: THeadConfig | None,
    *,
    prototypes: int,
    channels: int,
    global_size: tuple[int, int],
    local_size: tuple[int, int] | None,
    **losses: Any,
) -> MOKD:
    """A MOKD of one or two networks; `losses` go to `MOKD` (weights, temperature, momentum).

    Raises UserError for an unknown network, one that cannot take a crop size or gives no token
    map, and a T-Head width its heads do not divide.
    """
    sizes = {"augment.global_size": global_size}
    if local_size is not None:
        sizes["augment.local_size"] = local_size
    students, layouts = [], []
    for network in networks:
        backbone = build_backbone(
            network.name,
            channels=channels,
            size=global_size,
            drop_path=network.drop_path,
            kwargs=network.kwargs,
        )
        students.append(backbone)
        layouts.append(inspect_backbone(backbone, network.name, channels, sizes))
    teachers = [
        # Built anew, not copied: drop-path and dropout do not exist in a teacher.
        build_backbone(
            network.name,
            channels=channels,
            size=global_size,
            kwargs={key: value for key, value in network.kwargs.items() if not is_drop_rate(key)},
        )
        for network in networks
    ]
    dim = 0 if t_head is None else _t_head_dim(t_head, layouts)

    def model(i: int, backbone: Any) -> Model:
        width, grid, is_map = layouts[i]
        mlp = MLPHead(width, prototypes, **networks[i].mlp_head.model_dump())
        if t_head is None:
            return Model(backbone, mlp, None)
        options = {
            **t_head.model_dump(exclude={"queries", "maps", "search"}),
            "search": "joint" if t_head.search == "none" else t_head.search,
            "dim": dim,
            "grid": grid,
            "stem": is_map or width != dim,
        }
        return Model(backbone, mlp, THead(width, prototypes, **options))

    if t_head is not None:
        losses |= {"search_queries": t_head.queries, "search_maps": t_head.maps}
        losses["search"] = t_head.search != "none"
    return MOKD(
        [model(i, backbone) for i, backbone in enumerate(students)],
        [model(i, backbone) for i, backbone in enumerate(teachers)],
        prototypes=prototypes,
        **losses,
    )


def _t_head_dim(config: THeadConfig, layouts: Sequence[Layout]) -> int:
    dim = config.dim
    if dim is None:
        dim = next((x.width for x in reversed(layouts) if not x.is_map), CNN_PAIR_DIM)
    if dim % config.heads:
        raise UserError(
            f"t_head.heads={config.heads} does not divide the T-Head's width {dim}: "
            "set t_head.heads or t_head.dim"
        )
    return dim
