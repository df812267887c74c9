"""Stateless augmentation numbers: what happens to view v of picture i in epoch e.

Every number is a pure function of (seed, epoch, picture index, view), so the batch size, the
worker count, the world size, the number of views and a resume change nothing, and the same
numbers drive every loader. The laws are those of DINO's multi-crop augmentation on torchvision:
RandomResizedCrop, flip, ColorJitter, grey, blur, solarize.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, ValidationInfo, field_validator

from ..config import Config
from ..ops.reference import SIGMA_MAX

# Philox raws are stable across NumPy versions, the streams of Generator are not (NEP 19).
_SLOTS = 64  # uniforms reserved for each view, 33 in use; a multiple of Philox's block of 4
_TRIES = 10
_AUGMENT, _ORDER = 0, 1  # purposes of `philox` taken here; evaluation has its own
_MASK = 2**64 - 1
_ORDERS = tuple(itertools.permutations(range(4)))


def _tuple(value: Any) -> Any:
    """YAML has lists only; strict pydantic takes no list for a tuple."""
    return tuple(value) if isinstance(value, list) else value


Pair = Annotated[tuple[float, float], BeforeValidator(_tuple)]
Triple = Annotated[tuple[float, float, float], BeforeValidator(_tuple)]
Size = Annotated[int | tuple[int, int], BeforeValidator(_tuple)]


class AugmentConfig(Config):
    """The augmentation of two global and `locals` local views; the defaults are DINO's.

    Sizes are pixels, an int or (height, width). Scales are fractions of the picture's area.
    `blur` and `solarize` are probabilities in view 1, in view 2 and in the local views.
    """

    global_size: Size = 224
    global_scale: Pair = (0.25, 1.0)
    local_size: Size = 96
    local_scale: Pair = (0.05, 0.25)
    locals: int = 8
    ratio: Pair = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey: float = 0.2
    blur: Triple = (1.0, 0.1, 0.5)
    solarize: Triple = (0.0, 0.2, 0.0)
    blur_sigma: Pair = (0.1, 2.0)

    @property
    def global_hw(self) -> tuple[int, int]:
        """(height, width) of a global view."""
        return (self.global_size,) * 2 if isinstance(self.global_size, int) else self.global_size

    @property
    def local_hw(self) -> tuple[int, int]:
        """(height, width) of a local view."""
        return (self.local_size,) * 2 if isinstance(self.local_size, int) else self.local_size

    def size_of(self, view: int) -> tuple[int, int]:
        """(height, width) of a view: two global ones, then local ones."""
        return self.global_hw if view < 2 else self.local_hw

    @field_validator("global_size", "local_size")
    @classmethod
    def _size(cls, value: Any, info: ValidationInfo) -> Any:
        sides = (value,) if isinstance(value, int) else value
        return _demand(min(sides) >= 1, value, info, "1 pixel or more")

    @field_validator("locals")
    @classmethod
    def _count(cls, value: int, info: ValidationInfo) -> int:
        return _demand(value >= 0, value, info, "0 or more")

    @field_validator("global_scale", "local_scale")
    @classmethod
    def _scale(cls, value: Any, info: ValidationInfo) -> Any:
        return _demand(0 < value[0] <= value[1] <= 1, value, info, "ascending, above 0, up to 1")

    @field_validator("ratio")
    @classmethod
    def _range(cls, value: Any, info: ValidationInfo) -> Any:
        return _demand(0 < value[0] <= value[1] < math.inf, value, info, "ascending and above 0")

    @field_validator("blur_sigma")
    @classmethod
    def _sigma(cls, value: Any, info: ValidationInfo) -> Any:
        what = f"ascending, above 0, up to {SIGMA_MAX:g}"  # where `augment_crops` ends
        return _demand(0 < value[0] <= value[1] <= SIGMA_MAX, value, info, what)

    @field_validator("flip", "jitter", "grey", "blur", "solarize")
    @classmethod
    def _probability(cls, value: Any, info: ValidationInfo) -> Any:
        each = value if isinstance(value, tuple) else (value,)
        return _demand(all(0 <= p <= 1 for p in each), value, info, "a probability, 0 to 1")

    @field_validator("brightness", "contrast", "saturation")
    @classmethod
    def _strength(cls, value: float, info: ValidationInfo) -> float:
        return _demand(0 <= value < math.inf, value, info, "0 or more")

    @field_validator("hue")
    @classmethod
    def _hue(cls, value: float, info: ValidationInfo) -> float:
        return _demand(0 <= value <= 0.5, value, info, "0 to 0.5 (half a turn)")


def _demand(good: bool, value: Any, info: ValidationInfo, what: str) -> Any:
    if not good:
        raise ValueError(f"{info.field_name} must be {what}, got {value}")
    return value


@dataclass(slots=True)
class ViewParams:
    """What is done to one view, in this order; a plain record that any loader can follow."""

    top: int  # the crop box, pixels of the picture
    left: int
    height: int
    width: int
    flip: bool
    order: tuple[int, ...] | None  # order of brightness 0, contrast 1, saturation 2, hue 3
    factors: tuple[float, float, float, float]  # of the same four; neutral is 1, 1, 1, 0
    grey: bool
    sigma: float  # of the Gaussian blur in pixels of the crop, 0: no blur
    solarize: bool


def philox(seed: int, epoch: int, index: int, purpose: int, n: int) -> np.ndarray:
    """n raw Philox4x64-10 numbers, uint64 [n], of the key (seed, epoch).

    The counter is (block, index, purpose, 0), blocks of four numbers counted from 1.
    """
    key = np.array([seed & _MASK, epoch], np.uint64)
    counter = np.array([0, index, purpose, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(n)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order [n] int64 in which an epoch visits the pictures, the same on every machine."""
    raws = philox(seed, epoch, 0, _ORDER, n)
    return np.argsort(raws, kind="stable").astype(np.int64, copy=False)


