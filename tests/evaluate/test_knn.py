"""kNN against its formula in float64 loops, on tiny sets, and with ties."""

import math
import sys

import numpy as np
import pytest
import torch

from mokd_fast.errors import UserError
from mokd_fast.evaluate import few_shot_indices, knn
from mokd_fast.evaluate.knn import _nearest


def clusters(n, m, d=8, classes=3, seed=0, spread=1.5):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=g)
    y = torch.randint(classes, (n + m,), generator=g)
    x = centres[y] + spread * torch.randn(n + m, d, generator=g)
    return x[:n], y[:n], x[n:], y[n:]


def naive(train_x, train_y, test_x, test_y, k, temperature):
    train_x, test_x = train_x.double().numpy(), test_x.double().numpy()
    right = 0
    for x, y in zip(test_x, test_y.tolist(), strict=True):
        cosines = [
            float(x @ t) / (math.sqrt(float(x @ x)) * math.sqrt(float(t @ t))) for t in train_x
        ]
        nearest = sorted(range(len(cosines)), key=lambda i: (-cosines[i], i))[:k]
        votes = {}
        for i in nearest:
            label = int(train_y[i])
            votes[label] = votes.get(label, 0.0) + math.exp(cosines[i] / temperature)
        right += min(votes, key=lambda c: (-votes[c], c)) == y
    return 100 * right / len(test_y)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize(("n", "m", "classes"), [(200, 90, 3), (40, 17, 12), (60, 150, 2)])
def test_equals_the_formula(n, m, classes, temperature):
    data = clusters(n, m, classes=classes)
    result = knn(*data, ks=(1, 5, 20), temperature=temperature)
    expected = {k: naive(*data, k, temperature) for k in (1, 5, 20)}
    assert result == pytest.approx(expected)
    assert len(set(expected.values())) > 1  # k matters, so a wrong k would be seen


def test_weights_matter():
    """One near neighbour of class 1 outvotes two far ones of class 0, unless T is large."""
    train = torch.tensor([[1.0, 0.05], [0.0, 1.0], [0.0, 1.0]])
    data = train, torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    assert knn(*data, ks=(3,), temperature=0.07) == {3: 100.0}
    assert knn(*data, ks=(3,), temperature=10.0) == {3: 0.0}


