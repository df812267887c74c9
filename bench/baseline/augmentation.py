"""DINO's multi-crop augmentation as its users run it: torchvision, one sample after the other.

`Official` is that of the DINO and MOKD code, on Pillow; `Tensors` the same with torchvision's v2
operators on uint8 tensors, which is how torchvision's own references are written today.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Transform = Callable[[Any], Any]


class GaussianBlur:
    def __init__(self, p: float, sigma: tuple[float, float]) -> None:
        self.p, self.sigma = p, sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


class Solarization:
    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.p else image


class Official:
    """A picture to its views, float32 [3, h, w] each: two global ones, then local ones."""

    def __init__(self, cfg: Any) -> None:
        self.views = [v1.Compose(self.steps(cfg, min(v, 2))) for v in range(2 + cfg.locals)]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [view(image) for view in self.views]

    def steps(self, cfg: Any, kind: int) -> list[Transform]:
        """kind: 0 view 1, 1 view 2, 2 local"""
        jitter = v1.ColorJitter(cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue)
        size, scale = _size(cfg, kind), _scale(cfg, kind)
        return [
            v1.RandomResizedCrop(size, scale, cfg.ratio, InterpolationMode.BICUBIC),
            v1.RandomHorizontalFlip(cfg.flip),
            v1.RandomApply([jitter], cfg.jitter),
            v1.RandomGrayscale(cfg.grey),
            GaussianBlur(cfg.blur[kind], cfg.blur_sigma),
            Solarization(cfg.solarize[kind]),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]


class Tensors(Official):
    def __call__(self, image: Image.Image) -> list[Tensor]:
        return super().__call__(v2.functional.pil_to_tensor(image))

    def steps(self, cfg: Any, kind: int) -> list[Transform]:
        jitter = v2.ColorJitter(cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue)
        size, scale = _size(cfg, kind), _scale(cfg, kind)
        blur = v2.GaussianBlur(13, cfg.blur_sigma)  # 3 sigma at the widest
        return [
            v2.RandomResizedCrop(size, scale, cfg.ratio, InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(cfg.flip),
            v2.RandomApply([jitter], cfg.jitter),
            v2.RandomGrayscale(cfg.grey),
            v2.RandomApply([blur], cfg.blur[kind]),
            v2.RandomSolarize(128, cfg.solarize[kind]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]


def _size(cfg: Any, kind: int) -> tuple[int, int]:
    return cfg.local_hw if kind == 2 else cfg.global_hw


def _scale(cfg: Any, kind: int) -> tuple[float, float]:
    return cfg.local_scale if kind == 2 else cfg.global_scale
