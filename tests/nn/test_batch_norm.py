"""BatchNorm and residual blocks as `quicken` has them: the libraries' numbers, keys and hooks."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from timm.models import resnet
from torch import nn

from mokd_fast.nn import batch_norm, checkpoint_activations
from mokd_fast.nn.fast import quicken
from mokd_fast.train.networks import build
from tests.train.recipes import SGD, model, small

CPU = torch.device("cpu")


def networks(make) -> tuple[nn.Module, nn.Module]:
    """As the library has it and quickened."""
    torch.manual_seed(0)
    plain = make().to(memory_format=torch.channels_last).train()
    fast = copy.deepcopy(plain)
    quicken(fast, CPU, "fp32")
    return plain, fast


def step(model: nn.Module, x: torch.Tensor, autocast: bool = False) -> dict[str, torch.Tensor]:
    x = x.to(next(model.parameters()).dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y.dtype))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found, **dict(model.named_buffers())}


def pictures() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(6, 3, 64, 64).to(memory_format=torch.channels_last)


@pytest.fixture
def calls(monkeypatch):
    """What each batch_norm was asked to do beside: (added something, ReLU)."""
    found, own = [], batch_norm.batch_norm

    def watched(*args, added, relu):
        found.append((added is not None, relu))
        return own(*args, added=added, relu=relu)

    monkeypatch.setattr(batch_norm, "batch_norm", watched)
    return found


RESNETS = {
    "timm 18": (
        lambda: timm.create_model("resnet18", num_classes=0, zero_init_last=False),
        (1 + 8, 8, 3),
    ),
    "timm 50": (
        lambda: timm.create_model("resnet50", num_classes=0, zero_init_last=False),
        (1 + 32, 16, 4),
    ),
    # torchvision's blocks stay its own: of its norms none takes more.
    "torchvision 18": (lambda: torchvision.models.resnet18(), (0, 0, 1 + 16 + 3)),
}


@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_in_training_is_as_exact_as_the_librarys(name, calls):
    make, (relu, both, alone) = RESNETS[name]
    plain, fast = networks(make)
    exact = copy.deepcopy(plain).double()
    assert list(fast.state_dict()) == list(plain.state_dict())
    x = pictures()
    want, theirs, mine = (step(net, x.clone()) for net in (exact, plain, fast))
    assert [calls.count(kind) for kind in ((False, True), (True, True), (False, False))] == [
        relu, both, alone,
    ]  # fmt: skip
    assert mine.keys() == want.keys()
    errors = {}
    for key, right in want.items():
        size = right.double().norm() + 1e-4 * right.numel() ** 0.5
        errors[key] = [((v[key].double() - right).norm() / size).item() for v in (mine, theirs)]
        assert errors[key][0] < 0.1, key  # next to 0 a ReLU may let another number through
    ours, allowed = torch.tensor(list(errors.values())).median(0).values
    assert 0 < ours <= 1.1 * allowed
    fast.eval(), plain.eval(), fast.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["timm 18", "timm 50"])
def test_in_bf16_the_errors_are_of_one_size(name):
    plain, fast = networks(RESNETS[name][0])
    exact = copy.deepcopy(plain).double()
    x = pictures()
    want = step(exact, x.clone())
    theirs, mine = (step(net, x.clone(), autocast=True) for net in (plain, fast))
    errors = []
    for found in (mine, theirs):
        sizes = {k: want[k].double().norm() for k in found}
        rows = [((v.double() - want[k]).norm() / sizes[k]).item() for k, v in found.items()]
        errors.append(torch.tensor(rows).nanmedian())
    assert errors[0] <= 1.1 * errors[1]


def test_activations_made_again_have_the_same_bits_and_statistics():
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        channels = ("data.channels=3", "data.mean=[0,0,0]", "data.std=[1,1,1]")
        mokd = build(small("x", *channels, models=[model("resnet18", SGD)], t_head=None))
        student = mokd.students[0]
        if again:
            checkpoint_activations(student)
        student.to(memory_format=torch.channels_last)
        quicken(student, CPU, "fp32")
        results.append(step(student.backbone, pictures()))
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())
    assert results[1]["bn1.num_batches_tracked"] == 1


def residual() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    block = resnet.BasicBlock(16, 16)
    fast = copy.deepcopy(block)
    quicken(fast, CPU, "fp32")
    return block, fast


def block_input() -> torch.Tensor:
    return torch.randn(2, 16, 5, 5).to(memory_format=torch.channels_last)


def test_hooks_see_what_they_saw(calls):
    """With one between the parts of a block it is the library's."""
    seen = []
    look = lambda module, inputs, y: seen.append(y.clone())  # noqa: E731
    for name in ("bn1", "act1", "bn2", "act2"):
        block, fast = residual()
        assert type(fast) is batch_norm.BasicBlock
        seen.clear()
        for net in (block, fast):
            net.get_submodule(name).register_forward_hook(look)
        x = block_input()
        calls.clear()
        assert torch.equal(fast(x) > 0, block(x) > 0)
        assert (True, True) not in calls if name in ("bn2", "act2") else (False, True) not in calls
        torch.testing.assert_close(*seen)
    block, fast = residual()
    seen.clear()
    fast.register_forward_hook(look)
    fast.conv2.register_forward_hook(look)
    calls.clear()
    fast(block_input())
    assert len(seen) == 2 and calls == [(False, True), (True, True)]


