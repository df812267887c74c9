"""mokd_fast: two different vision models pre-trained together without labels, fast."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .api import export, knn, linear, load_run, report
    from .train.loop import pretrain

__version__ = "0.1.0"
__all__ = ["UserError", "export", "knn", "linear", "load_run", "pretrain", "report"]

if find_spec(f"{__name__}.kernels") is None:  # which an installation brings in, native code too
    raise ImportError(
        f"{__path__[0]} is the source of mokd_fast, not installed from there: `pip install -e .` "
        "beside it, or start Python in another folder, where an installed mokd_fast is found"
    )

_HOMES = {"pretrain": "train.loop", "report": "report"}
_HOMES |= dict.fromkeys(("export", "knn", "linear", "load_run"), "api")


def __getattr__(name: str) -> Any:
    """The trainer is loaded on first use: `mokd_fast.ops` alone imports torch and nothing else."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mokd_fast' has no attribute {name!r}")
    from importlib import import_module

    home = import_module(f"mokd_fast.{_HOMES[name]}")
    return home if name == "report" else getattr(home, name)  # a package that can be called
