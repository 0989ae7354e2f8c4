"""Networks on the hub: a repository holds a checkpoint, a `config.json` and a model card.

This module adds the methods of `Pretrained` to `Checkpoint` (a network with its class names,
preprocessing, metrics, recipe and budget) and to bare networks (`SlimNet`), whose own modules may
not import this one. `dynaslim` imports it when a name that needs the networks is first used. Code
that imports only `dynaslim.checkpoint` or `dynaslim.nn` must import this module itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, Self

from dynaslim._files import write_atomic
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.errors import HubError, UsageError
from dynaslim.interop.card import card_text, dataset_of, measured
from dynaslim.model_names import WEIGHTS, download, is_saved_folder, plain_hub_errors
from dynaslim.nn.net import ElasticNet
from dynaslim.version import __version__

if TYPE_CHECKING:
    import torch

TAGS: Final = ["dynaslim", "dynamic-slimmable-network", "slimmable", "pytorch"]
TASK: Final = "image-classification"
_NAME: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Pretrained:
    """Methods to save a network in the hub's layout, upload it, and load it."""

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        license: str | None = None,
        dataset: str | None = None,
        **about: Any,
    ) -> Path:
        """Write a folder in the hub's layout: a checkpoint, `config.json` and a model card.

        The checkpoint (`model.safetensors`) is written as by `dynaslim.save`; only this file is
        read back. `license` (such as "apache-2.0") and `dataset` (a hub name) are stated in the
        card (README.md); an existing README.md is not changed. `about` sets or replaces fields of
        the `Checkpoint`, such as `class_names`; a bare network has none of them.

        Returns the folder.

        Raises:
            CheckpointError: if a value is not finite.
            UsageError: for a field that a checkpoint does not have, or a value that does not fit.
            OSError: if the folder cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder}: is a file; name a folder to write")
        _write(folder, _checkpoint(self, about), folder.resolve().name, license, dataset)
        return folder

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
        """Upload what `save_pretrained` writes to a repository on the hub; create it if needed.

        `repo` is a name such as "user/model". A README.md in the repository is replaced.

        Returns the commit's URL.

        Raises:
            HubError: if the hub cannot be reached or refuses the upload.
            CheckpointError, UsageError: as `save_pretrained`, before anything is sent.
        """
        with TemporaryDirectory() as folder:
            # saved first, so that an error leaves no empty repository on the hub
            _write(Path(folder), _checkpoint(self, about), repo, license, dataset)
            with plain_hub_errors(repo):
                from huggingface_hub import HfApi

                api = HfApi(token=token)
                made = api.create_repo(repo, private=private, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=made.repo_id,
                    folder_path=folder,
                    commit_message=message,
                    revision=branch,
                    create_pr=create_pr,
                )
        return str(commit)

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
        """Load a folder of `save_pretrained`, or a repository on the hub, in evaluation mode.

        `revision` is a branch, tag or commit. Files downloaded before are taken from the hub's
        cache. `Checkpoint.from_pretrained` returns the network with its description,
        `SlimNet.from_pretrained` only the network.

        Raises:
            HubError: if there is no such folder, and no such repository on the hub or in the cache.
            CheckpointError: as `dynaslim.read`.
        """
        path = Path(name)
        if path.is_dir() and not is_saved_folder(path):
            raise HubError(f"{name}: holds no {WEIGHTS}, which save_pretrained writes")
        if not path.exists():
            if not _NAME.fullmatch(str(name)):
                raise HubError(f"{name}: no such folder, and no name on the hub such as user/model")
            path = download(
                str(name),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        checkpoint: Any = read(path, device=device)
        found: Self = checkpoint if issubclass(cls, Checkpoint) else checkpoint.net
        return found


for _kind in (Checkpoint, ElasticNet):
    for _name in ("save_pretrained", "push_to_hub", "from_pretrained"):
        setattr(_kind, _name, vars(Pretrained)[_name])


def _checkpoint(model: Any, about: Mapping[str, Any]) -> Checkpoint:
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(model)
    try:
        return replace(checkpoint, **about)
    except TypeError as error:  # no such field
        raise UsageError(f"not a field of a checkpoint: {error}") from None


def _write(
    folder: Path, checkpoint: Checkpoint, repo: str, license: str | None, dataset: str | None
) -> None:
    save(folder / WEIGHTS, checkpoint)
    config = json.dumps(_config(checkpoint), indent=2, allow_nan=False) + "\n"
    write_atomic(folder / "config.json", config.encode())
    if not (folder / "README.md").exists():
        header = _card_data(checkpoint, license, dataset).to_yaml()
        card = f"---\n{header}\n---\n\n{card_text(checkpoint, repo=repo)}"
        write_atomic(folder / "README.md", card.encode())


def _card_data(checkpoint: Checkpoint, license: str | None, dataset: str | None) -> Any:
    """The metadata of a model card, its YAML header."""
    from huggingface_hub.repocard_data import EvalResult, ModelCardData

    name = dataset or dataset_of(checkpoint.recipe) or "unknown"
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=name,
            dataset_name=name,
            dataset_split="validation" if result.split == "held-out" else result.split,
            metric_type=kind,
            metric_name=label,
            metric_value=value,
        )
        for result in measured(checkpoint.metrics)
        for kind, label, value in _metrics(result)
    ]
    return ModelCardData(
        model_name=checkpoint.net.spec.name,
        library_name="dynaslim",
        pipeline_tag=TASK,
        tags=TAGS,
        license=license,
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
    )


def _metrics(result: Any) -> Iterator[tuple[str, str, float]]:
    """Yield type, name and value of each metric, those of the dynamic mode first."""
    if result.dynamic is not None:
        cost, top1 = result.dynamic
        yield "accuracy", "top-1, dynamic", round(top1, 6)
        yield "madds", "multiply-adds per image, dynamic", round(cost)
    for route, cost, top1 in result.routes:
        yield "accuracy", f"top-1, route {route}", round(top1, 6)
        yield "madds", f"multiply-adds, route {route}", round(cost)


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of `config.json`, for other tools; dynaslim does not read it back."""
    spec, pre, names = checkpoint.net.spec, checkpoint.preprocessing, checkpoint.class_names
    return {
        "library_name": "dynaslim",
        "dynaslim_version": __version__,
        "weights": WEIGHTS,
        "architecture": spec.name,
        "num_classes": spec.num_classes,
        "id2label": None if names is None else {str(n): name for n, name in enumerate(names)},
        "preprocessing": None if pre is None else pre.to_dict(),
        "spec": spec.to_dict(),
    }
