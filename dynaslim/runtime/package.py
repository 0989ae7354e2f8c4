"""An exported network as a folder, which is read with numpy, msgspec and a runtime, without torch.

manifest.json     its description: spec, preprocessing, classes, budget curve, whether mirroring
keeps the class, versions, the SHA-256 of every other file and of the manifest's own content
*.onnx            one per variant; dynamic batch, and dynamic size if the network supports it
weights.bin       the weights of all variants; shared weights are stored once
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, Literal, TypeVar

import msgspec

from dynaslim._files import parse_json, validated, write_atomic
from dynaslim.cascade_spec import CascadeSpec
from dynaslim.errors import DynaslimError, UsageError, check
from dynaslim.graph import AnySpec, GraphSpec
from dynaslim.model_names import MANIFEST
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.budget import BudgetCurve
from dynaslim.runtime.variants import OpenModel, Precision, Variant, segment_variants
from dynaslim.spec import NetSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMAT: Final = "dynaslim-package"
VERSION: Final = 2
"""Version 1, which can still be read, had no hash of the manifest and had some unused values."""
WEIGHTS: Final = "weights.bin"
MOST_BYTES: Final = 1 << 24
"""Largest size of a manifest."""

Spec = TypeVar("Spec", bound=AnySpec)
Name = Annotated[str, msgspec.Meta(max_length=1000)]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Versions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dynaslim: Name
    onnx_opset: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    onnx: Name
    torch: Name


class _Manifest(msgspec.Struct, Generic[Spec], frozen=True, forbid_unknown_fields=True):
    """Content of a manifest."""

    format: Literal["dynaslim-package"]
    version: Literal[1, 2]
    spec: Spec
    precision: Precision
    class_names: tuple[Name, ...] | None
    preprocessing: Preprocessing | None
    budget: dict[str, Any] | None
    metrics: dict[str, Any]
    versions: _Versions
    forms: dict[Name, Name]
    notes: dict[str, Any]
    files: dict[Name, _File]
    mirror: bool

    def check_fits(self) -> None:
        """Raise `UsageError` unless the parts are consistent."""
        spec, names, pre = self.spec, self.class_names, self.preprocessing
        check(
            names is None or len(names) == spec.num_classes,
            f"class_names: must be a list of {spec.num_classes} names, or null",
        )
        check(
            pre is None or pre.channels == spec.in_channels,
            f"preprocessing: is for {pre and pre.channels} channels, {spec.name} takes "
            f"{spec.in_channels}",
        )
        if pre is not None:
            spec.check_image_size(pre.image_size_px, pre.image_size_px)
        if self.budget is not None:
            BudgetCurve.from_dict(self.budget).check_fits(spec, mirror=self.mirror)
        left = dict(self.forms)
        for variant in segment_variants(spec):  # may be very many: stop at the first missing one
            file = left.pop(variant.name, None)
            check(file is not None, f"forms: has no {variant.name!r}")
            check(file == f"{variant.name}.onnx", f"forms: {variant.name} is in {file!r:.60}")
        check(not left, f"forms: {next(iter(left), '')!r:.60} is no variant of {spec.name}")
        needed = {WEIGHTS, *self.forms.values()}
        for name in sorted(needed - set(self.files)):
            raise UsageError(f"{name} is not among its files")
        for name in sorted(set(self.files) - needed):
            raise UsageError(f"{name!r:.60} is not a file of the package")


class PackageError(DynaslimError):
    """A package cannot be read, or does not match its manifest."""


class PackageSource:
    """The `VariantSource` of a package."""

    has_modules = False

    def __init__(
        self, folder: Path, spec: AnySpec, precision: Precision, key: str, files: Mapping[str, Path]
    ) -> None:
        """`files` are the paths of the folder's files by name, with links resolved."""
        self.spec = spec
        self.precision: Precision = precision
        self.key = key
        self._folder = folder
        self._files = files

    def module(self, variant: Variant, dtype: torch.dtype) -> nn.Module:
        """Like `VariantSource.module`, but always raises `UsageError`."""
        raise UsageError(f"{self._folder}: a package has no torch modules")

    def onnx(self, variant: Variant) -> Path | bytes:
        """Like `VariantSource.onnx`; weights from another folder are put into the model.

        Raises:
            UsageError: if the package has no such variant.
            PackageError: if its file, or the weights file, has gone since the package was opened.
        """
        name = f"{variant.name}.onnx"
        if name not in self._files:
            raise UsageError(f"{self._folder}: the package has no {variant.name}")
        path, weights = self._files[name], self._files[WEIGHTS]
        # variants are read when first needed; a runtime's own message would not help the user
        for needed in (name, WEIGHTS):
            _check_there(self._files[needed], self._folder / needed)
        if weights == path.parent / WEIGHTS:
            return path
        # in the hub's cache, each file is a link to one named by its hash; runtimes look for
        # weights only in the folder of the variant
        return with_weights(path.read_bytes(), weights)


@dataclass(frozen=True)
class Package(OpenModel):
    """An opened package."""

    folder: Path
    manifest: Mapping[str, Any]
    """The whole manifest."""


