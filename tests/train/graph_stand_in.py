"""A CUDA graph's stand-in on the CPU: the operators of a step, noted as they are dispatched, with
the tensors they take and give. A replay calls them again with the same tensors and numbers.

It is as strict as the real one, and for the same reasons: nothing that happens between operators
(Python, the host) is repeated, what comes from elsewhere is read where it was, the pass that is
recorded leaves nothing behind, neither in weights, statistics and optimizer state nor in what it
returns, and a replay spoils what another recording made.
"""

from functools import partial
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
        self.lasting = frozenset(map(_memory, known))
        self.known = set(self.lasting)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs under it, and its operators are noted."""
        return True

    def spoil(self) -> None:
        """NaN into all memory of the recording's own."""
        for tensor in self.alive:
            if _memory(tensor) not in self.lasting:
                tensor.untyped_storage().fill_(0xFF)

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
        self._notes: list[_Notes] = []

    def warm_up(self, run: Any) -> Any:
        self.warm += 1
        return run()

    def _known(self) -> list[Tensor]:
        """Tensors that stay where they are: of the networks, the optimizers, the graph's own, the
        scalers'."""
        trainer, graph = self._trainer, self._trainer.graph
        assert graph is not None
        own: list[Any] = [graph._views, graph._taus, graph._momentum]
        own += [(scaler._scale, scaler._growth_tracker) for scaler in trainer.scalers]
        for optimizer in trainer.optimizers:
            own += [list(optimizer._adapter.rates), list(optimizer.torch.state.values())]  # type: ignore
        return [*trainer.mokd.parameters(), *trainer.mokd.buffers(), *_tensors(own)]

    def record(self, run: Any) -> Any:
        known = self._known()
        before = [tensor.detach().clone() for tensor in known]
        try:
            # As nothing can be compiled while a GPU records.
            with torch.compiler.set_stance("fail_on_recompile"), _Notes(known) as notes:
                out = run()
        finally:
            with torch.no_grad():
                for tensor, value in zip(known, before, strict=True):
                    tensor.copy_(value)
        notes.spoil()  # nothing has been computed yet
        self._notes.append(notes)
        return out, partial(self.replay, notes)

    @torch.no_grad()
    def replay(self, notes: _Notes) -> None:
        self.replays += 1
        for other in self._notes:  # all have their memory in one pool
            if other is not notes:
                other.spoil()
        for func, args, kwargs, recorded in notes.calls:
            again = func(*args, **kwargs)
            taken = set(map(_memory, _tensors((args, kwargs))))
            for new, place in zip(_tensors(again), _tensors(recorded), strict=True):
                if _memory(new) not in taken:  # else a view, or changed in place
                    place.copy_(new)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """train.cuda_graph=true runs here, with a stand-in for each trainer, in this list."""
    return stand_ins(monkeypatch)


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    made: list[StandIn] = []

    def graph(mokd: MOKD, run: Any, recorder: None) -> StepGraph:
        made.append(StandIn(run.__self__))
        return StepGraph(mokd, run, made[-1])

    monkeypatch.setenv("MOKD_FAST_BACKEND", "reference")  # kernels write past the dispatcher
    monkeypatch.setattr(loop, "refuse_graph", lambda *_: None)
    monkeypatch.setattr(loop, "Recorder", lambda: None)
    monkeypatch.setattr(loop, "StepGraph", graph)
    return made
