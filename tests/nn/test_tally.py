"""Batches of BatchNorm counted at once: the bits and counts of the library's."""

import copy

import pytest
import timm
import torch
from torch import nn

from mokd_fast.nn import batch_norm, checkpoint_activations
from mokd_fast.nn.fast import quicken
from mokd_fast.nn.tally import BatchNorm2d, add_counts, count_at_once, counters
from mokd_fast.train.networks import build
from tests.train.recipes import SGD, model, small

RESNET = model("resnet18", SGD, kwargs={"layers": [1, 1, 1, 1]})


@pytest.mark.parametrize("again", [False, True], ids=["kept", "activations made again"])
def test_a_network(again):
    torch.manual_seed(0)
    plain = build(small("x", models=(RESNET,), t_head=None)).students[0].train()
    if again:
        checkpoint_activations(plain)
    counted = copy.deepcopy(plain)
    count_at_once(counted)
    norms = counters(counted)
    assert len(norms) == sum(type(m) is nn.BatchNorm2d for m in plain.modules()) > 10
    views = torch.randn(2, 3, 1, 28, 28), torch.randn(2, 3, 1, 14, 14)
    for network in (plain, counted):
        for _ in range(2):
            network(*views).mlp.sum().backward()
        network.eval()(views[0])
    assert {norm.seen for norm in norms} == {4}
    assert not any(norm.num_batches_tracked for norm in norms)
    add_counts(norms)
    add_counts(norms)
    mine, theirs = counted.state_dict(), plain.state_dict()
    assert list(mine) == list(theirs) and norms[0].num_batches_tracked == 4
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    for p, q in zip(counted.parameters(), plain.parameters(), strict=True):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_network_on_a_gpu(recorded, monkeypatch):
    """In recorded steps alone its BatchNorms take sums and ReLUs along; all are counted at once."""
    monkeypatch.setenv("MOKD_FAST_BACKEND", "reference")  # there is no GPU
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=0, layers=[1, 1, 1, 1]).train()
    fast = copy.deepcopy(plain)
    quicken(fast, torch.device("cuda"), "fp16", recorded)
    count_at_once(fast)
    kinds = {type(m) for m in fast.modules() if isinstance(m, nn.BatchNorm2d)}
    assert kinds == {batch_norm.BatchNorm2d if recorded else BatchNorm2d}
    assert (type(fast) is batch_norm.ResNet) is recorded
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fast(x), plain(x))
    assert {norm.seen for norm in counters(fast)} == {1} and not fast.bn1.num_batches_tracked
    add_counts(counters(fast))
    torch.testing.assert_close(fast.state_dict(), plain.state_dict())


def test_what_is_left_alone():
    """A mean over all batches, one without statistics, and subclasses."""
    mean, bare = nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, track_running_stats=False)
    other = type("Other", (nn.BatchNorm2d,), {})(3)
    layers = nn.Sequential(mean, bare, other)
    twin = copy.deepcopy(layers)
    count_at_once(layers)
    assert type(mean) is type(bare) is BatchNorm2d and type(other) is not BatchNorm2d
    x = torch.randn(4, 3, 5, 5)
    for _ in range(2):
        assert torch.equal(layers(x), twin(x))
    assert mean.num_batches_tracked == other.num_batches_tracked == 2
    assert mean.seen == bare.seen == 0 and torch.equal(mean.running_var, twin[0].running_var)
    add_counts(counters(layers))
    assert mean.num_batches_tracked == 2
    with pytest.raises(ValueError, match="expected 4D input"):
        count = nn.Sequential(nn.BatchNorm2d(3))
        count_at_once(count)
        count(torch.randn(3, 3))
