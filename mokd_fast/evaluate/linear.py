"""A linear probe on frozen, cached features, all learning rates in one pass.

Softmax regression whose gradient is written out, so that R rates cost one matrix product:

    dL/dW_r = (softmax(x W_r^T + b_r) - onehot(y))^T x / B

Letters: N pictures, B of a batch, D features, C classes, R learning rates.
"""

import math
from collections.abc import Sequence
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


@dataclass(frozen=True)
class LinearResult:
    """What the probe found: percents of right answers."""

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
    epochs: int = 50,
    batch: int = 256,
    seed: int = 0,
) -> LinearResult:
    """Top-1 of a linear classifier on features train_x [N, D], test_x [M, D].

    train_y [N], test_y [M]: int64 classes, 0 or more. SGD with momentum 0.9 and no weight decay
    from zero weights; the rate falls to 0 along a cosine. The rate is chosen on a tenth of train
    that is held out class by class, never on the test set; the lower one wins a tie. Runs in
    fp32 on the device of train_x; touches no global generator.
    """
    raise NotImplementedError
