"""What is installed, which backends run here and why the others do not."""

import importlib.metadata
import os
import platform
import sys

import torch
from rich.markup import escape
from rich.table import Table

from . import __version__
from .data import choose_loader
from .ops import LinearTarget, Target, augment_params, cpu, cross_view_pairs, explain
from .train import apex

PACKAGES = {
    "torch": "needed",
    "torchvision": "needed",
    "timm": "needed",
    "triton": "Triton kernels, NVIDIA GPUs only",
    "xformers": "optional: pip install mokd_fast[xformers]",
    "nvidia-dali-cuda130": "optional: a loader, pip install mokd_fast[dali]",
    "matplotlib": "optional: the report, pip install mokd_fast[report]",
    "wandb": "optional: train.wandb, pip install mokd_fast[wandb]",
    "scikit-learn": "optional: the digits data set, pip install mokd_fast[data]",
}


def environment() -> Table:
    """Versions, processor, GPUs and the native module."""
    table = Table("", "", show_header=False, box=None)
    table.add_row("mokd_fast", __version__)
    table.add_row("python", f"{sys.version.split()[0]} on {platform.system()} {platform.machine()}")
    for name, meaning in PACKAGES.items():
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, escape(f"not installed ({meaning})"))  # the extras' brackets
    table.add_row("NVIDIA apex", escape(apex.why_not() or "its CUDA extension loads"))
    table.add_row("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("gpu", ", ".join(gpus) or "none that this torch can see")
    table.add_row("native module", escape(native_module()))
    return table


def native_module() -> str:
    """How mokd_fast._C was built, or why it is not there."""
    if cpu.native is None:
        return f"{cpu.missing}; everything runs in PyTorch"
    return ", ".join(f"{key} {value}" for key, value in cpu.native.build_info().items())


def backends() -> dict[str, str]:
    """`explain` of every operator for a small example on the device that would be used, and of the
    loader."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = torch.randn(4, 2, 64, device=device)
    target = Target(cross_view_pairs(2, 4), torch.randn(2, 2, 64, device=device), temperature=0.04)
    prototypes = torch.randn(32, 64, device=device)
    linear = LinearTarget(cross_view_pairs(2, 4), student[:2], prototypes, temperature=0.04)
    maps = torch.randn(3, 2, 2, 9, 32, device=device)  # q, k, v [B, H, N, d]
    asked = torch.randn(3, 4, 2, 2, 32, device=device)  # [Q, B, H, d]
    channels = torch.zeros(2, 8, 4, 4, device=device).to(memory_format=torch.channels_last)
    ones = torch.ones(8, device=device)
    crops = torch.zeros(2, 8, 8, 3, dtype=torch.uint8, device=device)
    params = augment_params(2, device=device)
    return {
        "distill_cross_entropy": explain("distill_cross_entropy", student, [target], 0.1),
        "linear_distill_cross_entropy": explain(
            "linear_distill_cross_entropy", student, prototypes, [linear], 0.1
        ),
        "prototype_loss": explain("prototype_loss", student, prototypes, [linear], 0.1),
        "feature_search": explain("feature_search", asked[0], *maps[1:]),
        "joint_attention": explain("joint_attention", *maps, *asked),
        "column_mean": explain("column_mean", student),
        "weight_norm": explain("weight_norm", prototypes, prototypes[:, :1], torch.bfloat16),
        "self_attention": explain(
            "self_attention", torch.zeros(1, 4, 3, 2, 64, device=device).bfloat16()
        ),
        "prototype_linear": explain("prototype_linear", student, prototypes, torch.bfloat16),
        "batch_norm": explain("batch_norm", channels, None, None, ones, ones, training=True),
        "clip_grad_per_tensor_": explain("clip_grad_per_tensor_", [prototypes], 3.0),
        "update_": explain("update_", torch.optim.AdamW([prototypes], fused=True)),
        "augment_crops": explain("augment_crops", crops, params, mean=(0.5,) * 3, std=(0.5,) * 3),
        "data.loader=auto": choose_loader("auto", device)[1],
    }
