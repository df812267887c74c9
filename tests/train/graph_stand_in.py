"""A CUDA graph's stand-in on the CPU: the operators of a step, noted as they are dispatched, with
the tensors they take and give. A replay calls them again with the same tensors and numbers.

It is as strict as the real one, and for the same reasons: nothing that happens between operators
(Python, the host) is repeated, what comes from elsewhere is read where it was, and the pass that is
recorded leaves nothing behind, neither in weights and statistics nor in what it returns.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mokd_fast.nn import MOKD
from mokd_fast.train import loop
from mokd_fast.train.graph import StepGraph
from mokd_fast.train.loop import Trainer

# Of the host: it waits for a number, or makes a tensor of numbers of its own.
READS = ("_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "masked_select")
MAKES = ("lift", "lift_fresh", "lift_fresh_copy")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Notes(TorchDispatchMode):
    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.alive = list(known)  # or another tensor could get the memory of one that went
        self.known = {_memory(tensor) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS + MAKES:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = _tensors((args, kwargs))
        if strange := [tuple(t.shape) for t in given if _memory(t) not in self.known]:
            raise RuntimeError(f"{func} takes tensors {strange} that nobody keeps where they are")
        out = func(*args, **kwargs)
        # Not the tensors themselves, whose autograd graphs would stay.
        note = tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs, out))
        self.calls.append((func, *note))
        self.alive += _tensors(note)
        self.known |= {_memory(tensor) for tensor in _tensors(out)}
        return out


class StandIn:
    """A `Recorder` for a trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.warm = self.replays = 0

    def warm_up(self, run: Any) -> Any:
        self.warm += 1
        return run()

    def _known(self) -> list[Tensor]:
        """Tensors that stay where they are: of the networks, the graph's own, the scales."""
        trainer, graph = self._trainer, self._trainer.graph
        assert graph is not None
        own = [graph._views, graph._taus, [scaler._scale for scaler in trainer.scalers]]
        return [*trainer.mokd.parameters(), *trainer.mokd.buffers(), *_tensors(own)]

    def record(self, run: Any) -> Any:
        known = self._known()
        before = [tensor.detach().clone() for tensor in known]
        try:
            with _Notes(known) as notes:
                out = run()
        finally:
            with torch.no_grad():
                for tensor, value in zip(known, before, strict=True):
                    tensor.copy_(value)
        self._calls = notes.calls
        self._alive = notes.alive
        lasting = set(map(_memory, known))
        for tensor in _tensors([call[1:] for call in self._calls]):
            if _memory(tensor) not in lasting:
                tensor.untyped_storage().fill_(0xFF)  # NaN: nothing has been computed yet
        return out, self.replay

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, recorded in self._calls:
            again = func(*args, **kwargs)
            taken = set(map(_memory, _tensors((args, kwargs))))
            for new, place in zip(_tensors(again), _tensors(recorded), strict=True):
                if _memory(new) not in taken:  # else a view, or changed in place
                    place.copy_(new)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """train.cuda_graph=true runs here, with a stand-in for each trainer, in this list."""
    made: list[StandIn] = []

    def graph(mokd: MOKD, run: Any, recorder: None) -> StepGraph:
        made.append(StandIn(run.__self__))
        return StepGraph(mokd, run, made[-1])

    monkeypatch.setenv("MOKD_FAST_BACKEND", "reference")  # kernels write past the dispatcher
    monkeypatch.setattr(loop, "refuse_graph", lambda *_: None)
    monkeypatch.setattr(loop, "Recorder", lambda: None)
    monkeypatch.setattr(loop, "StepGraph", graph)
    return made
