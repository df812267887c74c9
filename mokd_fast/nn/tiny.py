"""Two small backbones for 28 to 64 px pictures, made of timm's own classes.

They are registered with timm, so that `timm.create_model("mokd_cnn_tiny")` builds them once
`mokd_fast.nn` is imported.
"""

from functools import partial
from typing import Any

from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem

# No weights are published; timm still wants the entry.
default_cfgs = generate_default_cfgs({"mokd_cnn_tiny.untrained": {}, "mokd_vit_tiny.untrained": {}})


@register_model
def mokd_cnn_tiny(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """ResNet of three stages (32, 64, 128 channels) behind a stride-2 stem: 28 px -> 4 x 4."""
    stages = [
        ByoBlockCfg(type="basic", d=1, c=channels, s=stride, gs=0, br=1.0)
        for channels, stride in ((32, 1), (64, 2), (128, 2))
    ]
    config = ByoModelCfg(blocks=tuple(stages), stem_chs=32, stem_type="3x3", stem_pool="")
    return build_model_with_cfg(
        ByobNet, "mokd_cnn_tiny", pretrained, model_cfg=config, zero_init_last=False, **kwargs
    )


@register_model
def mokd_vit_tiny(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT of width 96, 3 blocks, 4 heads behind three stride-2 3x3 convolutions: 28 px -> 4 x 4.

    The convolutional stem is what makes it learn in minutes: a 7 x 7 patch stem did not.
    """
    stem = partial(ConvStem, depth=3, channels=(24, 48, 96), kernel_size=3, stride=(2, 2, 2))
    kwargs = {
        "img_size": 28, "in_chans": 3, "embed_dim": 96, "depth": 3, "num_heads": 4, **kwargs
    }  # fmt: skip
    embed = partial(HybridEmbed, backbone=stem(in_chans=kwargs["in_chans"]), proj=False)
    return build_model_with_cfg(
        VisionTransformer, "mokd_vit_tiny", pretrained, patch_size=1, embed_layer=embed, **kwargs
    )
