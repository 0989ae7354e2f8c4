"""Images that cannot be read: named, counted and left out, up to a limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from dynaslim.errors import DataError

NAMED: Final = 20
"""The most skipped images to name; the others are only counted."""
LIMIT: Final = 0.01
"""Default share of a set's images that may be left out; a single image always may."""
_IN_MESSAGE: Final = 3


class CorruptImageError(DataError):
    """One image that is missing or does not decode; `where` names it, `reason` is the cause."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


def report_lines(lines: Sequence[str]) -> list[str]:
    """The lines that commands print about skipped images: the first by name, then a count."""
    shown = [f"skipped: {line}" for line in lines[:NAMED]]
    if len(lines) > NAMED:
        shown.append(f"skipped: {len(lines) - NAMED} more")
    return shown


class Skipped:
    """Distinct images of a data set that were left out, in the order in which they were found.

    `images` is the size of the set or, for a stream, the number of images read so far. `limit` is
    the share of them that may be left out; it is checked once `at_least` images have been read.
    """

    def __init__(
        self, name: str, images: int = 0, *, limit: float = 1.0, at_least: int = 0
    ) -> None:
        self.name, self.images, self.limit, self.at_least = name, images, limit, at_least
        self._lines: dict[str, str] = {}

    @property
    def count(self) -> int:
        return len(self._lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """A line `file: reason` for every image left out."""
        return tuple(self._lines.values())

    def add(self, where: str, reason: str) -> None:
        self._lines.setdefault(where, f"{where}: {reason}")

    def state(self) -> list[list[str]]:
        return [[where, line] for where, line in self._lines.items()]

    def load_state(self, state: Iterable[Sequence[str]]) -> None:
        for where, line in state:
            self._lines.setdefault(where, line)

    def check(self, *, complete: bool = False) -> None:
        """Raise `DataError` if more than the limit's share of the images were left out.

        A single image is allowed unless the limit is 0, because it is a large share of a small set.
        With `complete` the whole set has been read, and `at_least` is ignored.
        """
        if self.count <= max(self.limit * self.images, 1 if self.limit else 0):
            return
        if self.images < self.at_least and not complete:
            return
        if not self.limit:
            raise DataError(self.lines[0])
        raise DataError(
            f"{self.name}: {self.count} of {self.images} images ({self.count / self.images:.2%}) "
            f"cannot be read, more than the {self.limit:.2%} of corrupt_limit; "
            f"the first: {'; '.join(self.lines[:_IN_MESSAGE])}"
        )