def open_package(path: str | Path) -> Package:
    """Read a package's manifest and check all files against it; links are resolved only once.

    Raises:
        PackageError: if there is no package, it is of a newer version, its manifest is not valid,
            or a file is missing or altered; the message names the file.
    """
    folder = Path(path)
    content = _read_manifest(folder)
    try:
        manifest = parse_json(content)
        found = _checked_manifest(manifest)
        found.check_fits()
    except UsageError as error:
        raise PackageError(f"{folder / MANIFEST}: {error}") from None
    files = {name: _checked_file(folder / name, entry) for name, entry in found.files.items()}
    key = hashlib.sha256(content).hexdigest()
    return Package(
        PackageSource(folder, found.spec, found.precision, key, files),
        found.class_names,
        found.preprocessing,
        found.budget,
        found.mirror,
        folder,
        manifest,
    )


def write_budget(folder: str | Path, budget: Mapping[str, Any]) -> None:
    """Replace the budget curve in a package's manifest, whole or not at all.

    Raises:
        PackageError: as `open_package`.
        OSError: if the manifest cannot be written.
    """
    manifest = {**open_package(folder).manifest, "budget": dict(budget)}
    if manifest["version"] > 1:
        manifest["sha256"] = manifest_digest(manifest)
    write_atomic(Path(folder) / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content without `sha256`, as JSON with sorted keys and no spaces."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST
    if not path.is_file():
        what = "no such folder" if not folder.exists() else f"holds no {MANIFEST}"
        raise PackageError(f"{folder}: {what}; make a package with: dynaslim export CHECKPOINT OUT")
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise PackageError(f"{path}: larger than {MOST_BYTES >> 20} MB, which no manifest is")
    return content


def _checked_manifest(manifest: Any) -> _Manifest[Any]:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UsageError("not the manifest of a dynaslim package")
    version = manifest.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise UsageError(
            f"package version {version!r:.60}, this dynaslim reads versions 1 to {VERSION}; "
            f"install the dynaslim that wrote it or a newer one"
        )
    held = dict(manifest)
    if version == 1:
        for name in ("routes", "input", "parity"):  # redundant, and not used any more
            check(name in held, f"not valid: has no {name!r}")
            del held[name]
        held.setdefault("mirror", False)
    elif held.pop("sha256", None) != manifest_digest(manifest):
        raise UsageError("does not match its SHA-256: altered or damaged")
    kind: Any = _Manifest[NetSpec]
    match held.get("spec"):
        case {"cascade": inner, **others} if not others:
            kind, held["spec"] = _Manifest[CascadeSpec], inner
        case {"graph": inner, **others} if not others:
            kind, held["spec"] = _Manifest[GraphSpec], inner
    found: _Manifest[Any] = validated(held, kind, "not valid", whole=True)
    return found


def _checked_file(path: Path, entry: _File) -> Path:
    """Check a package's file against the manifest; returns its path with links resolved."""
    _check_there(path, path)
    found = path.resolve()
    if found.stat().st_size != entry.bytes or file_digest(found) != entry.sha256:
        raise PackageError(f"{path}: does not match its SHA-256: altered or damaged")
    return found


def _check_there(path: Path, shown: Path) -> None:
    if not path.is_file():
        raise PackageError(f"{shown}: missing; its package is not complete")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- weights in another folder --------------------------------------------------------------------

# field numbers in ONNX's protocol buffers
_GRAPH: Final = 7  # of a model
_INITIALIZER: Final = 5  # of a graph
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14  # of a tensor
_VARINT, _LENGTH = 0, 2  # wire types; the others have a fixed size
_FIXED: Final = {1: 8, 5: 4}


def with_weights(model: bytes, weights: Path) -> bytes:
    """Put the external weights of an ONNX model into it.

    This works on the bytes, because running a package must not require the `onnx` library.
    """
    with open(weights, "rb") as file:

        def tensor(content: memoryview) -> bytes:
            parts, place = [], {}
            for number, whole, held in _fields(content):
                if number == _EXTERNAL_DATA:
                    key, value = (bytes(text).decode() for _, _, text in _fields(held))
                    place[key] = value
                elif number != _DATA_LOCATION:
                    parts.append(bytes(whole))
            if place:
                file.seek(int(place["offset"]))
                parts.append(_field(_RAW_DATA, file.read(int(place["length"]))))
            return b"".join(parts)

        def graph(content: memoryview) -> bytes:
            return _replaced(content, _INITIALIZER, tensor)

        return _replaced(memoryview(model), _GRAPH, graph)


def _replaced(content: memoryview, wanted: int, change: Callable[[memoryview], bytes]) -> bytes:
    """Copy a message, applying `change` to the values of fields with number `wanted`."""
    return b"".join(
        _field(number, change(held)) if number == wanted else bytes(whole)
        for number, whole, held in _fields(content)
    )


def _field(number: int, held: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH) + _varint(len(held)) + held


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """For each field of a message: its number, all its bytes, and the bytes of its value."""
    at = 0
    while at < len(content):
        start = at
        tag, at = _read_varint(content, at)
        kind = tag & 7
        if kind == _LENGTH:
            size, at = _read_varint(content, at)
            begin, at = at, at + size
        elif kind == _VARINT:
            begin, (_, at) = at, _read_varint(content, at)
        else:
            begin, at = at, at + _FIXED[kind]
        yield tag >> 3, content[start:at], content[begin:at]


def _read_varint(content: memoryview, at: int) -> tuple[int, int]:
    """Decode an integer with seven bits per byte; also returns the position after it."""
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    made = bytearray()
    while value >= 0x80:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
