"""Parts of bench/data.py: the index pass, where the cpu loader's time goes, parity with Pillow."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.augment import BYTES, SIDES, Crops, differences, operations
from bench.baseline.augmentation import MEAN, STD
from mokd_fast.data import (
    AugmentConfig,
    ViewLoader,
    ViewParams,
    Views,
    augment_table,
    cpu,
    decode,
    draw_views,
    finish,
    open_source,
    render,
)
from mokd_fast.data.index import check
from mokd_fast.data.loader import Loader, loader_why_not
from mokd_fast.ops import augment_crops

CONFIG = AugmentConfig()


def loaders() -> list[Loader]:
    """Those beside the reference, as far as they are installed."""
    names: list[Loader] = ["cpu", "dali"]
    return [name for name in names if loader_why_not(name) is None]


def pillow_crops(
    image: Image.Image, params: list[ViewParams], cfg: AugmentConfig
) -> list[np.ndarray]:
    """The views as Pillow crops and resizes them, and nothing more: uint8 [h, w, C] each."""
    nothing: dict[str, Any] = {"flip": False, "order": None, "grey": False, "sigma": 0.0}
    return render(image, [replace(p, **nothing, solarize=False) for p in params], cfg)


def facts(folder: Path) -> dict[str, Any]:
    sizes = [file.stat().st_size for file in folder.rglob("*.jpg")]
    return {"count": len(sizes), "mean_bytes": sum(sizes) / len(sizes), "from": folder.name}


def index_pass(folder: Path, workers: int) -> dict[str, float]:
    """Seconds of the first check of all pictures, and of the next, which finds it in the cache."""
    source, seconds, old = open_source(folder), [], os.environ.get("MOKD_FAST_CACHE")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MOKD_FAST_CACHE"] = cache
        try:
            for unchecked in (len(source), 0):
                begin = time.perf_counter()
                found = check(source, str(folder), workers=workers)
                seconds.append(time.perf_counter() - begin)
                assert found.checked == unchecked and not found.bad
        finally:
            del os.environ["MOKD_FAST_CACHE"]
            if old is not None:
                os.environ["MOKD_FAST_CACHE"] = old
    return {"first_s": seconds[0], "again_s": seconds[1], "pictures": len(source)}


def breakdown(folder: Path, steps: int, batch: int) -> dict[str, float]:
    """Milliseconds a picture of what the cpu loader does, part by part, on one thread."""
    source, seconds = open_source(folder), dict[str, float]()

    def timed(part: str, do: Callable[[], Any]) -> Any:
        begin = time.process_time()
        made = do()
        seconds[part] = seconds.get(part, 0.0) + time.process_time() - begin
        return made

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    large = np.empty((2, batch, *CONFIG.global_hw, 3), np.uint8)
    small = np.empty((CONFIG.locals, batch, *CONFIG.local_hw, 3), np.uint8)

    def put(crops: list[np.ndarray], b: int) -> None:
        for v, crop in enumerate(crops):
            (large[v] if v < 2 else small[v - 2])[b] = crop

    for step in range(steps + 1):
        params = []
        if step == 1:  # the first batch is not counted
            seconds.clear()
        for b in range(batch):
            i = (step * batch + b) % len(source)
            data = timed("read", lambda i=i: source.read(i))
            image = timed("decode", lambda data=data: decode(data, 3))
            size = image.height, image.width
            params += [timed("draw", lambda i=i, size=size: draw_views(CONFIG, 0, 0, i, *size))]
            crops = timed("resize", lambda image=image, p=params[-1]: cpu.crops(image, p, CONFIG))
            timed("collect", lambda crops=crops, b=b: put(crops, b))
        tables = timed("draw", lambda params=params: _tables(params))
        views = Views(*map(torch.from_numpy, (large, small)), torch.zeros(0), [], *tables)
        timed("augment", lambda views=views: finish(views, MEAN, STD, device="cpu"))
    torch.set_num_threads(before)
    return {part: s * 1e3 / (steps * batch) for part, s in seconds.items()}


def _tables(params: list[list[ViewParams]]) -> tuple[Tensor, Tensor]:
    """[2, B, 12] and [L, B, 12]"""
    rows = augment_table([p for views in zip(*params, strict=True) for p in views])
    table = torch.from_numpy(rows).unflatten(0, (-1, len(params)))
    return table[:2], table[2:]


def parity(folder: Path, count: int) -> list[dict[str, Any]]:
    """Grey levels from Pillow with the same numbers, for the crop, each operation and whole views.

    "same crops": the operation on Pillow's crops; with the loader's own: from the file on.
    """
    source = open_source(folder)
    options: dict[str, Any] = {"batch": count, "channels": 3, "seed": 0, "workers": 0}
    made = {}
    for name in loaders():
        loader = ViewLoader(source, CONFIG, loader=name, **options)
        (made[name],) = loader.batches(0, 1)
    index = made["cpu"].index.tolist()
    assert all(views.index.tolist() == index for views in made.values())
    photos = [decode(source.read(i), 3) for i in index]
    rows = []
    for kind, side in SIDES.items():
        crops = Crops(photos, kind, count, side, index)
        own = {
            name: _picture_major(views.globals if kind == "global" else views.locals)
            for name, views in made.items()
        }
        row = {"operation": "crop", "side": side, "crops": len(crops.views)}
        rows.append(row | {name: differences(x, crops.bytes) for name, x in own.items()})
        rows += [
            {**row, "operation": name, **_differences(crops, views, own)}
            for name, views in operations(crops.views).items()
        ]
    return rows


def _differences(
    crops: Crops, views: list[ViewParams], own: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    table, expected = torch.from_numpy(augment_table(views)), crops.pillow(views)
    return {
        name: differences(augment_crops(x, table, **BYTES).permute(0, 2, 3, 1), expected)
        for name, x in {"same crops": crops.bytes, **own}.items()
    }


def _picture_major(views: Tensor | None) -> Tensor:
    """[V, B, h, w, C] to [B * V, h, w, C], the order of `Crops`."""
    assert views is not None
    return views.transpose(0, 1).flatten(0, 1).contiguous()
