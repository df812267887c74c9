"""train.cuda_graph: forward and backward of a step as one CUDA graph, launched by one call.

A graph repeats launches with the addresses and host numbers they were recorded with. So all that
changes from step to step reaches it through tensors that stay where they are:

    crops, temperatures           copied and filled into tensors of the graph's own
    centres                       `Center` makes new tensors: copied back into the first ones
    weights, BatchNorm, scalers   changed in place, by everybody
    gradients, losses, outputs    tensors of the graph, overwritten by the next step

Clip, optimizer, EMA and centres stay outside: their rates are host numbers (PyTorch's fused
optimizers take no other weight decay), and they are a few launches for all tensors together, where
forward and backward are thousands.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from ..nn import MOKD, Temperatures
from ..nn.mokd import StepLosses
from .memory import out_of_memory
from .recipe import Recipe

T = TypeVar("T")
Run = Callable[[Tensor, Tensor | None, Sequence[Temperatures]], StepLosses]

# Steps that run as ever before one is recorded: libraries load their kernels and make their
# workspaces, autotuning measures. PyTorch's notes take three.
WARMUP = 3


class Recorder:
    """torch.cuda.CUDAGraph, on a stream of its own: the default one cannot be recorded. (The tests
    have one for the CPU.)"""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # one, so that warm-up steps share their memory

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
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            found = run()
        return found, graph.replay


class StepGraph:
    """`run` (forward and backward of `mokd`) for batches of one size, recorded after WARMUP steps.

    Called like it, once a step, when the students have no gradients (a graph would add to them in
    every replay). Its gradients and outputs hold until the next call; `totals` and `terms` stay. A
    batch of another size than the first one's runs as ever. UserError where the networks do what no
    graph can record.
    """

    def __init__(self, mokd: MOKD, run: Run, recorder: Recorder) -> None:
        self._mokd, self._run, self._recorder = mokd, run, recorder
        self._warm = 0  # steps
        self._views: list[Tensor | None] = []
        self._replay: Callable[[], object] | None = None

    def __call__(
        self, global_views: Tensor, local_views: Tensor | None, taus: Sequence[Temperatures]
    ) -> StepLosses:
        views = [global_views, local_views]
        if not self._views:
            self._settle(views, taus)
        if [x is not None and x.shape for x in views] != self._sizes:
            return self._run(global_views, local_views, taus)
        self._fill(views, taus)
        if self._warm < WARMUP:
            self._warm += 1
            return self._recorder.warm_up(self._forward)
        (self._replay or self._record())()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        totals, terms = self._out.totals, self._out.terms
        numbers = torch.stack([*totals, *terms.values()]).unbind()  # the caller may keep them
        mine = dict(zip(terms, numbers[len(totals) :], strict=True))
        return self._out._replace(totals=list(numbers[: len(totals)]), terms=mine)

    def _settle(self, views: list[Tensor | None], taus: Sequence[Temperatures]) -> None:
        """The tensors through which a step's numbers come in."""
        self._sizes = [x is not None and x.shape for x in views]
        self._views = [None if x is None else torch.empty_like(x) for x in views]
        assert views[0] is not None
        places = torch.empty(len(taus), 3, device=views[0].device)
        self._taus = [Temperatures(*row.unbind()) for row in places]
        self._centers = dict(self._mokd.centers.named_buffers())

    def _fill(self, views: list[Tensor | None], taus: Sequence[Temperatures]) -> None:
        for place, x in zip(self._views, views, strict=True):
            if place is not None and x is not None:
                place.copy_(x)
        for places, row in zip(self._taus, taus, strict=True):
            for number, tau in zip(places, row, strict=True):
                number.fill_(tau)  # type: ignore[union-attr]  # copies from the host would wait
        centers = self._mokd.centers
        centers.wait()
        for name, now in dict(centers.named_buffers()).items():
            if (place := self._centers[name]) is not now:
                setattr(centers, name, place.copy_(now))

    def _forward(self) -> StepLosses:
        global_views, local_views = self._views
        assert global_views is not None
        return self._run(global_views, local_views, self._taus)

    def _record(self) -> Callable[[], object]:
        """Its replay."""
        students = list(self._mokd.students.parameters())
        try:
            self._out, self._replay = self._recorder.record(self._forward)
        except RuntimeError as error:
            found = [error.__context__ or error, error]  # the end of one that broke off fails too
            if out_of_memory(found[0]):
                raise found[0] from None
            reason = "; ".join(dict.fromkeys(str(each).partition("\n")[0] for each in found))
            raise UserError(
                f"train.cuda_graph=true: a step of these networks cannot be recorded ({reason}); "
                "set train.cuda_graph=false and the run goes on"
            ) from error
        self._gradients = [(p, p.grad) for p in students if p.grad is not None]
        return self._replay


def refuse_graph(recipe: Recipe, device: torch.device, processes: int) -> None:
    """UserError where a recipe asks for a graph that this run cannot have."""
    if not recipe.train.cuda_graph:
        return
    remedy = "set train.cuda_graph=false"
    if device.type != "cuda":
        raise UserError(f"train.cuda_graph=true needs a GPU, this run is on the CPU: {remedy}")
    if processes > 1:
        raise UserError(
            f"train.cuda_graph=true is for one process, there are {processes}, whose gradients "
            f"DistributedDataParallel averages: {remedy}, or start one"
        )
