"""A linear probe on frozen, cached features, all learning rates in one pass.

Softmax regression with the gradient written out, so that R rates cost one matrix product:

    dL/dW_r = (softmax(x W_r^T + b_r) - onehot(y))^T x / B

Letters: N pictures, B of a batch, D features, C classes, R learning rates.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .draws import rank_in_class
from .knn import check_features

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_HELD_OUT = 0.1
_MOMENTUM = 0.9
_STEPS = 300  # at least: 20 epochs of 100 pictures are 20 steps, when the weights still move
# Share of the mean variance added to each feature's. Without it a feature that hardly varies (a
# corner pixel) is blown up: Fashion-MNIST pixels, 10 labels a class, 67.8 % instead of 69.3 %.
_FLOOR = 0.01
# Operations of a step below which a CPU fit runs in one thread: its threads wait for each other
# longer than they compute. Two instead of one took 3 to 8 times as long on 2 busy cores (width
# 128 and 784, 10 classes: 9 and 56 million operations a step).
_SMALL = 2e8
_ROWS = 8192  # of test pictures scored at once


@dataclass(frozen=True)
class LinearResult:
    """What a probe reached, in percent of right answers."""

    top1: float  # on the test set, at `lr`
    lr: float  # the best on the held-out part of train
    held_out: dict[float, float]  # learning rate -> top-1 on the held-out part


@torch.no_grad()
def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    lrs: Sequence[float] = LEARNING_RATES,
    epochs: int = 20,
    batch: int = 256,
    seed: int = 0,
) -> LinearResult:
    """Top-1 in percent of a linear classifier on features train_x [N, D], test_x [M, D].

    train_y [N], test_y [M]: int64 classes, 0 or more. SGD with momentum 0.9 and no weight decay
    from zero weights, for `epochs` and at least 300 steps; the rate falls to 0 along a cosine.
    A tenth of train (of each class, rounded down, one picture at least) is held out: it chooses
    the rate, the lower one in a tie, and the classifier of that rate is then scored on the test
    set. Features are standardised by train: (x - mean) / sqrt(var + 0.01 * mean of var).
    fp32 on the device of train_x, small probes in one CPU thread; touches no global generator.
    Raises ValueError for shapes that do not fit or no learning rate, UserError for fewer than 2
    pictures or non-finite features.
    """
    check_features(train_x, train_y, test_x, test_y)
    if not lrs or min(lrs) <= 0 or epochs < 1 or batch < 1:
        raise ValueError(f"lrs, epochs and batch must be above 0, got {lrs}, {epochs}, {batch}")
    if len(train_x) < 2:
        raise UserError("a linear probe needs 2 labelled pictures or more to train on")
    device, rates = train_x.device, sorted(set(lrs))
    train_y, test_y = train_y.to(device), test_y.to(device)
    classes = int(train_y.max()) + 1
    train_x, mean, scale = _standardise(train_x.float())
    held = _held_out(train_y, seed)
    with _threads(device, 4 * batch * len(rates) * classes * train_x.shape[1]):
        weight = _fit(train_x[~held], train_y[~held], classes, rates, epochs, batch, seed)

    scores = _top1(weight, train_x[held], train_y[held], len(rates)).tolist()
    best = scores.index(max(scores))
    chosen = weight.view(len(rates), classes, -1)[best]
    top1 = sum(
        float(_top1(chosen, (x.to(device).float() - mean) * scale, y, 1)) * len(y)
        for x, y in zip(test_x.split(_ROWS), test_y.split(_ROWS), strict=True)
    )
    return LinearResult(top1 / len(test_y), rates[best], dict(zip(rates, scores, strict=True)))


def _standardise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = torch.var_mean(x, dim=0, correction=0)
    scale = (var + _FLOOR * var.mean() + 1e-12).rsqrt()  # constant features stay 0
    return (x - mean) * scale, mean, scale


def _held_out(labels: Tensor, seed: int) -> Tensor:
    """bool [N]: a tenth of each class, or one picture where no class has ten."""
    ranks = torch.from_numpy(rank_in_class(labels.cpu().numpy(), seed)).to(labels.device)
    held = ranks < (labels.bincount()[labels] * _HELD_OUT).floor()
    if not held.any():
        held[ranks.argmax()] = True  # the last of a largest class, which loses least
    return held


def _fit(
    x: Tensor, y: Tensor, classes: int, rates: Sequence[float], epochs: int, batch: int, seed: int
) -> Tensor:
    """x [N, D], y [N] below C -> weights and, last, bias [R * C, D + 1] of all rates."""
    n, r = len(y), len(rates)
    x = _with_one(x)
    weight = x.new_zeros(r * classes, x.shape[1])
    momentum = torch.zeros_like(weight)
    rate = x.new_tensor(rates).repeat_interleave(classes)[:, None]  # [R * C, 1]
    generator = torch.Generator().manual_seed(seed)
    epochs = max(epochs, math.ceil(_STEPS / math.ceil(n / batch)))
    steps, step = epochs * math.ceil(n / batch), 0
    for _ in range(epochs):
        for i in torch.randperm(n, generator=generator).to(x.device).split(batch):
            xb = x[i]
            error = (xb @ weight.T).view(-1, r, classes).softmax(dim=2)
            # Minus the one-hot target, which for all of ImageNet would take gigabytes.
            error.scatter_add_(2, y[i][:, None, None].expand(-1, r, 1), -torch.ones_like(error))
            gradient = error.view(-1, r * classes).T @ xb
            momentum.mul_(_MOMENTUM).add_(gradient, alpha=1 / len(i))
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            weight.addcmul_(momentum, rate, value=-cosine)
            step += 1
    return weight


@contextmanager
def _threads(device: torch.device, operations: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if device.type == "cpu" and operations < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _with_one(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0)  # the bias's input


def _top1(weight: Tensor, x: Tensor, y: Tensor, r: int) -> Tensor:
    """Percent right [R] of weights [R * C, D + 1]."""
    guess = (_with_one(x) @ weight.T).view(len(x), r, -1).argmax(dim=2)
    return 100 * (guess == y[:, None]).double().mean(dim=0)
