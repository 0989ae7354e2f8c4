"""Libraries that only some backends need: imported where used; errors name how to install one."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dynaslim.errors import UsageError


def installed(library: str) -> bool:
    """Whether a library can be found, without importing it."""
    try:
        return find_spec(library) is not None
    except (ImportError, ValueError):  # of a damaged installation
        return False


def require(module: str) -> Any:
    """Import a module of an optional library.

    Raises:
        UsageError: if it is not installed; the message is the line that installs it.
    """
    library = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        # not the extra of dynaslim, which would bring torch where a package runs without it
        raise UsageError(
            f"{library} is not installed or does not load ({error}): pip install {library}"
        ) from None
