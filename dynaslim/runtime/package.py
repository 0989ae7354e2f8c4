"""An exported network as a folder: what reads it needs numpy and a runtime, no torch.

manifest.json     what it is: spec, routing space, preprocessing, classes, sizes, budget curve,
whether mirror images are of the same class, versions, and the SHA-256 of every other file
*.onnx            one for every form of every segment; batch, height and width are dynamic
weights.bin       the weights of all of them; what forms have in common is there once
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynaslim.errors import DynaslimError, UsageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.budget import BudgetCurve
from dynaslim.runtime.forms import Form, Precision, check_precision, segment_forms
from dynaslim.spec import NetSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMAT: Final = "dynaslim-package"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
WEIGHTS: Final = "weights.bin"


class PackageError(DynaslimError):
    """A package cannot be read, or is not what it says it is."""


class PackageForms:
    """A package's forms."""

    has_modules = False

    def __init__(
        self, folder: Path, spec: NetSpec, precision: Precision, key: str, files: Mapping[str, str]
    ) -> None:
        self.spec = spec
        self.precision: Precision = precision
        self.key = key
        self._folder = folder
        self._files = files

    def module(self, form: Form, dtype: torch.dtype) -> nn.Module:
        """As `FormSource.module`: there is none."""
        raise UsageError(f"{self._folder}: a package has no torch modules")

    def onnx(self, form: Form) -> Path:
        """As `FormSource.onnx`.

        Raises:
            UsageError: if the package has no such form.
            PackageError: if its file, or that of the weights, has gone since it was opened.
        """
        if form.name not in self._files:
            raise UsageError(f"{self._folder}: the package has no {form.name}")
        path = self._folder / self._files[form.name]
        # forms are read when they are first needed; a runtime's own words would not help
        for needed in (path, self._folder / WEIGHTS):
            _check_there(needed)
        return path


@dataclass(frozen=True)
class Package:
    """What a package holds."""

    folder: Path
    forms: PackageForms
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    budget: Mapping[str, Any] | None
    mirror: bool
    """Whether images may be shown to it as their mirror images, too."""
    manifest: Mapping[str, Any]
    """All that its manifest says."""

    @property
    def spec(self) -> NetSpec:
        """The network's."""
        return self.forms.spec


def is_package(path: str | Path) -> bool:
    """Whether there is a folder with a manifest of ours, valid or not."""
    return (Path(path) / MANIFEST).is_file()


def open_package(path: str | Path) -> Package:
    """Read a package's manifest and check all its files against it.

    Raises:
        PackageError: if there is no package, it is of a newer version, its manifest is not valid,
            or a file is missing or altered; the message names the file.
    """
    folder = Path(path)
    manifest, digest = _read_manifest(folder)
    try:
        spec = NetSpec.from_dict(manifest["spec"])
        precision = check_precision(manifest["precision"])
        files, forms = dict(manifest["files"]), dict(manifest["forms"])
        names, pre = manifest["class_names"], manifest["preprocessing"]
        if names is not None and (not isinstance(names, list) or len(names) != spec.num_classes):
            raise UsageError(f"class_names: must be a list of {spec.num_classes} names, or null")
        mirror = manifest.get("mirror", False)  # packages of earlier versions do not say
        if not isinstance(mirror, bool):
            raise UsageError(f"mirror {mirror!r:.60}: must be true or false")
        if manifest["budget"] is not None:
            BudgetCurve.from_dict(manifest["budget"]).check_fits(spec, mirror=mirror)
        for form in segment_forms(spec):
            if forms[form.name] not in files:
                raise UsageError(f"{forms[form.name]} is not among its files")
        if WEIGHTS not in files:
            raise UsageError(f"{WEIGHTS} is not among its files")
        for name in files:
            if Path(name).name != name:
                raise UsageError(f"{name!r} is not a file of the folder")
        package = Package(
            folder,
            PackageForms(folder, spec, precision, digest, forms),
            None if names is None else tuple(map(str, names)),
            None if pre is None else Preprocessing.from_dict(pre),
            manifest["budget"],
            mirror,
            manifest,
        )
        listed = {
            name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()
        }
    except KeyError as error:
        raise PackageError(f"{folder / MANIFEST}: has no {error}") from None
    except (UsageError, TypeError, ValueError, AttributeError) as error:
        raise PackageError(f"{folder / MANIFEST}: not valid: {error}") from None
    for name, (size, expected) in listed.items():
        _check_file(folder / name, size, expected)
    return package


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    path = folder / MANIFEST
    if not path.is_file():
        what = "no such folder" if not folder.exists() else f"holds no {MANIFEST}"
        raise PackageError(f"{folder}: {what}; make a package with: dynaslim export CHECKPOINT OUT")
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise PackageError(f"{path}: not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PackageError(f"{path}: not the manifest of a dynaslim package")
    version = manifest.get("version")
    if version != VERSION:
        raise PackageError(
            f"{path}: package version {version}, this dynaslim reads version {VERSION}; "
            f"install the dynaslim that wrote it or a newer one"
        )
    return manifest, hashlib.sha256(content).hexdigest()


def _check_file(path: Path, size: int, expected: str) -> None:
    _check_there(path)
    if path.stat().st_size != size or file_digest(path) != expected:
        raise PackageError(f"{path}: does not match its SHA-256: altered or damaged")


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise PackageError(f"{path}: missing; its package is not complete")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
