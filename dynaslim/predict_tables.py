"""Predictions as parquet: one file, or a folder of parts for what comes from a cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from dynaslim._files import check_writable, naming, write_atomic
from dynaslim.errors import UsageError, check
from dynaslim.predict import Prediction, name_of

SUMMARY: Final = "_summary.json"
"""Written last into a folder of parts: it is complete if this is there."""
PART_ROWS: Final = 50_000


class _Buffer:
    """Rows as columns, until there are enough of them to be written."""

    def __init__(self) -> None:
        self.pa, self.parquet = pa, _ = _pyarrow()
        self.schema = pa.schema(
            {
                "file": pa.string(),
                "class": pa.int64(),
                "class_name": pa.string(),
                "confidence": pa.float32(),
                "route": pa.string(),
                "madds": pa.float64(),
                "escalated": pa.bool_(),
                "mirrored": pa.bool_(),
            }
        )
        self._rows: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Prediction) -> None:
        self._rows.append(row.to_dict())

    def take(self) -> Any:
        """The rows as a table; none are left."""
        rows, self._rows = self._rows, []
        return self.pa.Table.from_pylist(rows, schema=self.schema)


class ParquetFile:
    """One parquet file, whole or not at all: rows go to a temporary file beside it as they come.

    A context manager; what has not been committed by its end is removed, and an older file of that
    name is left as it was. Columns: file, class, class_name (null where unknown), confidence
    (0..1, float32), route (such as 12-24-48), madds, escalated, mirrored.
    """

    GROUP_ROWS: Final = 10_000

    def __init__(self, path: str | Path) -> None:
        """Check the name; raises `UsageError` for a folder, or if pyarrow is not installed."""
        self._target = check_writable(path)
        self._buffer = _Buffer()
        self._temporary = self._target.with_name(f".{self._target.name}.{os.getpid()}.tmp")
        self._writer: Any = None

    def __enter__(self) -> ParquetFile:
        """Open it; raises `OSError`, which names it, if that cannot be done."""
        with naming(self._target):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._writer = self._buffer.parquet.ParquetWriter(
                    self._temporary, self._buffer.schema
                )
            except BaseException:  # it has made the file, and `__exit__` is not called
                self._temporary.unlink(missing_ok=True)
                raise
        return self

    def add(self, row: Prediction) -> None:
        """Append a row."""
        self._buffer.add(row)
        if len(self._buffer) >= self.GROUP_ROWS:
            with naming(self._target):
                self._writer.write_table(self._buffer.take())

    def commit(self, summary: Mapping[str, Any]) -> None:
        """Give the file its name; the summary is not for it."""
        with naming(self._target):
            if len(self._buffer):
                self._writer.write_table(self._buffer.take())
            self._writer.close()
            with open(self._temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(self._temporary, self._target)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        with suppress(Exception):  # what is not committed is not wanted, even if the disk is full
            self._writer.close()
        self._temporary.unlink(missing_ok=True)


class ParquetParts:
    """A folder of parquet files `part-00000.parquet` ... and last `_summary.json`.

    Each part is written whole or not at all, with the columns of `ParquetFile`. Readers pass over
    names that begin with `_`. A context manager; a folder that was not committed has no summary.
    """

    def __init__(self, folder: str | Path, *, part_rows: int = PART_ROWS) -> None:
        """Check the folder.

        Raises:
            UsageError: for a file, a folder that is not empty, or if pyarrow is not installed.
        """
        self._folder = Path(folder)
        name = name_of(self._folder)
        if self._folder.exists():
            check(self._folder.is_dir(), f"{name}: is a file; name a folder for the parts")
            check(not any(self._folder.iterdir()), f"{name}: is not empty; name a new folder")
        self._part_rows = part_rows
        self._buffer = _Buffer()
        self._parts = 0

    def __enter__(self) -> ParquetParts:
        """Make the folder; raises `OSError`, which names it, if that cannot be done."""
        with naming(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, row: Prediction) -> None:
        """Append a row."""
        self._buffer.add(row)
        if len(self._buffer) >= self._part_rows:
            self._write()

    def commit(self, summary: Mapping[str, Any]) -> None:
        """Write what is left, and the summary, which makes the folder complete."""
        if len(self._buffer) or not self._parts:
            self._write()
        content = json.dumps({**summary, "parts": self._parts}, indent=2, allow_nan=False)
        write_atomic(self._folder / SUMMARY, content.encode() + b"\n")

    def _write(self) -> None:
        sink = self._buffer.pa.BufferOutputStream()
        self._buffer.parquet.write_table(self._buffer.take(), sink)
        part = self._folder / f"part-{self._parts:05d}.parquet"
        write_atomic(part, sink.getvalue().to_pybytes())
        self._parts += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Parts stay; without the summary they are not complete."""


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError:  # a package runs without it
        raise UsageError("parquet needs pyarrow: pip install pyarrow") from None
    return pyarrow, parquet
