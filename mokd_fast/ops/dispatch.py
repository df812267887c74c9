"""Which backend runs an operator, and a sentence why another does not.

An operator registers its backends here, each with a `why_not` that looks at device, dtype, shape
and stride only, never at values: reading a value would synchronise the device and break a graph.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# "fused" and "fused-linear" are ways of `prototype_loss`, "sdpa" and "xformers" of the search.
PRIORITY = ("cuda", "triton", "cpu", "sdpa", "xformers", "fused", "fused-linear", "reference")
ENVIRONMENT = "MOKD_FAST_BACKEND"


@dataclass(frozen=True)
class Backend:
    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]  # None: it can run. Otherwise a sentence for the user.
    avoid: Callable[..., str | None]  # why the automatic choice passes over one that can run


_BACKENDS: dict[str, list[Backend]] = {}


def constant(function: Any) -> Any:
    """torch.compiler.assume_constant_result, which would import Dynamo and Triton at start-up."""
    function._dynamo_marked_constant = True
    return function


def _no_reason(*args: Any, **options: Any) -> None:
    return None


def register(
    op: str,
    name: str,
    run: Callable[..., Any],
    why_not: Callable[..., str | None] = _no_reason,
    avoid: Callable[..., str | None] = _no_reason,
) -> None:
    """Adds a backend called `name` (one of PRIORITY) to the operator `op`."""
    if name not in PRIORITY:
        raise ValueError(f"backend {name!r} of {op}: the names are {', '.join(PRIORITY)}")
    backends = _BACKENDS.setdefault(op, [])
    backends.append(Backend(name, run, why_not, avoid))
    backends.sort(key=lambda backend: PRIORITY.index(backend.name))


def pick(op: str, *args: Any, backend: str | None = None) -> Backend:
    """The backend that runs `op` on these arguments.

    `backend`, or else the environment variable MOKD_FAST_BACKEND, forces one; a forced backend
    that cannot run raises RuntimeError with the reason, an unknown one ValueError. The environment
    speaks for all operators, so it leaves alone those that have no such backend. The automatic
    choice takes the first of PRIORITY that can.
    """
    forced = backend or os.environ.get(ENVIRONMENT)
    wish = f"{'backend' if backend else ENVIRONMENT}={forced}"
    if not backend and forced in PRIORITY and forced not in (b.name for b in _backends(op)):
        forced = None
    if not forced:
        for candidate in _backends(op):
            if candidate.why_not(*args) is None and candidate.avoid(*args) is None:
                return candidate
        raise RuntimeError(f"no backend can run {op}:\n{explain(op, *args)}")
    for candidate in _backends(op):
        if candidate.name == forced:
            reason = candidate.why_not(*args)
            if reason is not None:
                raise RuntimeError(f"{op}: {wish} was asked for but {reason}")
            return candidate
    names = ", ".join(candidate.name for candidate in _backends(op))
    raise ValueError(f"{op}: {wish} was asked for, no backend {forced!r}; it has {names}")


def explain(op: str, *args: Any, **options: Any) -> str:
    """One line a backend of `op`: which one the automatic choice takes, and why not the others.

    The arguments are the operator's own, by position or by keyword, without `backend`:
    explain("distill_cross_entropy", student, targets, temperature=0.1).
    """
    lines, chosen = [], False
    for candidate in _backends(op):
        reason = candidate.why_not(*args, **options)
        if reason is None and (passed := candidate.avoid(*args, **options)):
            reason = f"can run, {passed}"
        elif reason is None:
            reason = "can run too" if chosen else "chosen"
            chosen = True
        lines.append(f"{candidate.name}: {reason}")
    if forced := os.environ.get(ENVIRONMENT):
        if forced in (candidate.name for candidate in _backends(op)):
            effect = "this one runs or raises"
        elif forced in PRIORITY:
            effect = f"which {op} does not have, so the choice is automatic"
        else:
            effect = "which is no backend, so every call raises"
        lines.append(f"{ENVIRONMENT}={forced} is set, {effect}")
    return "\n".join(lines)


def _backends(op: str) -> list[Backend]:
    if op not in _BACKENDS:
        raise ValueError(f"no operator {op!r}; there are {', '.join(sorted(_BACKENDS))}")
    return _BACKENDS[op]
