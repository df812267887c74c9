"""Doors to other code: one file a peer.

A drop-in loss takes one changed import line; signature, shapes, state dict and the moment at which
the centre moves are the peer's:

    facebookresearch/dino     from mokd_fast.interop.dino import DINOLoss
    skyoux/mokd               from mokd_fast.interop.mokd import DINOLoss, CTSearchLoss
    bytedance/ibot            from mokd_fast.interop.ibot import iBOTLoss
    facebookresearch/dinov2   from mokd_fast.interop.dinov2 import DINOLoss, iBOTPatchLoss
    facebookresearch/dinov3   from mokd_fast.interop.dinov3 import DINOLoss
    lightly                   from mokd_fast.interop.lightly import DINOLoss, IBOTPatchLoss
    solo-learn                from mokd_fast.interop.solo import DINOLoss

None needs a process group (with one, every rank counts the same), gives the teacher a gradient, or
leaves fp32 under autocast. Import from the module: the names repeat.
"""
