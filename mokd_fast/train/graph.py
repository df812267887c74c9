"""train.cuda_graph: an optimizer step as one CUDA graph, launched by one call.

A graph repeats launches with the addresses and host numbers they were recorded with. So all that
changes from step to step reaches it through tensors that stay where they are:

    crops, temperatures, EMA momentum    copied and filled into tensors of the graph's own
    learning rates, weight decays        filled into tensors of the optimizers: adapters.Fused
    centres                              `Center` makes new tensors: copied back into the first ones
    weights, their optimizer state,      changed in place, by everybody
    BatchNorm, scalers
    losses, diagnostics                  tensors of the graph, copied after every launch

What the host decides makes a `Kind` of step, and each kind is a recording of its own.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from ..nn import MOKD, Temperatures
from .memory import out_of_memory
from .meter import StepResult
from .optim import KINDS
from .recipe import Recipe

T = TypeVar("T")
Batch = tuple[Tensor, Tensor | None]  # global and local views on the device


class Kind(NamedTuple):
    """What steps do not have in common."""

    frozen: bool  # the last layers have no gradients
    logged: bool  # there are diagnostics


Run = Callable[[Iterable[Batch], Sequence[Temperatures], Tensor, Kind], StepResult]
Recording = tuple[StepResult, Callable[[], object]]  # what a replay fills, and the replay

# Steps that run as ever before one is recorded: libraries load their kernels and make their
# workspaces, autotuning measures, torch.compile compiles, which is refused while one is recorded.
# PyTorch's notes take three.
WARMUP = 3


class Recorder:
    """torch.cuda.CUDAGraph, on a stream of its own: the default one cannot be recorded. (The tests
    have one for the CPU.)"""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # one, so that warm-up steps share their memory
        # One for all recordings too: none needs what another one leaves there.
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], T]) -> T:
        """Runs as ever, where it would be recorded."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            found = run()
        torch.cuda.current_stream().wait_stream(self._stream)
        return found

    def record(self, run: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        """What `run` returns, tensors without numbers yet, and what gives them some: a replay."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's threads pin memory meanwhile, which "global" would refuse.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            found = run()
        return found, graph.replay


class StepGraph:
    """`run` (a whole step of `mokd`) for batches of one size, recorded after WARMUP steps.

    Called like it, once a step, with one batch. The first step of a kind runs as ever (it may make
    optimizer state, which a replay would make again), and so does a batch of another size than the
    first one's. UserError where the networks do what no graph can record.
    """

    def __init__(self, mokd: MOKD, run: Run, recorder: Recorder) -> None:
        self._mokd, self._run, self._recorder = mokd, run, recorder
        self._warm = 0  # steps
        self._seen: set[Kind] = set()
        self._recorded: dict[Kind, Recording] = {}
        self._views: list[Tensor | None] = []

    def __call__(
        self,
        batches: Iterable[Batch],
        taus: Sequence[Temperatures],
        momentum: Tensor,
        kind: Kind,
    ) -> StepResult:
        (views,) = batches
        if not self._views:
            self._settle(views, taus, momentum)
        if [x is not None and x.shape for x in views] != self._sizes:
            return self._whole(views, taus, momentum, kind)
        self._fill(views, taus, momentum)
        if self._warm < WARMUP or kind not in self._seen:
            self._warm += 1
            self._seen.add(kind)
            return self._recorder.warm_up(lambda: self._inside(kind))
        if kind not in self._recorded:
            self._recorded[kind] = self._record(kind)
        found, replay = self._recorded[kind]
        replay()
        # The caller may keep them.
        return StepResult(_copies(found.losses), found.skipped.clone(), _copies(found.diagnostics))

    def _settle(self, views: Batch, taus: Sequence[Temperatures], momentum: Tensor) -> None:
        """The tensors through which a step's numbers come in."""
        self._sizes = [x is not None and x.shape for x in views]
        self._views = [None if x is None else torch.empty_like(x) for x in views]
        places = torch.empty(len(taus), 3, device=views[0].device)
        self._taus = [Temperatures(*row.unbind()) for row in places]
        self._momentum = torch.empty_like(momentum)
        self._mokd.centers.wait()
        self._centers = dict(self._mokd.centers.named_buffers())

    def _fill(self, views: Batch, taus: Sequence[Temperatures], momentum: Tensor) -> None:
        for place, x in zip(self._views, views, strict=True):
            if place is not None and x is not None:
                place.copy_(x)
        for places, row in zip(self._taus, taus, strict=True):
            for number, tau in zip(places, row, strict=True):
                number.fill_(tau)  # type: ignore[union-attr]  # copies from the host would wait
        self._momentum.copy_(momentum)

    def _inside(self, kind: Kind) -> StepResult:
        global_views, local_views = self._views
        assert global_views is not None
        return self._whole((global_views, local_views), self._taus, self._momentum, kind)

    def _whole(
        self, views: Batch, taus: Sequence[Temperatures], momentum: Tensor, kind: Kind
    ) -> StepResult:
        """With the centres where they were."""
        result = self._run([views], taus, momentum, kind)
        centers = self._mokd.centers
        centers.wait()
        for name, place in self._centers.items():
            setattr(centers, name, place.copy_(centers.get_buffer(name)))
        return result

    def _record(self, kind: Kind) -> Recording:
        try:
            return self._recorder.record(lambda: self._inside(kind))
        except RuntimeError as error:
            # Nothing has run: no update of the centres waits, and none of them has moved.
            self._mokd.centers.forget()
            for name, place in self._centers.items():
                setattr(self._mokd.centers, name, place)
            found = [error.__context__ or error, error]  # the end of one that broke off fails too
            if out_of_memory(found[0]):
                raise found[0] from None
            reason = "; ".join(dict.fromkeys(str(each).partition("\n")[0] for each in found))
            raise UserError(
                f"train.cuda_graph: a step of these networks cannot be recorded ({reason}); "
                "set train.cuda_graph=false and the run goes on"
            ) from error


def _copies(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of 0-d tensors of one dtype, by one launch."""
    if not numbers:
        return {}
    return dict(zip(numbers, torch.stack(list(numbers.values())).unbind(), strict=True))


def records(recipe: Recipe, device: torch.device, processes: int, mokd: MOKD) -> bool:
    """Whether the steps of these networks are recorded."""
    train = recipe.train
    if train.cuda_graph != "auto":
        return train.cuda_graph
    alone = device.type == "cuda" and processes == train.accumulate == 1
    known = all(_is_timms(student.backbone) for student in mokd.students)
    recordable = all(KINDS[model.optimizer.name].recordable for model in recipe.models)
    return alone and known and recordable and not train.checkpoint_activations


def _is_timms(backbone: object) -> bool:
    """Or of a class made from its: others may do what no graph can record."""
    return any(kind.__module__.startswith("timm.models.") for kind in type(backbone).__mro__)


def refuse_graph(recipe: Recipe, device: torch.device, processes: int) -> None:
    """UserError where a recipe asks for a graph that this run cannot have."""
    if recipe.train.cuda_graph is not True:
        return
    remedy = "set train.cuda_graph=false"
    if device.type != "cuda":
        raise UserError(f"train.cuda_graph=true needs a GPU, this run is on the CPU: {remedy}")
    if processes > 1:
        raise UserError(
            f"train.cuda_graph=true is for one process, there are {processes}, whose gradients "
            f"DistributedDataParallel averages: {remedy}, or start one"
        )
    for i, model in enumerate(recipe.models):
        name = model.optimizer.name
        if not KINDS[name].recordable:
            fit = ", ".join(kind for kind, adapter in KINDS.items() if adapter.recordable)
            raise UserError(
                f"models.{i}.optimizer.name={name} takes rates as numbers of the host, which the "
                f"graph of train.cuda_graph=true would repeat: choose one of {fit}, or {remedy}"
            )
