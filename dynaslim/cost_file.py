"""JSON files of cost tables, counted or measured, for training gates and merging buckets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dynaslim._files import validated, write_atomic
from dynaslim.cost import CostTable, ImageSize, Unit
from dynaslim.errors import UsageError, check
from dynaslim.graph import AnySpec

FORMAT: Final = "dynaslim-cost-table"
VERSION: Final = 1


@dataclass(frozen=True)
class _CostFile:
    format: str
    version: int
    model: str
    choices: tuple[tuple[int, ...], ...]
    image_size_px: tuple[int, int]
    """Height and width of the images."""
    note: dict[str, Any]
    unit: Unit
    segments: tuple[tuple[tuple[float, ...], ...], ...]


def write_cost_table(
    path: str | Path,
    table: CostTable,
    spec: AnySpec,
    image_size: ImageSize,
    *,
    note: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network's cost table as JSON, atomically.

    `image_size` is in pixels. `note` has plain JSON values as information for people (hardware,
    backend, batch size).

    Raises:
        UsageError: if the table does not fit the network, the image size is not possible, or the
            note is not plain JSON.
        OSError: if the file cannot be written.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    spec.check_image_size(*size)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": spec.name,
        "choices": [list(gate.choices) for gate in spec.gates],
        "image_size_px": list(size),
        "note": dict(note or {}),
        **table.to_dict(),
    }
    try:
        table.check_fits(spec)
        text = json.dumps(content, indent=1, allow_nan=False)
    except (UsageError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: not written, {error}") from None
    return write_atomic(path, text.encode())


def read_cost_table(
    path: str | Path, spec: AnySpec, *, image_size: ImageSize | None = None
) -> CostTable:
    """Read a table that `write_cost_table` wrote for this network (and this image size, if given).

    Raises:
        UsageError: if the file cannot be read, is not a cost table, is for another network, other
            gate choices or another image size, or has a cost that is negative or not finite.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise UsageError(f"{path}: not a cost table, not JSON: {error}") from None
    ours = isinstance(data, dict) and data.get("format") == FORMAT
    check(ours, f"{path}: not a cost table: its format is not {FORMAT!r}")
    version = data.get("version")
    check(
        version == VERSION, f"{path}: cost table version {version}, this dynaslim reads {VERSION}"
    )
    file = validated(data, _CostFile, str(path), whole=True)
    check(file.model == spec.name, f"{path}: is for model {file.model!r}, not {spec.name!r}")
    choices = tuple(gate.choices for gate in spec.gates)
    check(file.choices == choices, f"{path}: is for gate choices {file.choices}, not {choices}")
    height, width = file.image_size_px
    check(
        min(height, width) >= 1,
        f"{path}: image_size_px {file.image_size_px}: expected [height, width] in pixels",
    )
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        check(
            file.image_size_px == size,
            f"{path}: is for images of {height}x{width} px, not {size[0]}x{size[1]}",
        )
    table = CostTable(file.unit, file.segments)
    try:
        table.check_fits(spec)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return table
