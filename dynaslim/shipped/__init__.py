"""Trained networks that ship with the package, by name: `cifar10` stands for a checkpoint here.

A name is accepted wherever a checkpoint is (`dynaslim.read`, `Engine.from_checkpoint`, every verb);
a file or an exported package of that name comes first. Each checkpoint has a card beside it
(NAME.md) that says what it was trained on and what it gives. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dynaslim.errors import UsageError

FOLDER: Final = Path(__file__).parent
PICTURES: Final = FOLDER / "pictures"
"""Drawings of the kinds of things that the model that ships tells apart, to try it on."""
DEFAULT: Final = "cifar10"
"""What is used where no model is named."""
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


def is_name(model: str | Path) -> bool:
    """Whether a model is named that ships, whatever else there is of that name."""
    return str(model) in names()


def resolve(model: str | Path) -> Path:
    """Where a checkpoint is: a path as it is; for a name that ships its file, unless one lies here.

    A folder of that name, of images say, is no checkpoint and does not count. What takes packages
    too asks for those first.
    """
    return path(str(model)) if is_name(model) and not Path(model).is_file() else Path(model)
