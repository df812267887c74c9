"""What is subtracted from teacher logits so that no prototype wins every image.

Two centres c [K] of the teacher distribution softmax((z - c) / temperature):

    Center            c = m * c + (1 - m) * mean_n z_n     DINO (Caron et al. 2021, algorithm 1)
    sinkhorn_center   every prototype gets the same mass   SwAV (Caron et al. 2020), DINOv2

Letters: T teacher rows, B images, K prototypes, N = T * B samples.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .column_mean import column_mean
from .distill import check_temperature
from .matvec import matvec
from .reference import accumulation_dtype

SINGLE = "center"  # the buffer of a Center of one head: the name it has in DINO


class LinearLogits(NamedTuple):
    """Teacher logits features @ prototypes.T that are not there."""

    features: Tensor  # [..., D]
    prototypes: Tensor  # [K, D]


@torch.no_grad()
def rank_mean(logits: Tensor, mean: Tensor | None = None) -> Tensor:
    """[K + 1]: the mean of this process's rows (`mean` if it is known), and 1 if it has any. Summed
    over the ranks, the last entry is the number of means in the sum."""
    mean = column_mean(logits) if mean is None else mean
    return torch.cat([mean, mean.new_full((1,), float(logits.numel() > 0))])


def moved_center(center: Tensor, mean: Tensor, momentum: float) -> Tensor:
    """The EMA as a new tensor of the centre's shape; its old values if no rank had a row."""
    # A centre made in inference mode could not be saved for the backward of a later step.
    with torch.inference_mode(False), torch.no_grad():
        batch, ranks = mean[:-1], mean[-1]
        moved = center * momentum + batch / ranks.clamp(min=1) * (1 - momentum)
        return torch.where(ranks > 0, moved, center)


class _Pending(NamedTuple):
    """An update that is not applied yet, one entry a head."""

    heads: list[str]
    prototypes: list[Tensor | None]  # of `LinearLogits`
    means: list[Tensor]  # [K + 1], or [D + 1] of `LinearLogits`: as `rank_mean`
    work: dist.Work | None


@torch.no_grad()
def _mean_logits(mean: Tensor, prototypes: Tensor) -> Tensor:
    """`rank_mean` [K + 1] of features @ prototypes.T from that of the features [D + 1]."""
    return torch.cat([matvec(prototypes, mean[:-1]), mean[-1:]])


