"""The networks of a run, as its recipe, its device and its processes want them."""

from collections.abc import Callable

import torch
from timm.layers import convert_sync_batchnorm

from ..nn import MOKD, build_mokd, checkpoint_activations
from ..nn.fast import compile_blocks, quicken
from ..nn.tally import count_at_once
from ..ops.attention import xformers_missing
from .distributed import World
from .graph import records
from .recipe import Recipe, TrainConfig


def make_networks(
    recipe: Recipe,
    device: torch.device,
    precision: str,
    world: World,
    note: Callable[[str], None],
) -> MOKD:
    """Students, teachers and centres on the device, initialised from the recipe's seed; `note` is
    told which key finds nothing to do."""
    train = recipe.train
    torch.manual_seed(train.seed)
    mokd = build(recipe).to(device)
    if world.size > 1:
        torch.manual_seed(train.seed + world.rank)  # drop-path of its own
        if device.type == "cuda":  # as official; there is none for the CPU
            convert_sync_batchnorm(mokd)
    if train.checkpoint_activations:
        for student in mokd.students:
            checkpoint_activations(student)  # type: ignore[arg-type]
    if train.channels_last:
        mokd.to(memory_format=torch.channels_last)
    recorded = records(recipe, device, world.size, mokd)
    quicken(mokd, device, precision, recorded)
    if device.type == "cuda":
        count_at_once(mokd)  # the trainer's step does
    packed = packs_crops(train, device, precision, recorded)
    plain = mokd.pack() if packed else []
    if packed and not plain and train.pack_crops is True:
        note("train.pack_crops=true: no model is a plain timm ViT, so T-Heads alone pack")
    compiled = recorded if train.compile == "auto" else train.compile
    blocks = compile_blocks(mokd) if compiled else 0
    if compiled and not blocks and train.compile is True:
        note("train.compile=true: there is no transformer block to compile")
    if recorded and train.cuda_graph == "auto":
        note(
            "train.cuda_graph=auto: steps are recorded"
            + f"{', transformer blocks compiled' if blocks else ''}"
            + f"{', crops of a ViT packed' if plain else ''}; the first ones take up to minutes"
        )
    return mokd


def packs_crops(train: TrainConfig, device: torch.device, precision: str, recorded: bool) -> bool:
    """Whether global and local crops go through T-Heads and plain ViTs in one pass."""
    if train.pack_crops != "auto":
        return train.pack_crops
    # Faster there, in bf16 on a CPU in longer runs than step.json's, whose two rounds cannot tell;
    # slower in fp32; nothing else has been measured, packs by xformers among it.
    on_a_cpu = device.type == "cpu" and precision == "bf16" and train.compile is not True
    on_a_gpu = recorded and xformers_missing() is not None
    return on_a_gpu or (on_a_cpu and not train.checkpoint_activations)


def build(recipe: Recipe) -> MOKD:
    """The networks of a recipe, randomly initialised."""
    augment, loss = recipe.augment, recipe.loss
    return build_mokd(
        recipe.models,
        recipe.t_head,
        prototypes=recipe.prototypes,
        channels=recipe.data.channels,
        global_size=augment.global_hw,
        local_size=augment.local_hw if augment.locals else None,
        cross_weights=[model.cross_weight for model in recipe.models],
        student_temperature=loss.student_temperature,
        center_momentum=loss.center_momentum,
        prototype_loss=None if loss.prototypes == "auto" else loss.prototypes,
    )