def test_scale_of_features_is_ignored():
    train_x, train_y, test_x, test_y = clusters(100, 50)
    scaled = train_x * torch.rand(100, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    assert knn(scaled, train_y, 7 * test_x, test_y) == knn(train_x, train_y, test_x, test_y)


def test_a_k_above_the_bank_is_capped_and_said():
    data = clusters(6, 20, classes=2)
    result = knn(*data, ks=(3, 10, 200))
    assert result == pytest.approx({3: naive(*data, 3, 0.07), 6: naive(*data, 6, 0.07)})


@pytest.mark.parametrize("n", [1, 2])
def test_one_test_picture_and_one_class(n):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(n, dtype=torch.int64)
    assert knn(x, zeros, x[:1], zeros[:1]) == {n: 100.0}
    assert knn(x, zeros, x[:1], torch.tensor([3])) == {n: 0.0}  # a class the bank does not have


def test_equal_features_go_to_the_first_of_the_bank():
    same = torch.tensor([1.0, 0.0, 0.0])
    labels = torch.tensor([2, 2, 2, 1, 1, 0, 0, 0, 0, 0])
    train, test = same.expand(10, 3), same.expand(4, 3)
    for k, winner in ((1, 2), (3, 2), (5, 2), (10, 0)):
        result = knn(train, labels, test, torch.full((4,), winner), ks=(k,))
        assert result == {k: 100.0}, (k, winner)
    two = torch.tensor([1, 0])  # a tied vote: the lower class
    assert knn(train[:2], two, test, torch.zeros(4, dtype=torch.int64), ks=(2,)) == {2: 100.0}


def test_ties_at_the_edge_of_the_k_nearest():
    """Two clear neighbours, then 50 equal ones; k = 4 takes the first two of these."""
    train = torch.tensor([[0.0, 1.0]] * 25 + [[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 25)
    labels = torch.tensor([1, 1] + [0] * 23 + [2, 2] + [0] * 25)
    values, index = _nearest(torch.tensor([[1.0, 0.0]]) @ train.T, 4)
    assert index.tolist() == [[25, 26, 0, 1]] and values.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    data = train, labels, torch.tensor([[1.0, 1.0]]), torch.tensor([1])
    assert knn(*data, ks=(2,)) == {2: 100.0}  # all 52 tie here: the first two are of class 1


def test_equals_among_the_nearest_stand_in_the_order_of_the_bank():
    g = torch.Generator().manual_seed(0)
    near = torch.rand(20, 300, generator=g) * 0.5
    near[:, torch.randperm(300, generator=g)[:40]] = 0.75
    values, index = _nearest(near, 60)
    expected = near.sort(dim=1, descending=True, stable=True)
    assert torch.equal(index, expected.indices[:, :60])
    assert torch.equal(values, expected.values[:, :60])


def test_chunks_do_not_change_the_result(monkeypatch):
    data = clusters(100, 53)
    whole = knn(*data)
    monkeypatch.setattr(sys.modules["mokd_fast.evaluate.knn"], "_CHUNK", 700)  # 7 pictures at once
    taken = []
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda x, n: taken.append(n) or split(x, n))
    assert knn(*data) == whole
    assert taken == [7, 7]


def test_half_precision_and_zero_features():
    train_x, train_y, test_x, test_y = clusters(50, 20)
    halved = knn(train_x.half(), train_y, test_x.half(), test_y, ks=(5,))
    rounded = train_x.half().float(), train_y, test_x.half().float(), test_y
    assert halved == pytest.approx({5: naive(*rounded, 5, 0.07)})
    zero = knn(torch.zeros(50, 8), train_y, torch.zeros(20, 8), test_y, ks=(1,))
    assert zero == pytest.approx({1: 100 * float((test_y == train_y[0]).float().mean())})


def test_small_temperature_does_not_overflow():
    data = clusters(60, 30)
    assert knn(*data, ks=(10,), temperature=0.005) == {10: naive(*data, 10, 0.005)}


def test_refuses_what_it_cannot_score(generators_untouched):
    train_x, train_y, test_x, test_y = clusters(10, 5)
    train_x[3, 1] = math.nan
    with pytest.raises(UserError, match="train features hold NaN"):
        knn(train_x, train_y, test_x, test_y)
    train_x[3, 1] = 0
    with pytest.raises(UserError, match="no test features"):
        knn(train_x, train_y, test_x[:0], test_y[:0])
    with pytest.raises(ValueError, match="widths differ"):
        knn(train_x, train_y, test_x[:, :3], test_y)
    with pytest.raises(ValueError, match=r"\[N\], got \(10, 8\) and \(9,\)"):
        knn(train_x, train_y[:9], test_x, test_y)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        knn(train_x, train_y, test_x, -torch.ones_like(test_y))
    for bad in ({"ks": ()}, {"ks": (0,)}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="ks must be"):
            knn(train_x, train_y, test_x, test_y, **bad)


def test_few_shot_takes_so_many_of_each_class(generators_untouched):
    labels = torch.tensor([0] * 30 + [2] * 4 + [5] * 100)
    few = few_shot_indices(labels, per_class=10)
    assert labels[few].bincount(minlength=6).tolist() == [10, 0, 4, 0, 0, 10]
    assert few.tolist() == sorted(set(few.tolist()))
    assert torch.equal(few, few_shot_indices(labels, per_class=10))
    other = few_shot_indices(labels, per_class=10, seed=1)
    assert not torch.equal(few, other) and len(other) == 24
    with pytest.raises(ValueError, match="per_class"):
        few_shot_indices(labels, per_class=0)


def test_few_shot_choice_is_uniform():
    labels = torch.zeros(20, dtype=torch.int64)
    counts = np.zeros(20)
    for seed in range(400):
        counts[few_shot_indices(labels, per_class=5, seed=seed).numpy()] += 1
    assert counts.sum() == 2000 and counts.min() > 60 and counts.max() < 140  # 100 +- 4.6 sigma
