"""Predictions as parquet: one file, or a folder of parts for the rows of a cluster."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from dynaslim._files import check_writable, naming, write_atomic
from dynaslim.errors import UsageError, check
from dynaslim.predict import Prediction, name_of

SUMMARY: Final = "_summary.json"
"""Written last into a folder of parts; its presence marks the folder as complete."""
PART_ROWS: Final = 50_000


class _Table:
    """Buffers rows and writes them whenever there are `limit` of them; a context manager."""

    def __init__(self, limit: int) -> None:
        self._pa, self._parquet = pa, _ = _pyarrow()
        self._schema = pa.schema(
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
        self._limit = limit
        self._rows: list[dict[str, Any]] = []

    def add(self, row: Prediction) -> None:
        """Append a row."""
        self._rows.append(row.to_dict())
        if len(self._rows) >= self._limit:
            self._write(self._taken())

    def _taken(self) -> Any:
        """Return the buffered rows as a table and empty the buffer."""
        rows, self._rows = self._rows, []
        return self._pa.Table.from_pylist(rows, schema=self._schema)

    @abstractmethod
    def _write(self, table: Any) -> None: ...

    @abstractmethod
    def commit(self, summary: Mapping[str, Any]) -> None:
        """Write the remaining rows and mark the output as complete."""

    @abstractmethod
    def __enter__(self) -> Self:
        """Create the file or folder; raises an `OSError` that names it if that fails."""

    def __exit__(self, *_: object) -> None:
        """Close the output; without `commit` it stays incomplete."""


class ParquetFile(_Table):
    """One parquet file, written atomically: rows go to a temporary file beside it.

    Without `commit` the temporary file is removed, and an existing file of that name stays
    unchanged. Columns: file, class, class_name (null if unknown), confidence (0..1, float32), route
    (such as 12-24-48), madds, escalated, mirrored.
    """

    GROUP_ROWS: Final = 10_000

    def __init__(self, path: str | Path) -> None:
        """Check the name; raises `UsageError` for a folder, or if pyarrow is not installed."""
        self._target = check_writable(path)
        super().__init__(self.GROUP_ROWS)
        self._temporary = self._target.with_name(f".{self._target.name}.{os.getpid()}.tmp")
        self._writer: Any = None

    def __enter__(self) -> Self:
        with naming(self._target):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._writer = self._parquet.ParquetWriter(self._temporary, self._schema)
            except BaseException:  # the file exists already, and `__exit__` will not be called
                self._temporary.unlink(missing_ok=True)
                raise
        return self

    def _write(self, table: Any) -> None:
        with naming(self._target):
            self._writer.write_table(table)

    def commit(self, summary: Mapping[str, Any]) -> None:
        """Write the remaining rows and give the file its name; the summary is not used."""
        if self._rows:
            self._write(self._taken())
        with naming(self._target):
            self._writer.close()
            with open(self._temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(self._temporary, self._target)

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):  # errors do not matter for a file that is deleted anyway
            self._writer.close()
        self._temporary.unlink(missing_ok=True)


class ParquetParts(_Table):
    """A folder of parquet files `part-00000.parquet` ... and, written last, `_summary.json`.

    Each part is written atomically, with the columns of `ParquetFile`. Parquet readers skip names
    that begin with `_`. Without `commit` the parts stay, but there is no summary.
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
        super().__init__(part_rows)
        self._parts = 0

    def __enter__(self) -> Self:
        with naming(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def _write(self, table: Any) -> None:
        sink = self._pa.BufferOutputStream()
        self._parquet.write_table(table, sink)
        part = self._folder / f"part-{self._parts:05d}.parquet"
        write_atomic(part, sink.getvalue().to_pybytes())
        self._parts += 1

    def commit(self, summary: Mapping[str, Any]) -> None:
        """Write the remaining rows, then the summary, which marks the folder as complete."""
        if self._rows or not self._parts:
            self._write(self._taken())
        content = json.dumps({**summary, "parts": self._parts}, indent=2, allow_nan=False)
        write_atomic(self._folder / SUMMARY, content.encode() + b"\n")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError:  # running an exported package does not require pyarrow
        raise UsageError("parquet needs pyarrow: pip install pyarrow") from None
    return pyarrow, parquet
