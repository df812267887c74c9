"""Activations made again in backward: the same bits, statistics that move once, less memory."""

import copy
import functools

import pytest
import torch
from timm.layers import DropPath
from torch.utils._python_dispatch import TorchDispatchMode

from mokd_fast.nn import Temperatures, checkpoint_activations, features
from mokd_fast.train.networks import build
from tests.train.recipes import CNN, VIT, model, small

TAUS = [Temperatures(0.04, 0.04, 0.04)] * 2
DROP = {**VIT, "drop_path": 0.5}
PLAIN_VIT = model(  # timm's own patch embedding, as vit_small has it
    "vit_tiny_patch16_224", drop_path=0.5,
    kwargs={"patch_size": 7, "depth": 3, "embed_dim": 24, "num_heads": 3},
)  # fmt: skip


def views(size: int = 28, batch: int = 4, channels: int = 1):
    torch.manual_seed(1)
    small_ones = torch.randn(2, batch, channels, size // 2, size // 2)
    return torch.randn(2, batch, channels, size, size), small_ones


def checkpointed(mokd, enable: bool = True):
    for student in mokd.students:
        checkpoint_activations(student, enable)
    return mokd


def trained(mokd, batch, precision: str = "fp32", steps: int = 1):
    """Forward and backward passes; everything that they move."""
    torch.manual_seed(2)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = mokd(*batch, TAUS)
        torch.stack(out.totals).sum().backward()
    found = {name: p.grad for name, p in mokd.named_parameters() if p.grad is not None}
    found |= {"losses": torch.stack(out.totals), "generator": torch.get_rng_state()}
    return {name: v.clone() for name, v in (found | dict(mokd.named_buffers())).items()}


class Convolutions(TorchDispatchMode):
    """How many are made forward."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("models", "size"),
    # oneDNN leaves numbers of nobody in bf16 gradients of a kernel that is larger than its map.
    [((CNN, DROP), 28), ((model("test_resnet"), PLAIN_VIT), 126)],
    ids=["tiny", "resnet+vit"],
)
def test_gradients_and_statistics_keep_their_bits(models, size, precision):
    plain = build(small("x", models=models)).train()
    again = checkpointed(copy.deepcopy(plain))
    batch = views(size)
    one = trained(plain, batch, precision, steps=2)
    with Convolutions() as counted:
        two = trained(again, batch, precision, steps=2)
    assert one.keys() == two.keys()
    assert any("running_mean" in name for name in one)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    assert all(v == 4 for n, v in two.items() if "students" in n and n.endswith("_tracked"))
    with Convolutions() as plainly:
        trained(plain, batch, precision, steps=2)
    assert counted.count > plainly.count, "nothing was made again"


def test_drop_path_drops_at_random():
    """Or its bits above would say nothing."""
    mokd = checkpointed(build(small("x", models=(CNN, DROP))).train())
    assert any(isinstance(m, DropPath) and m.drop_prob for m in mokd.students[1].modules())
    x, _ = views()
    assert not torch.equal(mokd.students[1](x).mlp, mokd.students[1](x).mlp)


def test_statistics_move_only_forward():
    """Without the hooks they move twice a pass; a pass outside a model's forward still counts."""
    mokd = checkpointed(build(small("x")).train())
    student = mokd.students[0]
    norm = student.backbone.stages[0][0].conv1_kxk.bn
    student(views()[0]).mlp.sum().backward()
    mean = norm.running_mean.clone()
    assert norm.num_batches_tracked == 1
    student.backbone(views()[0].flatten(0, 1))  # by hand, outside the model
    assert norm.num_batches_tracked == 2 and not torch.equal(norm.running_mean, mean)
    norm._forward_pre_hooks.clear()
    student(views()[0]).mlp.sum().backward()
    assert norm.num_batches_tracked == 4


def test_off_again_and_on_twice():
    mokd = build(small("x")).train()
    for enable in (True, True, False):
        checkpointed(mokd, enable)
    norm = mokd.students[0].backbone.stem.bn
    assert len(norm._forward_pre_hooks) == 1
    assert not mokd.students[0].backbone.grad_checkpointing
    assert not mokd.students[1].t_head.grad_checkpointing
    assert list(mokd.state_dict()) == list(build(small("x")).state_dict())


@pytest.mark.parametrize("name", ["mnasnet0_5", "dla46_c"])  # of torchvision; not cut by timm
def test_a_network_that_is_not_cut_is_made_again_as_a_whole(name):
    changes = ("data.channels=3", "data.mean=[0,0,0]", "data.std=[1,1,1]")
    augment = {"global_size": 64, "locals": 0}
    recipe = small("x", *changes, models=[model(name)], t_head=None, augment=augment)
    plain = build(recipe).train()
    again = checkpointed(copy.deepcopy(plain))
    assert again.students[0].whole_again
    batch = views(64, 2, 3)[0], None
    one, two = trained(plain, batch), trained(again, batch)
    assert all(torch.equal(value, two[n]) for n, value in one.items())


def kept_bytes(run) -> int:
    """What autograd keeps of a forward pass for backward; each memory counts once."""
    held = {}

    def pack(x):
        held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = run()
    del found
    return sum(x.untyped_storage().nbytes() for x in held.values())


@pytest.mark.parametrize("part", ["cnn", "vit", "t_head"])
def test_less_is_kept(part):
    """Of a block its input alone. (The tiny CNN's stages are one block each, and the input of the
    first is as large as all that follows.)"""
    mokd = build(small("x", models=(CNN, PLAIN_VIT))).train()
    student = mokd.students[0 if part == "cnn" else 1]
    tokens, x = torch.randn(8, 16, 24), views()[0].flatten(0, 1)
    kept = []
    for enable in (False, True):
        checkpoint_activations(student, enable)
        run = (
            functools.partial(student.t_head, tokens, (4, 4))
            if part == "t_head"
            else functools.partial(features, student.backbone, x)
        )
        kept.append(kept_bytes(run))
    assert kept[1] < 0.5 * kept[0], kept
