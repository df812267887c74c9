"""train.cuda_graph: the bits of the steps without it, by a stand-in on the CPU. What a forward pass
does on a GPU is looked at with tensors that have no numbers; one test is for a real one."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mokd_fast.errors import UserError
from mokd_fast.nn import Temperatures
from mokd_fast.train import loop
from mokd_fast.train.checkpoint import newest
from mokd_fast.train.dry import dry_run
from mokd_fast.train.graph import WARMUP, Recorder, StepGraph, refuse_graph
from mokd_fast.train.loop import Trainer, pretrain
from mokd_fast.train.networks import build
from tests.train.graph_stand_in import on_the_cpu  # noqa: F401
from tests.train.recipes import CNN, VIT, broken_off, pictures, silent, small
from tests.train.test_loop import final_state, metrics

STEPS = 9
GRAPH = "train.cuda_graph=true"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), 14)


def recipe_of(data, *overrides, models=(CNN, VIT), **more):
    """Temperatures rise up to step 8, the last layers are frozen up to step 5, recorded is 4."""
    warmup = dict.fromkeys(("self", "cross", "search"), "8it")
    return small(
        data, f"train.duration={STEPS}it", "train.warmup=1it", "train.freeze_last_layers=5it",
        "train.checkpoint_every=20it", "train.device=cpu", *overrides,
        models=[{**m, "temperature_warmup": warmup} for m in models], **more,
    )  # fmt: skip


def trained(recipe, run, smaller=None):
    """The trainer and the results of all steps; the pictures of step 6 are NaN, of step `smaller`
    there are half as many."""
    trainer = Trainer(recipe, run, silent())
    trainer.mokd.train()
    batches = trainer.loader.batches(0)
    views = [trainer.to_device(next(batches)) for _ in range(STEPS)]
    trainer.to_device = lambda views: views
    views[6][0].fill_(torch.nan)
    if smaller is not None:
        views[smaller] = tuple(x[:, :2] for x in views[smaller])
    return trainer, [trainer.step(k, iter([views[k]])) for k in range(STEPS)]


@pytest.fixture(scope="module")
def eager(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOKD_FAST_BACKEND", "reference")
        return trained(recipe_of(data), tmp_path_factory.mktemp("eager") / "run")


def assert_same(one, two):
    (trainer, results), (other, others) = one, two
    for k, (a, b) in enumerate(zip(results, others, strict=True)):
        mine, theirs = (r.losses | r.diagnostics | {"skipped": r.skipped} for r in (a, b))
        assert list(mine) == list(theirs)
        for name, value in mine.items():
            assert torch.allclose(value, theirs[name], rtol=0, atol=0, equal_nan=True), (k, name)
    mine, theirs = (
        tree_leaves([t.mokd.state_dict(), [o.torch.state_dict() for o in t.optimizers],
                     [s.state_dict() for s in t.scalers]])
        for t in (trainer, other)
    )  # fmt: skip
    for x, y in zip(mine, theirs, strict=True):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


WAYS = {
    "bf16, logits stored": (("train.precision=bf16", "loss.prototypes=fused"), {}),
    "fp16": (("train.precision=fp16",), {"models": (VIT,), "t_head": None}),
    "channels_last, LARS, no local crops": (
        ("train.channels_last=true", "models.0.optimizer.name=lars", "augment.locals=0"),
        {},
    ),
    "cross search": (("t_head.search=cross",), {}),
    "all queries in both maps": (("t_head.queries=all", "t_head.maps=both"), {}),
}
MORE = ("cross search", "all queries in both maps")


def test_the_bits_of_the_steps_without_it(eager, data, tmp_path, on_the_cpu):  # noqa: F811
    """Over temperatures and rates that change, last layers that thaw, a step that is skipped,
    logged steps with diagnostics; results that were kept stay."""
    replayed = trained(recipe_of(data, GRAPH), tmp_path / "run")
    (stand_in,) = on_the_cpu
    assert (stand_in.warm, stand_in.replays) == (WARMUP, STEPS - WARMUP)
    assert [bool(result.skipped) for result in eager[1]] == [k == 6 for k in range(STEPS)]
    assert {k for k, result in enumerate(eager[1]) if result.diagnostics} == {1, 3, 5, 7, 8}
    assert_same(eager, replayed)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow) if way in MORE else way for way in WAYS]
)
def test_every_way_has_the_bits(way, data, tmp_path, on_the_cpu):  # noqa: F811
    overrides, more = WAYS[way]
    plain = trained(recipe_of(data, *overrides, **more), tmp_path / "eager")
    replayed = trained(recipe_of(data, *overrides, GRAPH, **more), tmp_path / "replayed")
    assert on_the_cpu[0].replays == STEPS - WARMUP
    assert_same(plain, replayed)


def test_a_batch_of_another_size_runs_as_ever(data, tmp_path, on_the_cpu):  # noqa: F811
    plain = trained(recipe_of(data), tmp_path / "eager", smaller=7)
    replayed = trained(recipe_of(data, GRAPH), tmp_path / "replayed", smaller=7)
    assert on_the_cpu[0].replays == STEPS - WARMUP - 1
    assert_same(plain, replayed)


def without(what):
    """What breaks a StepGraph: one of the things that change is not brought in."""
    fill, call = StepGraph._fill, StepGraph.__call__

    def filled(self, views, taus):
        if what == "crops" and self._replay is not None:
            views = [None, None]
        if what == "temperatures" and self._replay is not None:
            taus = self._taus
        if what == "centres":
            self._mokd.centers.wait()
            self._centers = dict(self._mokd.centers.named_buffers())
        fill(self, views, taus)

    def called(self, global_views, local_views, taus):
        run = self._run
        if what == "numbers of the host":  # instead of tensors
            self._run = lambda large, small, _: run(large, small, taus)
        try:
            return call(self, global_views, local_views, taus)
        finally:
            self._run = run

    return {"_fill": filled, "__call__": called}


@pytest.mark.parametrize("what", ["crops", "temperatures", "centres", "numbers of the host"])
def test_the_stand_in_notices(what, eager, data, tmp_path, monkeypatch, on_the_cpu):  # noqa: F811
    for name, broken in without(what).items():
        monkeypatch.setattr(StepGraph, name, broken)
    replayed = trained(recipe_of(data, GRAPH), tmp_path / "replayed")
    with pytest.raises(AssertionError):
        assert_same(eager, replayed)


def test_a_run_of_it_resumes_and_may_go_on_without(data, tmp_path, on_the_cpu):  # noqa: F811
    plain = recipe_of(data, "train.checkpoint_every=2it")
    recipe = recipe_of(data, "train.checkpoint_every=2it", GRAPH)
    whole = final_state(pretrain(plain, run=tmp_path / "whole", console=silent()))["model"]
    for name, rest in (("parts", recipe), ("without", plain)):
        broken_off(recipe, tmp_path / name, 5)
        pretrain(rest, run=tmp_path / name, console=silent())
        found = final_state(tmp_path / name)["model"]
        assert all(torch.equal(value, found[key]) for key, value in whole.items()), name
        assert metrics(tmp_path / name)[-1]["loss_1"] == metrics(tmp_path / "whole")[-1]["loss_1"]
    assert [stand_in.replays for stand_in in on_the_cpu] == [2, 2, 2]


def test_a_dry_run_times_replays(data, on_the_cpu, monkeypatch):  # noqa: F811
    now = iter(range(100))
    monkeypatch.setattr("mokd_fast.train.dry._now", lambda _: next(now))
    recipe = recipe_of(data, GRAPH)
    assert dry_run(recipe, silent())["seconds"] == pytest.approx(1 / 3)
    assert (on_the_cpu[0].warm, on_the_cpu[0].replays) == (WARMUP, 4), "one of them is not timed"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.accumulate=2", "set accumulate=1 or cuda_graph=false"),
        ("train.checkpoint_activations=true", "set one of them to false"),
        ("train.compile=true", "never been tried with compile or pack_crops"),
        ("train.pack_crops=true", "never been tried with compile or pack_crops"),
    ],
)
def test_what_it_cannot_be_used_with(override, expected, data):
    with pytest.raises(UserError, match=expected):
        recipe_of(data, GRAPH, override)


def test_where_it_cannot_be_used(run, data, tmp_path):
    recipe = recipe_of(data, GRAPH)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    for words in ((), ("--dry-run",)):
        code, _, error = run("pretrain", path, "train.device=cpu", "--run", tmp_path / "x", *words)
        assert code == 2 and "needs a GPU, this run is on the CPU: set train.cuda_graph" in error
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="for one process, there are 2"):
        refuse_graph(recipe, torch.device("cuda"), 2)
    refuse_graph(recipe, torch.device("cuda"), 1)
    refuse_graph(recipe_of(data), torch.device("cpu"), 2)


def test_networks_that_cannot_be_recorded(data, tmp_path, on_the_cpu, monkeypatch):  # noqa: F811
    """A layer that reads a number: the run says so, and goes on without; no step is lost."""
    make = loop.make_networks

    def read(layer, inputs):
        inputs[0].sum().item()

    def reading(*args):
        mokd = make(*args)
        mokd.students[1].mlp_head.mlp[0].register_forward_pre_hook(read)
        return mokd

    monkeypatch.setattr(loop, "make_networks", reading)
    with pytest.raises(UserError, match=r"cannot be recorded \(.* not permitted .*\); set"):
        pretrain(recipe_of(data, GRAPH), run=tmp_path / "run", console=silent())
    assert newest(tmp_path / "run")[1]["step"] == WARMUP
    pretrain(recipe_of(data), run=tmp_path / "run", console=silent())
    pretrain(recipe_of(data), run=tmp_path / "plain", console=silent())
    plain, found = (final_state(tmp_path / name)["model"] for name in ("plain", "run"))
    assert all(torch.equal(value, found[name]) for name, value in plain.items())


@pytest.mark.parametrize("short", [1, 3], ids=["the graph", "and stored logits"])
def test_out_of_memory(short, data, tmp_path, on_the_cpu, monkeypatch):  # noqa: F811
    """While it is recorded, `short` times; what is tried and told then is without the graph."""
    recipe = recipe_of(data, GRAPH, "loss.prototypes=fused")
    losses, calls = Trainer._losses, []

    def out_of_memory(self, *args):
        calls.append(1)
        if WARMUP < len(calls) <= WARMUP + short:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(self, *args)

    monkeypatch.setattr(Trainer, "_losses", out_of_memory)
    more = "" if short == 1 else "train.checkpoint_activations=true and "
    expected = f"set train.cuda_graph=false and {more}the run goes on"
    with pytest.raises(UserError, match=rf"out of memory in step 4 \(.*{expected}"):
        pretrain(recipe, run=tmp_path / "run", console=silent())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(data, tmp_path):
    """The losses of the steps without it, up to the order of a GPU's sums; no replay waits."""
    found = []
    for more in ((), (GRAPH,)):
        trainer = Trainer(recipe_of(data, "train.device=cuda", *more), tmp_path / "run", silent())
        trainer.mokd.train()
        batches, losses = trainer.loader.batches(0), []
        views = [trainer.to_device(next(batches)) for _ in range(STEPS)]
        trainer.to_device = lambda views: views
        for k in range(STEPS):
            torch.cuda.set_sync_debug_mode("error" if more and k > WARMUP else "default")
            try:
                losses.append(trainer.step(k, iter([views[k]])).losses)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append([{name: float(x) for name, x in step.items()} for step in losses])
        trainer.lock.release()
    assert trainer.graph._replay is not None
    for mine, theirs in zip(*found, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-2)