def test_what_is_no_plain_block_stays_the_librarys(calls):
    changes = {
        "synchronised": lambda b: setattr(b, "bn2", nn.SyncBatchNorm(16)),
        "another norm": lambda b: setattr(b, "bn1", nn.GroupNorm(4, 16)),
        "another activation": lambda b: setattr(b, "act2", nn.GELU()),
        "squeeze and excitation": lambda b: setattr(b, "se", nn.Identity()),
        "drop path": lambda b: setattr(b, "drop_path", nn.Identity()),
        "drop block": lambda b: setattr(b, "drop_block", nn.Dropout2d(0.0)),
        "a filter": lambda b: setattr(b, "aa", nn.AvgPool2d(1)),
    }
    for what, change in changes.items():
        block, fast = residual()
        change(block), change(fast)
        if what == "synchronised":
            block.eval(), fast.eval()
        block.load_state_dict(fast.state_dict())
        x = block_input()
        calls.clear()
        torch.testing.assert_close(fast(x), block(x))
        assert not any(relu for _, relu in calls), what
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(residual()[1])
    assert type(converted.bn1) is nn.SyncBatchNorm
    assert converted.eval()(block_input()).shape == (2, 16, 5, 5)

    class Own(nn.BatchNorm2d):
        pass

    norms = nn.Sequential(Own(3), nn.BatchNorm1d(3), nn.SyncBatchNorm(3))
    quicken(norms, CPU, "fp32")
    assert [type(norm) for norm in norms] == [Own, nn.BatchNorm1d, nn.SyncBatchNorm]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_statistics_move_as_in_the_library(momentum, tracked, affine):
    plain = nn.BatchNorm2d(16, momentum=momentum, track_running_stats=tracked, affine=affine)
    fast = copy.deepcopy(plain)
    quicken(fast, CPU, "fp32")
    assert type(fast) is batch_norm.BatchNorm2d
    for training in (True, True, True, False, True):
        plain.train(training), fast.train(training)
        x = block_input()
        torch.testing.assert_close(fast(x), plain(x))
        for got, want in zip(fast.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(got, want)
    for message, wrong in (("expected 4D input", x[0, 0]), ("more than 1 value", x[:1, :, :1, :1])):
        for norm in (plain, fast):
            with pytest.raises(ValueError, match=message):
                norm(wrong)


def test_norms_of_timm_with_an_activation(calls):
    make = timm.layers.BatchNormAct2d
    for plain, fused in (
        (make(16), True),
        (make(16, act_layer="silu"), False),
        (make(16, apply_act=False), False),
        (make(16, drop_layer=lambda: nn.Dropout2d(0.0)), False),
    ):
        fast = copy.deepcopy(plain)
        quicken(fast, CPU, "fp32")
        calls.clear()
        for _ in range(2):
            x = block_input()
            torch.testing.assert_close(fast(x), plain(x))
        assert calls == [(False, True)] * 2 * fused
        torch.testing.assert_close(fast.state_dict(), plain.state_dict())
        fast(x)


def test_models_travel():
    _, fast = residual()
    x = block_input()
    copied, loaded = copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))
    assert torch.equal(copied(x), loaded(x)) and type(loaded) is type(fast)
