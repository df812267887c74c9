"""train.checkpoint_activations: the run without it, bit by bit."""

import pytest
import torch

from mokd_fast.train.checkpoint import last_checkpoint, load_checkpoint
from mokd_fast.train.loop import Trainer, pretrain
from mokd_fast.train.meter import Meter
from tests.train.recipes import CNN, T_HEAD, VIT, pictures, silent, small
from tests.train.test_kill import equal
from tests.train.test_skipped import HostReads

MODELS = ({**CNN, "t_head_optimizer": T_HEAD}, {**VIT, "drop_path": 0.3})
AGAIN = "train.checkpoint_activations=true"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), 14)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_statistics_and_generator_keep_their_bits(data, tmp_path, precision):
    changes = ("train.accumulate=2", "train.duration=2ep", f"train.precision={precision}")
    changes += ("train.pack_crops=false",)  # packs go without it, and drop-path draws for a pack
    states = []
    for more in ((), (AGAIN,)):
        recipe = small(data, *changes, "train.warmup=1it", *more, models=MODELS)
        run = pretrain(recipe, run=tmp_path / f"run{len(more)}", console=silent())
        states.append(load_checkpoint(last_checkpoint(run)))
    for part in ("model", "optimizers", "rng", "step"):
        assert equal(states[0][part], states[1][part]), part
    counts = [v for k, v in states[1]["model"].items() if k.endswith("num_batches_tracked")]
    assert {int(v) for v in counts} == {6 * 2, 6 * 2 * 2}  # a teacher's, a student's


def test_a_run_goes_on_with_it(data, tmp_path):
    """After one without it: it is no key of the result."""
    run = tmp_path / "run"
    first = Trainer(small(data, models=MODELS), run, silent())
    first.save()
    first.lock.release()
    trainer = Trainer(small(data, AGAIN, models=MODELS), run, silent())
    assert all(student.backbone.grad_checkpointing for student in trainer.mokd.students)
    assert not any(teacher.backbone.grad_checkpointing for teacher in trainer.mokd.teachers)
    trainer.lock.release()


def test_the_host_reads_nothing(data, tmp_path):
    trainer = Trainer(small(data, AGAIN, models=MODELS), tmp_path / "run", silent())
    trainer.mokd.train()
    prepared = [trainer.to_device(next(trainer.loader.batches())) for _ in range(2)]
    trainer.to_device = lambda views: views
    meter = Meter(iter(prepared))
    with HostReads() as host:
        for k in range(2):
            meter.add(k + 1, trainer.step(k, meter))
        assert host.found == []
    trainer.lock.release()


def test_a_step_that_is_skipped_takes_the_statistics_back(data, tmp_path):
    trainer = Trainer(small(data, AGAIN, models=MODELS), tmp_path / "run", silent())
    trainer.mokd.train()
    batches = trainer.loader.batches()
    trainer.step(0, batches)
    before = [s.clone() for s in trainer.mokd.statistics()]
    hook = next(trainer.mokd.students[0].backbone.parameters()).register_hook(
        lambda g: g.fill_(torch.inf)
    )
    assert trainer.step(1, batches).skipped
    hook.remove()
    assert equal(before, trainer.mokd.statistics())
    trainer.lock.release()
