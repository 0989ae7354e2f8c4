"""Images that cannot be read: named, counted and left out, up to a limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from dynaslim.errors import DataError

NAMED: Final = 20
"""Skipped images that are named; the others are counted."""
LIMIT: Final = 0.01
"""Share of a set's images that may be left out unless it is said; one image may be."""
_IN_MESSAGE: Final = 3


class CorruptImageError(DataError):
    """One image that is missing or does not decode; `where` names it, `reason` says why."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


def report_lines(lines: Sequence[str]) -> list[str]:
    """What every verb prints of skipped images: the first by name, the others by number."""
    shown = [f"skipped: {line}" for line in lines[:NAMED]]
    if len(lines) > NAMED:
        shown.append(f"skipped: {len(lines) - NAMED} more")
    return shown


class Skipped:
    """Distinct images of a data set that were left out, in the order they were met."""

    def __init__(
        self, name: str, images: int = 0, *, limit: float = 1.0, at_least: int = 0
    ) -> None:
        self.name = name
        """The data set, for messages."""
        self.images = images
        """Images in the set, or seen so far where the set is read as a stream."""
        self.limit = limit
        """Share of the images that may be left out."""
        self.at_least = at_least
        """Images to be seen before their share is held against the limit."""
        self._lines: dict[str, str] = {}

    @classmethod
    def of(cls, name: str, images: int, lines: Iterable[str]) -> Skipped:
        """Those of a set of so many images, all told, that have been left out already."""
        skipped = cls(name, images)
        skipped._lines = {line: line for line in lines}
        return skipped

    @property
    def count(self) -> int:
        """Distinct images left out so far."""
        return len(self._lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """A line `file: reason` for every image left out."""
        return tuple(self._lines.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The first 20 of `lines`."""
        return self.lines[:NAMED]

    def add(self, where: str, reason: str) -> None:
        """Count an image; one that was counted before changes nothing."""
        self._lines.setdefault(where, f"{where}: {reason}")

    def state(self) -> list[list[str]]:
        """What has been counted, for `load_state` of a run that goes on."""
        return [[where, line] for where, line in self._lines.items()]

    def load_state(self, state: Iterable[Sequence[str]]) -> None:
        """Count what another run had counted."""
        for where, line in state:
            self._lines.setdefault(where, line)

    def check(self, *, complete: bool = False) -> None:
        """Raise `DataError` if more than the limit's share of the images were left out.

        One image is never too many, unless the limit is 0: of a small set it is a large share.
        With `complete` the set has been seen, so that `at_least` does not matter any more.
        """
        if self.count <= max(self.limit * self.images, 1 if self.limit else 0):
            return
        if self.images < self.at_least and not complete:
            return
        if not self.limit:
            raise DataError(self.names[0])
        raise DataError(
            f"{self.name}: {self.count} of {self.images} images ({self.count / self.images:.2%}) "
            f"cannot be read, more than the {self.limit:.2%} of corrupt_limit; "
            f"the first: {'; '.join(self.names[:_IN_MESSAGE])}"
        )