def draw_views(
    cfg: AugmentConfig, seed: int, epoch: int, index: int, height: int, width: int
) -> list[ViewParams]:
    """The parameters of the 2 global views, then of `cfg.locals` local ones.

    index: the picture's position in the full list; height, width: its size in pixels.
    """
    views = 2 + cfg.locals
    raws = philox(seed, epoch, index, _AUGMENT, views * _SLOTS)
    uniforms = ((raws >> 11) * 2.0**-53).tolist()  # 53 bits in [0, 1)
    return [
        _view(cfg, uniforms[v * _SLOTS : (v + 1) * _SLOTS], min(v, 2), height, width)
        for v in range(views)
    ]


def _view(cfg: AugmentConfig, u: list[float], kind: int, height: int, width: int) -> ViewParams:
    """kind: 0 view 1, 1 view 2, 2 local. Each number has its slot in u, used or not."""
    scale = cfg.local_scale if kind == 2 else cfg.global_scale
    top, left, h, w = _crop(u, height, width, scale, cfg.ratio)
    factors = (
        _between(u[25], max(0.0, 1 - cfg.brightness), 1 + cfg.brightness),
        _between(u[26], max(0.0, 1 - cfg.contrast), 1 + cfg.contrast),
        _between(u[27], max(0.0, 1 - cfg.saturation), 1 + cfg.saturation),
        _between(u[28], -cfg.hue, cfg.hue),
    )
    return ViewParams(
        top=top,
        left=left,
        height=h,
        width=w,
        flip=u[22] < cfg.flip,
        order=_ORDERS[int(u[24] * 24)] if u[23] < cfg.jitter else None,
        factors=factors,
        grey=u[29] < cfg.grey,
        sigma=_between(u[31], *cfg.blur_sigma) if u[30] < cfg.blur[kind] else 0.0,
        solarize=u[32] < cfg.solarize[kind],
    )


def _crop(
    u: list[float],
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(top, left, height, width) by the law of torchvision's RandomResizedCrop.get_params."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(_TRIES):
        area = height * width * _between(u[2 * i], *scale)
        aspect = math.exp(_between(u[2 * i + 1], low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def _between(u: float, low: float, high: float) -> float:
    return low + u * (high - low)
