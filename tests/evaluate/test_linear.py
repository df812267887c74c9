"""The linear probe against scikit-learn, its choice of rate, and tiny sets."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mokd_fast.errors import UserError
from mokd_fast.evaluate import linear_probe
from mokd_fast.evaluate.linear import _fit, _held_out


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    test = np.arange(len(x)) % 5 == 0
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y)
    return x[~test], y[~test], x[test], y[test]


def test_reaches_scikit_learns_logistic_regression(generators_untouched):
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train_x, train_y, test_x, test_y = digits()
    scaler = StandardScaler().fit(train_x)
    reference = LogisticRegression(C=0.1, max_iter=200).fit(scaler.transform(train_x), train_y)
    expected = 100 * reference.score(scaler.transform(test_x), test_y)
    result = linear_probe(train_x, train_y, test_x, test_y)
    assert expected > 90
    assert result.top1 == pytest.approx(expected, abs=1.5)
    assert linear_probe(train_x, train_y, test_x, test_y) == result


def test_scale_and_offset_of_features_are_ignored():
    train_x, train_y, test_x, test_y = (t[:400] for t in digits())
    plain = linear_probe(train_x, train_y, test_x, test_y, lrs=(0.1,))
    moved = linear_probe(1e3 * train_x + 5e3, train_y, 1e3 * test_x + 5e3, test_y, lrs=(0.1,))
    assert moved.top1 == pytest.approx(plain.top1, abs=1.0)


def test_gradient_is_that_of_cross_entropy():
    """One epoch of full batches at two rates, against torch's autograd and SGD."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=g), torch.randint(3, (30,), generator=g)
    steps, rates = 300, (0.02, 0.5)
    weight = _fit(x, y, 3, rates, 1, 30, 0).view(2, 3, 5)
    for fitted, rate in zip(weight, rates, strict=True):
        model = torch.nn.utils.skip_init(torch.nn.Linear, 4, 3)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        # SGD multiplies its momentum by the rate of the step, as the probe does.
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(fitted[:, :4], model.weight.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fitted[:, 4], model.bias.detach(), rtol=1e-3, atol=1e-4)


def test_rate_is_chosen_on_the_held_out_part_not_on_test():
    """Test labels that are all wrong change the score and not the choice."""
    train_x, train_y, test_x, test_y = digits()
    lrs = (1e-6, 0.1)
    right = linear_probe(train_x, train_y, test_x, test_y, lrs=lrs, epochs=1)
    wrong = linear_probe(train_x, train_y, test_x, (test_y + 1) % 10, lrs=lrs, epochs=1)
    assert right.lr == wrong.lr == 0.1 and right.held_out == wrong.held_out
    assert right.held_out[0.1] > right.held_out[1e-6] + 3
    assert right.top1 > 90 > 10 > wrong.top1


def test_held_out_pictures_are_not_trained_on():
    """Labels without meaning, wide features: what is trained on is learned by heart."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 400, generator=g), torch.arange(300) % 3
    result = linear_probe(x, y, x, y, lrs=(0.1,))
    assert result.top1 > 85 and result.held_out[0.1] < 70


def test_one_pass_equals_a_pass_for_each_rate():
    data = tuple(t[:300] for t in digits())
    together = linear_probe(*data, lrs=(0.01, 0.3))
    alone = {lr: linear_probe(*data, lrs=(lr,)).held_out[lr] for lr in (0.01, 0.3)}
    assert together.held_out == pytest.approx(alone, abs=4.0)  # one held-out picture is 3.4


def test_held_out_is_a_tenth_of_each_class():
    labels = torch.tensor([0] * 100 + [1] * 25 + [2] * 3)
    assert labels[_held_out(labels, 0)].bincount(minlength=3).tolist() == [10, 2, 0]
    few = torch.tensor([0, 1, 1, 2])
    assert few[_held_out(few, 0)].tolist() == [1]


@pytest.mark.parametrize("labels", [[0, 0], [0, 1], [0, 1, 2], [4, 4, 4]])
def test_tiny_sets(labels):
    y = torch.tensor(labels)
    x = F.one_hot(y).float()
    result = linear_probe(x, y, x, y, lrs=(0.1,))
    # One picture is held out, so a class with one picture may stay unknown.
    assert result.top1 >= 100 * (len(y) - 1) / len(y) - 1e-6


def test_constant_features_give_chance():
    y = torch.arange(40) % 4
    result = linear_probe(torch.full((40, 3), 2.0), y, torch.full((8, 3), 2.0), y[:8])
    assert result.top1 == 25.0


def test_threads_are_given_back(monkeypatch):
    """A small fit runs in one thread, a large one in all; both leave the number as it was."""
    torch.set_num_threads(2)
    seen = []
    fit = sys.modules["mokd_fast.evaluate.linear"]._fit

    def watch(*args):
        seen.append(torch.get_num_threads())
        return fit(*args)

    monkeypatch.setattr(sys.modules["mokd_fast.evaluate.linear"], "_fit", watch)
    data = tuple(t[:100] for t in digits())
    linear_probe(*data)
    monkeypatch.setattr(sys.modules["mokd_fast.evaluate.linear"], "_SMALL", 1e5)
    linear_probe(*data)
    assert seen == [1, 2] and torch.get_num_threads() == 2


def test_refuses_what_it_cannot_fit():
    x, y = torch.randn(10, 3), torch.zeros(10, dtype=torch.int64)
    with pytest.raises(UserError, match="2 labelled"):
        linear_probe(x[:1], y[:1], x, y)
    for bad in ({"lrs": ()}, {"lrs": (0.0,)}, {"epochs": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match="must be above 0"):
            linear_probe(x, y, x, y, **bad)
    x[0, 0] = torch.inf
    with pytest.raises(UserError, match="diverged"):
        linear_probe(x, y, x, y)