class Center(nn.Module):
    """Moving mean of teacher logits, for one head or for several that share one all-reduce.

    Args:
        prototypes: K of one head, or {name of a head: its K}.
        momentum: m of the moving mean, 0..1.

    The state dict has one fp32 entry [K] a head, zeros at first: `center` for one head, the names
    for several. `.double()` widens them; `.half()` and `.bfloat16()` do not narrow them, an EMA of
    16 bit stands still.

    `update` starts the all-reduce and returns. The EMA is applied when somebody needs it: the next
    read (`center[name]`, `center.value`) or `update`, `state_dict()`, `load_state_dict()`, `.to()`,
    a copy, a pickle, or `wait()`. `buffers()` does not apply it: call `wait()` before. It makes
    new tensors, so the centre that a loss has saved for backward stays as it was.

    As in DINO the loss of a step takes the centre from before the step's own update: read it
    first, then update.

    Raises ValueError for no head, a size that is no integer >= 1, a name that no buffer can have
    ("", "a.b", "update"), and a momentum outside 0..1.

    Example:
        >>> import torch
        >>> center = Center(32)
        >>> center.update(torch.ones(2, 8, 32))
        >>> round(center.value.mean().item(), 6)
        0.1
    """

    def __init__(self, prototypes: int | Mapping[str, int], momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in 0..1, got {momentum}")
        heads = dict(prototypes) if isinstance(prototypes, Mapping) else {SINGLE: prototypes}
        # type() and not isinstance(): True is no size.
        if not heads or not all(type(k) is int and k >= 1 for k in heads.values()):
            raise ValueError(f"prototypes must be a size K >= 1 for each head, got {prototypes}")
        self.momentum = momentum
        self._pending: _Pending | None = None
        for name in heads:
            if fault := self._fault(name):
                raise ValueError(f"a head cannot be called {name!r}: {fault}")
        for name, size in heads.items():
            self.register_buffer(name, torch.zeros(size))

    @property
    def value(self) -> Tensor:
        """The centre [K] of a single head. ValueError when there are several."""
        return self[self._only()]

    def __getitem__(self, head: str) -> Tensor:
        """The centre [K] of a head. ValueError for an unknown one."""
        self.wait()
        return self._find(head)

    def update(
        self,
        logits: Tensor | LinearLogits | Mapping[str, Tensor | LinearLogits],
        *,
        group: dist.ProcessGroup | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """center = m * center + (1 - m) * mean of the teacher logits; once an optimizer step.

        Args:
            logits: floating [..., K], or {head: [..., K]} for some or all heads; a mean [K] counts
                as one row. The mean is fp32 (fp64 for fp64), under autocast too. Instead of a
                tensor `LinearLogits`: their mean is prototypes @ mean of the features, so that no
                logits are made and the all-reduce carries D numbers. The prototypes must stay as
                they are until the update is applied.
            group: the processes that share the centre, by default all. They update the same heads,
                each rank's mean weighs the same (as in the official code), and one asynchronous
                all-reduce serves all heads.
            skip: 0-d bool on the device: where it is set, this rank counts as one without rows.

        A rank without rows (an iBOT step can have no masked patch) does not count, and without
        rows on any rank the centre stays.

        Raises:
            ValueError: an unknown head, logits that are not floating, of another K or device;
                features and prototypes that do not fit.
        """
        given = logits if isinstance(logits, Mapping) else {self._only(): logits}
        for name, found in given.items():
            self._check(name, found)
        self.wait()
        heads = [name for name in self._buffers if name in given]  # one order on every rank
        if not heads:
            return
        prototypes, means = [], []
        for name in heads:
            rows, weight = given[name], None
            if isinstance(rows, LinearLogits):
                rows, weight = rows
            prototypes.append(weight)
            means.append(rank_mean(rows).to(self.get_buffer(name).dtype))
        flat = torch.cat(means)
        if skip is not None:
            flat.masked_fill_(skip, 0)  # the number of means too
        work = dist.all_reduce(flat, group=group, async_op=True) if _is_shared(group) else None
        sizes = [len(mean) for mean in means]
        self._pending = _Pending(heads, prototypes, list(flat.split(sizes)), work)

    def wait(self) -> None:
        """Applies the last update now, if that has not happened yet."""
        if self._pending is None:
            return
        heads, prototypes, means, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        for name, weight, mean in zip(heads, prototypes, means, strict=True):
            if weight is not None:
                mean = _mean_logits(mean, weight)
            setattr(self, name, moved_center(self.get_buffer(name), mean, self.momentum))

    def forget(self) -> None:
        """Drops the last update, if it has not been applied yet."""
        self._pending = None

    def _fault(self, name: str) -> str | None:
        """Why no buffer can have this name, or None. The properties are not read: there is no
        head yet."""
        if not isinstance(name, str) or not name or "." in name:
            return "the name must be a string, not empty and without a dot"
        if hasattr(type(self), name) or name in vars(self):
            return "Center has an attribute of that name"
        return None

    def _only(self) -> str:
        first, *more = self._buffers
        if more:
            raise ValueError(f"there are several heads, name them: {', '.join(self._buffers)}")
        return first

    def _find(self, head: str) -> Tensor:
        if head not in self._buffers:
            raise ValueError(f"no head {head!r}; there are {', '.join(self._buffers)}")
        return self.get_buffer(head)

    def _check(self, name: str, logits: Tensor | LinearLogits) -> None:
        center = self._find(name)
        if isinstance(logits, LinearLogits):
            return self._check_linear(name, center, *logits)
        if logits.ndim < 1 or logits.shape[-1] != len(center) or not logits.is_floating_point():
            raise ValueError(
                f"logits of {name!r} must be floating [..., {len(center)}], "
                f"got {logits.dtype} of shape {list(logits.shape)}"
            )
        if logits.device != center.device:
            raise ValueError(f"logits of {name!r} are on {logits.device}, it is on {center.device}")

    def _check_linear(self, name: str, center: Tensor, features: Tensor, weight: Tensor) -> None:
        if features.ndim < 1 or not features.is_floating_point():
            raise ValueError(
                f"features of {name!r} must be floating [..., D], "
                f"got {features.dtype} of shape {list(features.shape)}"
            )
        want = [len(center), features.shape[-1]]
        if list(weight.shape) != want or not weight.is_floating_point():
            raise ValueError(
                f"prototypes of {name!r} must be floating {want} for features "
                f"{list(features.shape)}, got {weight.dtype} of shape {list(weight.shape)}"
            )
        for what, tensor in (("features", features), ("prototypes", weight)):
            if tensor.device != center.device:
                raise ValueError(
                    f"{what} of {name!r} are on {tensor.device}, it is on {center.device}"
                )

    def _save_to_state_dict(self, *args: Any) -> None:
        self.wait()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.wait()  # or the update would be applied to the centre that is loaded
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Center":
        self.wait()

        def not_narrowed(center: Tensor) -> Tensor:
            found = fn(center)
            return found if found.dtype.itemsize >= 4 else center.to(found.device)

        return super()._apply(not_narrowed, recurse)

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles
        self.wait()
        return self.__dict__


@torch.no_grad()
def sinkhorn_center(
    logits: Tensor,
    temperature: float | Tensor,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The centre [K] with which softmax((logits - center) / temperature) is Sinkhorn-Knopp's.

    Sinkhorn-Knopp scales exp(z_nk / temperature) by u_k and v_n in turn, so that each prototype
    and then each sample gets the same mass. It ends with the samples: its result is a softmax over
    k of z_nk / temperature + log u_k, and center = -temperature * log u. DINOv2's
    `sinkhorn_knopp_teacher`, in the log domain: any logits and temperatures, no overflow.

    Args:
        logits: floating [T, B, K], any strides; the T * B rows are the samples of one assignment.
        temperature: > 0; a 0-d tensor when it changes in a compiled step.
        iterations: at least 1.
        group: the processes whose samples are assigned together, by default all. Without a process
            group nothing is reduced; with one, 1 + iterations all-reduces of K numbers.

    Returns:
        [K], fp32 (fp64 for fp64). Up to a constant, which a softmax does not see. It is 0 for a
        prototype that is -inf in every row, and without rows.

    Raises:
        ValueError: logits that are not floating [T, B, K], a temperature <= 0, no iteration.
    """
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating [T, B, K], got {logits.dtype} of shape {list(logits.shape)}"
        )
    check_temperature("temperature", temperature)
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations}")
    rows = logits.flatten(0, 1).to(accumulation_dtype(logits))  # [N, K]
    top = rows.new_full(rows.shape[-1:], -torch.inf) if not len(rows) else rows.amax(dim=0)
    _all_reduce(top, group, maximum=True)
    top.masked_fill_(top == -torch.inf, 0)
    # A shift of a prototype moves its log u alone, so that large logits lose no digits below.
    z = (rows - top) / temperature  # [N, K], the maximum over n is 0
    log_u = torch.zeros_like(top)
    for i in range(iterations):
        # v is 1 at first. Later P_nk = u_k exp(z_nk) v_n is the softmax of log u + z, and dividing
        # u_k by the mass of its prototype is the next step. The mass is at least 1/K: before the
        # samples were normalised it was 1, and none of them, K prototypes, had more than K.
        mass = (z.exp() if i == 0 else F.softmax(z + log_u, dim=-1)).sum(dim=0)  # [K]
        _all_reduce(mass, group)
        log_u -= torch.where(mass == 0, 0, mass.log())
    return top - temperature * log_u


def _all_reduce(x: Tensor, group: dist.ProcessGroup | None, *, maximum: bool = False) -> None:
    if _is_shared(group):
        dist.all_reduce(x, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=group)


def _is_shared(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
