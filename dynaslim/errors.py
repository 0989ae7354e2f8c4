"""Errors that a user can cause. A message is one line: the wrong value and what is expected."""

from typing import Any


class DynaslimError(ValueError):
    """An input to dynaslim is wrong; the message names it and what is expected.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message)
        self.details = details
        """The parts of the message as data."""


class UsageError(DynaslimError):
    """The request is wrong, for example an unknown name or a route that the network lacks."""

    exit_code = 2


class ConversionError(UsageError):
    """A model cannot be converted because of one of its operations or weights."""

    def __init__(self, module: str, operation: str, reason: str) -> None:
        parts = (module or "the model itself", operation, reason)
        message = ": ".join(part for part in parts if part)
        super().__init__(message, module=module, operation=operation, reason=reason)


class CheckpointError(DynaslimError):
    """A checkpoint cannot be read or written, or its content is not valid."""


class HubError(DynaslimError):
    """The hub cannot be reached, lacks what is requested, or refuses access."""


class DataError(DynaslimError):
    """Images or labels cannot be read, or do not fit the network."""


class TrainingError(DynaslimError):
    """Training cannot continue: a loss is not finite, or the recipe does not fit the data."""


class DynaslimWarning(UserWarning):
    """Something is wrong, but results are still produced; the message names it and a remedy."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check(fine: bool, message: str) -> None:
    """Raise `UsageError` with the message unless `fine`."""
    if not fine:
        raise UsageError(message)
