"""The errors a user can cause: one line each, naming the value and what would be right."""

from typing import Any


class DynaslimError(ValueError):
    """Something given to dynaslim is wrong; the message names it and what would be right.

    The command line prints the message without a traceback and leaves with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message)
        self.details = details
        """The contents of the message, as data."""


class UsageError(DynaslimError):
    """The request itself is wrong: an unknown name, a route that the network does not have."""

    exit_code = 2


class ConversionError(UsageError):
    """A model cannot be converted, because of one operation in it or one of its weights."""

    def __init__(self, module: str, operation: str, reason: str) -> None:
        parts = (module or "the model itself", operation, reason)
        message = ": ".join(part for part in parts if part)
        super().__init__(message, module=module, operation=operation, reason=reason)


class CheckpointError(DynaslimError):
    """A checkpoint cannot be read, or is not of the kind it claims to be."""


class HubError(DynaslimError):
    """The hub cannot be reached, does not have what is requested, or does not allow it."""


class DataError(DynaslimError):
    """Images or labels cannot be read, or do not fit the network."""


class TrainingError(DynaslimError):
    """Training cannot go on: a loss is not finite, or the recipe does not fit the data."""


class DynaslimWarning(UserWarning):
    """Something is wrong that costs no answer; the message names it and what would be right."""


def first_line(error: BaseException) -> str:
    """The message of another library's error in one line; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check(fine: bool, message: str) -> None:
    """Raise `UsageError` with the message unless `fine`."""
    if not fine:
        raise UsageError(message)
