"""The official step with the weights, settings and schedules of one of our trainers.

Tests hold the two against each other, `bench/step.py` times them: the same thing twice.
"""

import copy

from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bench.baseline import official
from mokd_fast.nn import MOKD, Model
from mokd_fast.train.loop import Trainer
from mokd_fast.train.recipe import ModelConfig, Recipe
from mokd_fast.train.schedule import in_steps


class _Stem(nn.Module):
    """A convolutional stem under the names that timm's HybridEmbed gives it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


def official_model(model: Model, config: ModelConfig, recipe: Recipe) -> official.OfficialModel:
    """An OfficialModel with the weights of one of our students."""
    head, t_head = config.mlp_head, model.t_head
    assert t_head is not None and recipe.t_head is not None
    mlp = official.MLPHead(
        model.mlp_head.mlp[0].in_features,
        recipe.prototypes,
        head.hidden,
        head.bottleneck,
        head.layers,
        use_bn=head.batch_norm,
        norm_last_layer=not head.train_norm,
    )
    stem = isinstance(t_head.stem, nn.Linear)
    dim = t_head.pos_embed.shape[-1]
    t = official.THead(
        t_head.stem.in_features if isinstance(t_head.stem, nn.Linear) else dim,
        dim,
        recipe.prototypes,
        t_head.grid,
        recipe.t_head.depth,
        recipe.t_head.heads,
        recipe.t_head.mlp_ratio,
        stem=stem,
    )
    twin = official.OfficialModel(_backbone(model.backbone, config), mlp, t)
    twin.load_state_dict(model.state_dict())
    weight = next(model.parameters())
    return twin.to(weight.device, weight.dtype).train()


def _backbone(backbone: nn.Module, config: ModelConfig) -> nn.Module:
    if not isinstance(backbone, VisionTransformer):
        return copy.deepcopy(backbone)
    embed = backbone.patch_embed
    own = isinstance(embed, PatchEmbed)
    return official.VisionTransformer(
        embed.grid_size,
        backbone.embed_dim,
        len(backbone.blocks),
        backbone.blocks[0].attn.num_heads,
        patch=embed.patch_size[0] if own else 1,
        in_chans=embed.proj.in_channels if own else 1,
        drop_path=config.drop_path,
        patch_embed=None if own else _Stem(copy.deepcopy(embed.backbone)),
    )


def official_step(
    trainer: Trainer,
    kind: type[official.OfficialStep] = official.OfficialStep,
    **options: object,
) -> official.OfficialStep:
    """The OfficialStep that does what `trainer` does; `options` go to it (autocast=...)."""
    recipe, mokd = trainer.recipe, trainer.mokd
    students = official_students(mokd, recipe)
    settings = []
    for config, optimizer in zip(recipe.models, trainer.optimizers, strict=True):
        lr, decay = optimizer.schedules[0]
        settings.append(
            official.ModelSettings(
                config.optimizer.name,
                lr,
                decay,
                config.cross_weight,
                config.clip or 0.0,
                t_head_as_other=config.t_head_optimizer is not None,
            )
        )
    epochs = max(trainer.total // trainer.steps_per_epoch, 1)
    warmup = [config.temperature_warmup for config in recipe.models]
    return kind(
        students,
        (settings[0], settings[1]),
        trainer.momentum,
        out_dim=recipe.prototypes,
        n_views=2 + recipe.augment.locals,
        epochs=epochs,
        temperature=(recipe.loss.warmup_teacher_temperature, recipe.loss.teacher_temperature),
        warmup_1=in_steps(warmup[0].self, 1),
        warmup_2=in_steps(warmup[1].self, 1),
        freeze_epochs=in_steps(recipe.train.freeze_last_layers, 1),
        **options,  # type: ignore[arg-type]
    )


def official_students(
    mokd: MOKD, recipe: Recipe
) -> tuple[official.OfficialModel, official.OfficialModel]:
    first, second = (
        official_model(model, config, recipe)  # type: ignore[arg-type]
        for model, config in zip(mokd.students, recipe.models, strict=True)
    )
    return first, second