def test_the_recorder_of_a_gpu_knows_its_calls():
    """By their names: no graph is recorded here."""
    cuda = torch.cuda
    with (
        mock.patch.object(cuda, "Stream"),
        mock.patch.object(cuda, "CUDAGraph") as made,
        mock.patch.object(cuda, "stream"),
        mock.patch.object(cuda, "current_stream") as current,
        mock.patch.object(cuda, "graph", mock.create_autospec(cuda.graph)) as recording,
    ):
        recorder = Recorder()
        assert recorder.warm_up(lambda: 7) == 7
        cuda.stream.assert_called_once_with(recorder._stream)
        recorder._stream.wait_stream.assert_called_once_with(current())
        current().wait_stream.assert_called_once_with(recorder._stream)
        found, replay = recorder.record(lambda: 8)
        assert (found, replay) == (8, made().replay)
        recording.assert_called_once_with(
            made(), stream=recorder._stream, capture_error_mode="thread_local"
        )


class OnTheHost(TorchDispatchMode):
    """Operators with a tensor that is not on the GPU: a copy to it, for which the host waits."""

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x)]
        self.calls += 1
        if any(x.device.type != "cuda" for x in tensors):
            self.found.append(str(func))
        return out


@pytest.mark.parametrize(
    ("backend", "overrides"),
    [
        ("reference", ()),
        ("", ()),
        ("", ("t_head.queries=all", "loss.prototypes=fused-linear")),
        ("", ("t_head.search=cross",)),
    ],
)
def test_a_forward_pass_stays_on_the_gpu(backend, overrides, monkeypatch):
    """On one that is not there, by tensors without numbers; a backward pass needs a real one."""
    properties = SimpleNamespace(total_memory=80 << 30, L2_cache_size=50 << 20, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setenv("MOKD_FAST_BACKEND", backend)
    mokd = build(recipe_of("nowhere", *overrides)).train()
    with FakeTensorMode(), torch.device("cuda"):
        for module in mokd.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(p.shape), p.requires_grad)
            for name, x in module._buffers.items():
                module._buffers[name] = torch.empty(x.shape, dtype=x.dtype)
        large, small_ = torch.empty(2, 4, 1, 28, 28), torch.empty(2, 4, 1, 14, 14)
        taus = [Temperatures(*torch.empty(3).unbind())] * 2
        with OnTheHost() as host:
            out = mokd(large, small_, taus)
    assert host.found == [] and host.calls > 500
    assert out.totals[0].device.type == "cuda" and out.totals[0].requires_grad
