"""Short cases of the benchmarks, for pytest-benchmark to compare with an earlier commit's.

They call what bench/ times, on one thread as all tests: a busy machine's barriers would cost more
than the operators. A machine still gives other times from hour to hour, where a ratio of bench/ is
of one run, interleaved; so a difference here is a reason to run that. `make bench-compare` alone
runs them.
"""

from functools import partial

import pytest
import torch

from bench import augment, data, distill, linear_distill, pictures, search, step
from mokd_fast.data import AugmentConfig

pytestmark = pytest.mark.speed
IMAGES, COLUMNS = 4, 65536


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["operator", "official_loop"])
def test_distill(benchmark, form, dtype):
    forms = {
        "operator": partial(distill.operator, distill.V),
        "official_loop": distill.official_loop,
    }
    student, teacher = (distill.logits(n, IMAGES, COLUMNS, dtype) for n in (distill.V, distill.T))
    benchmark(distill.step(forms[form](COLUMNS), student.requires_grad_(), teacher))


@pytest.mark.parametrize("kind", list(linear_distill.KINDS))
@pytest.mark.parametrize("form", ["ours", "stored", "official"])
def test_linear_distill(benchmark, form, kind):
    inputs = linear_distill.tensors(kind, IMAGES, COLUMNS)
    benchmark(linear_distill.step(getattr(linear_distill, form), kind, inputs))


@pytest.mark.parametrize("form", ["joint", "cross", "official"])
def test_search(benchmark, form):
    benchmark(search.cast(search.searches("vit", IMAGES)[form], torch.float32))


@pytest.mark.parametrize("form", ["cpu", "pillow"])
@pytest.mark.parametrize("kind", list(augment.SIDES))
def test_augment(benchmark, kind, form):
    crops = augment.Crops(augment.photographs(None), kind, IMAGES, augment.SIDES[kind])
    benchmark(augment.forms(crops, threads=1)[form])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures.make(64, None, tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("form", ["cpu", "pillow", data.BASELINE])
def test_data(benchmark, form, folder):
    """Two batches of 32, in this process."""
    forms = data.forms(folder, AugmentConfig(), batch=32, workers=0)
    made = benchmark.pedantic(lambda: sum(1 for _ in forms[form](0, 2)), rounds=5, warmup_rounds=1)
    assert made == 2


@pytest.mark.parametrize("form", ["ours", "official"])
def test_step(benchmark, form, tmp_path):
    """The demo's pair in fp32."""
    steps = step.Steps("mokd_cnn_tiny+mokd_vit_tiny", "fp32", tmp_path)
    run = steps.ours() if form == "ours" else steps.plain(steps.official, None)
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
