"""Cost tables in files, counted or measured: what gates are trained by and buckets merged by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dynaslim._files import write_atomic
from dynaslim.cost import CostTable, ImageSize, check_keys
from dynaslim.errors import UsageError, check
from dynaslim.spec import NetSpec

FORMAT: Final = "dynaslim-cost-table"
VERSION: Final = 1


def write_cost_table(
    path: str | Path,
    table: CostTable,
    spec: NetSpec,
    image_size: ImageSize,
    *,
    note: Mapping[str, Any] | None = None,
) -> Path:
    """Write a table for a network as JSON, whole or not at all.

    `image_size` in pixels is what it was counted or measured at; `note` is for people (hardware,
    backend, batch size): plain JSON values.

    Raises:
        UsageError: if the table is not one for the network, or the note is not plain JSON.
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
        CostTable.from_dict(table.to_dict(), spec)
        text = json.dumps(content, indent=1, allow_nan=False)
    except (UsageError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: not written, {error}") from None
    return write_atomic(path, text.encode())


def read_cost_table(
    path: str | Path, spec: NetSpec, *, image_size: ImageSize | None = None
) -> CostTable:
    """Read a table that `write_cost_table` wrote for this network (and this image size, if given).

    Raises:
        UsageError: if the file cannot be read, is not a cost table, is for another network, other
            choices of its gates or another image size, or has a cost that cannot be one.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise UsageError(f"{path}: not a cost table, not JSON: {error}") from None
    try:
        return _table_from_file(data, spec, image_size)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _table_from_file(data: Any, spec: NetSpec, image_size: ImageSize | None) -> CostTable:
    ours = isinstance(data, dict) and data.get("format") == FORMAT
    check(ours, f"not a cost table: its format is not {FORMAT!r}")
    version = data.get("version")
    check(version == VERSION, f"cost table version {version}, this dynaslim reads {VERSION}")
    head = {"format", "version", "model", "choices", "image_size_px", "note"}
    check_keys(data, head | {"unit", "segments"})
    check(data["model"] == spec.name, f"is for model {data['model']!r}, not {spec.name!r}")
    choices = [list(gate.choices) for gate in spec.gates]
    check(data["choices"] == choices, f"is for gate choices {data['choices']}, not {choices}")
    size = data["image_size_px"]
    check(
        isinstance(size, list)
        and len(size) == 2
        and all(type(side) is int and side >= 1 for side in size),
        f"image_size_px {size!r}: expected [height, width] in pixels",
    )
    if image_size is not None:
        asked = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
        check(size == asked, f"is for images of {size[0]}x{size[1]} px, not {asked[0]}x{asked[1]}")
    check(isinstance(data["note"], dict), f"note {data['note']!r}: expected an object")
    return CostTable.from_dict({key: data[key] for key in ("unit", "segments")}, spec)
