"""One self-contained HTML page that shows what a run did and learned.

The package and the function have one name, so the package itself can be called:
`mokd_fast.report("runs/mine")` is `mokd_fast.api.report`.
"""

import sys
from pathlib import Path
from types import ModuleType


class _Callable(ModuleType):
    def __call__(self, *runs: str | Path, out: str | Path | None = None) -> Path:
        from ..api import report

        return report(*runs, out=out)


sys.modules[__name__].__class__ = _Callable
