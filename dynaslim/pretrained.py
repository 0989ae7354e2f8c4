"""The three names by which trained networks are shared, as methods of what a user holds.

`Checkpoint` (a network with its class names, preprocessing, metrics, recipe and budget) and
`SlimNet` (the network alone) inherit them from here. Neither is a `ModelHubMixin` itself: a network
would pay for importing the hub's library and carry its bookkeeping through every copy, and writing
a checkpoint is the business of rooms behind `nn`. So these methods only pass on, when called, to
`dynaslim.interop.hub`, where the hub's own mixin does the work: the one place besides the names of
the package itself where an early room reaches a later one.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from dynaslim.errors import CheckpointError
from dynaslim.shipped import names, resolve

if TYPE_CHECKING:
    import torch


WEIGHTS: Final = "model.safetensors"
"""What the hub's own tools call it."""
_OF_RUNS: Final = ("last", "best", "last_live", "checkpoint")
"""Checkpoints of a run of stage I, the one that stands for it first, and the demo's."""
_ADDRESS: Final = re.compile(r"hf:/+(?P<name>[^@]+)(?:@(?P<revision>.+))?")


def _hub() -> Any:
    return import_module("dynaslim.interop.hub")


def is_hub_address(path: str | Path) -> bool:
    """Whether a path is the address of a repository: hf://user/model, or hf://user/model@v1."""
    return _ADDRESS.fullmatch(str(path)) is not None  # one slash, after it was a `Path`


def is_saved_folder(path: str | Path) -> bool:
    """Whether a path is a folder with a checkpoint as `save_pretrained` writes them."""
    return (Path(path) / WEIGHTS).is_file()


def run_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints that stand for the folder of a run: every gate's, or the one of its network.

    The order is that of the gates' targets; empty if it is the folder of no run.
    """
    gates = sorted(Path(folder).glob("gate*.safetensors"))
    others = (Path(folder) / f"{name}.safetensors" for name in _OF_RUNS)
    return gates or [file for file in others if file.is_file()][:1]


def local_path(path: str | Path) -> Path:
    """A path as it is; of a folder of `save_pretrained` or of a run the checkpoint in it.

    Of several gates of a run it is the middle one. For the address of a repository on the hub it is
    its checkpoint, downloaded.

    Raises:
        HubError: if the hub cannot be reached and its cache has not the checkpoint.
    """
    found = _ADDRESS.fullmatch(str(path))
    if found is None:
        if is_saved_folder(path):
            return Path(path) / WEIGHTS
        of_run = run_checkpoints(path)
        return of_run[len(of_run) // 2] if of_run else Path(path)
    downloaded: Path = _hub().download(found["name"], found["revision"])
    return downloaded


def checkpoint_file(name: str | Path) -> Path:
    """The checkpoint that a name stands for: as `local_path`, or that of a model that ships.

    Raises:
        CheckpointError: if there is none.
        HubError: as `local_path`.
    """
    path = local_path(resolve(name))
    if not path.is_file():
        what = "is a folder without a checkpoint" if path.is_dir() else "no such file"
        shipped = f", or the name of a model that ships ({', '.join(names())})" if names() else ""
        raise CheckpointError(
            f"{path}: {what}; expected a checkpoint (.safetensors), the folder of a run{shipped}"
        )
    return path


class Pretrained:
    """What can be saved as a folder of the hub, pushed there, and made of one."""

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        license: str | None = None,
        dataset: str | None = None,
        **about: Any,
    ) -> Path:
        """Write a folder as the hub has them: checkpoint, `config.json` and a model card.

        The checkpoint (`model.safetensors`) is the one that `dynaslim.save` writes; it alone is
        read back. `license` (such as "apache-2.0") and `dataset` (a hub name) go into the card,
        which is left alone if there is a README.md already. `about` are fields of `Checkpoint`,
        such as `class_names`, that are added or replaced: a network alone knows none.

        Returns the folder.

        Raises:
            CheckpointError: if a number is not finite.
            UsageError: for a field that a checkpoint has not, or that does not fit.
            OSError: if the folder cannot be written.
        """
        saved: Path = _hub().save(self, folder, license=license, dataset=dataset, about=about)
        return saved

    def push_to_hub(
        self,
        repo: str,
        *,
        message: str = "Add a dynamic slimmable network",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        license: str | None = None,
        dataset: str | None = None,
        **about: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the hub, made if there is none.

        `repo` is a name such as "user/model". A README.md that the repository has is replaced.

        Returns the commit's address.

        Raises:
            HubError: if the hub cannot be reached or does not allow it.
            CheckpointError, UsageError: as `save_pretrained`; nothing has been sent then.
        """
        address: str = _hub().push(
            self,
            repo,
            about=about,
            license=license,
            dataset=dataset,
            message=message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
        )
        return address

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """Read a folder of `save_pretrained`, or a repository of the hub, in evaluation mode.

        `revision` is a branch, tag or commit; what was downloaded before is taken from the hub's
        cache. `Checkpoint.from_pretrained` gives the network with all that is known of it,
        `SlimNet.from_pretrained` the network alone.

        Raises:
            HubError: if there is no such folder, and no such repository on the hub or in its cache.
            CheckpointError: as `dynaslim.read`.
        """
        found: Self = _hub().load(
            cls,
            name,
            device=device,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return found
