"""Steps that are not finite: nothing moves, nobody asks the device, the run goes on or says why."""

import copy
import json

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mokd_fast
from mokd_fast.train.checkpoint import checkpoints, load_checkpoint
from mokd_fast.train.loop import Trainer, pretrain
from mokd_fast.train.meter import Meter
from tests.train.recipes import CNN, T_HEAD, VIT, pictures, silent, small

MODELS = ({**CNN, "t_head_optimizer": T_HEAD}, VIT)  # SGD with a freeze, and AdamW


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), 14)


def trainer_of(data, tmp_path, *overrides, models=MODELS):
    trainer = Trainer(small(data, *overrides, models=models), tmp_path / "run", silent())
    trainer.mokd.train()
    return trainer


def poison(trainer: Trainer, calls: set[int]) -> None:
    """NaN in one picture of the given calls for a batch, counted from 0."""
    convert, count = trainer.to_device, iter(range(10**6))

    def poisoned(views):
        global_views, local_views = convert(views)
        if next(count) in calls:
            global_views[0, 0, 0, 3, 3] = torch.nan
        return global_views, local_views

    trainer.to_device = poisoned


def everything(trainer: Trainer) -> tuple[dict, list]:
    """All that a step moves."""
    states = [optimizer.torch.state_dict()["state"] for optimizer in trainer.optimizers]
    return copy.deepcopy((trainer.mokd.state_dict(), states))


@pytest.mark.parametrize("kind", ["loss", "gradient", "one micro-batch"])
def test_nothing_moves(data, tmp_path, kind):
    parts = 2 if kind == "one micro-batch" else 1
    trainer = trainer_of(data, tmp_path, f"train.accumulate={parts}")
    batches = trainer.loader.batches()
    for k in range(2):
        assert not trainer.step(k, batches).skipped
    before, states = everything(trainer)
    assert all(c.any() for n, c in before.items() if n.startswith("centers."))
    if kind == "gradient":
        weight = trainer.mokd.students[1].backbone.blocks[0].mlp.fc1.weight
        hook = weight.register_hook(lambda g: g.fill_(torch.inf))
    else:
        poison(trainer, {parts - 1})
    assert trainer.step(2, batches).skipped
    if kind == "gradient":
        hook.remove()
    after, states_after = everything(trainer)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    for old, new in zip(states, states_after, strict=True):
        assert old.keys() == new.keys()
        for i in old:
            assert all(torch.equal(new[i][key], old[i][key]) for key in old[i]), i
    assert not trainer.step(3, batches).skipped
    after, _ = everything(trainer)
    moved = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert any("running_mean" in name for name in moved) and any("weight" in name for name in moved)


def test_one_poisoned_batch_does_not_end_a_run(data, tmp_path, monkeypatch):
    init = Trainer.__init__

    def poisoned(self, *args):
        init(self, *args)
        poison(self, {4})

    monkeypatch.setattr(Trainer, "__init__", poisoned)
    run = pretrain(small(data), run=tmp_path / "run", console=silent())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row["skipped"] for row in rows if row["skipped"]} == {6: 1}
    assert rows[-1]["step"] == 12 and "NaN" not in (run / "metrics.jsonl").read_text()
    assert all("loss_1" in row and "kl_mlp_1" in row for row in rows)
    state = load_checkpoint(checkpoints(run / "checkpoints")[-1])
    assert all(v.isfinite().all() for v in state["model"].values())
    steps = {float(s["step"]) for s in state["optimizers"][1]["state"].values() if "step" in s}
    assert max(steps) == 11  # AdamW has counted the steps that were taken


def test_too_many_in_a_row_end_it(data, tmp_path, monkeypatch):
    """The last good checkpoint stays; an interval without a good step has no losses."""
    init = Trainer.__init__

    def poisoned(self, *args):
        init(self, *args)
        poison(self, set(range(4, 100)))

    monkeypatch.setattr(Trainer, "__init__", poisoned)
    recipe = small(data, "train.max_skipped=4", "train.checkpoint_every=4it")
    message = (
        r"4 steps in a row .*non-finite loss at step 5: self_mlp_1, .*good checkpoint is .*4.pt"
    )
    with pytest.raises(mokd_fast.UserError, match=message):
        pretrain(recipe, run=tmp_path / "run", console=silent())
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    row = json.loads(text.splitlines()[-1])
    assert row["step"] == 6 and row["skipped"] == 2 and "NaN" not in text
    assert "loss_1" not in row and "kl_mlp_1" not in row
    state = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())


def test_steps_in_a_row_are_counted_over_a_resume(data, tmp_path, monkeypatch):
    """Or the same command, given often enough, would skip its way to the end of the recipe."""
    init = Trainer.__init__

    def poisoned(self, *args):
        init(self, *args)
        poison(self, set(range(max(3 - self.done, 0), 100)))

    monkeypatch.setattr(Trainer, "__init__", poisoned)
    more = ("train.max_skipped=4", "train.log_every=1", "train.checkpoint_every=1it")
    recipe = small(data, *more, models=[VIT], t_head=None)
    for _ in range(2):  # a checkpoint of step 6 has three of the four
        with pytest.raises(mokd_fast.UserError, match=r"4 steps in a row .*at step 4: self_mlp_1"):
            pretrain(recipe, run=tmp_path / "run", console=silent())
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "00000006.pt"


def test_gradients_are_named(data, tmp_path):
    trainer = trainer_of(data, tmp_path, "train.max_skipped=1")
    weight = trainer.mokd.students[0].backbone.stem.conv.weight
    weight.register_hook(lambda g: g.fill_(torch.nan))
    with pytest.raises(mokd_fast.UserError, match="non-finite gradient at step 1"):
        trainer.fit()


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reads of values, copies to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._python = _PythonReads(self.found)

    def __enter__(self):
        self._python.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._python.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "unique", "equal.")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class _PythonReads(TorchFunctionMode):
    """On the CPU these copy nothing and never reach the dispatcher. (A `to` with a torch.device is
    a tensor's way to its peers' device.)"""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "cpu", "item", "__array__") or (
            name == "to" and "cpu" in [x for x in (*args[1:], kwargs) if isinstance(x, str)]
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_host_reads_once_a_row(data, tmp_path, precision):
    overrides = (f"train.precision={precision}", "train.log_every=3", "train.cuda_graph=false")
    models = (VIT, VIT) if precision == "fp16" else MODELS  # fp16 convolutions are slow on CPUs
    trainer = trainer_of(data, tmp_path, *overrides, models=models)
    batches = trainer.loader.batches()
    prepared = [trainer.to_device(next(batches)) for _ in range(6)]
    trainer.to_device = lambda views: views  # decoding pictures is not of the step
    meter = Meter(iter(prepared))
    on_gpu = trainer.device.type == "cuda"
    with HostReads() as host:
        for k in range(6):
            if on_gpu and k:  # the first one makes the optimizers' state and picks convolutions
                torch.cuda.set_sync_debug_mode("error")
            try:
                meter.add(k + 1, trainer.step(k, meter))
            finally:
                if on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
            assert host.found == [], f"step {k}"
            if (k + 1) % 3 == 0:
                meter.read(10)
                assert host.found == ["tolist"]
                host.found.clear()
