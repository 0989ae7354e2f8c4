"""Pictures of runs, and reports on them.

`make_report` is imported on first use: what draws a curve needs none of the rest.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynaslim.report.html import make_report

__all__ = ["make_report"]


def __getattr__(name: str) -> Any:
    if name != "make_report":
        raise AttributeError(f"module 'dynaslim.report' has no attribute {name!r}")
    from dynaslim.report.html import make_report

    return make_report
