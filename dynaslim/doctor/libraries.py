"""The libraries that dynaslim uses: what each is for, and whether it is there and loads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Final, Literal

Status = Literal["works", "installed", "missing", "broken"]


@dataclass(frozen=True)
class Library:
    """A library, by the name that pip knows it by."""

    name: str
    module: str
    use: str
    required: bool = True


LIBRARIES: Final = (
    Library("torch", "torch", "networks, training"),
    Library("numpy", "numpy", "arrays"),
    Library("msgspec", "msgspec", "validation of files"),
    Library("safetensors", "safetensors", "checkpoints"),
    Library("jsonargparse", "jsonargparse", "the command line"),
    Library("rich", "rich", "tables and progress"),
    Library("pillow", "PIL", "decoding images"),
    Library("datasets", "datasets", "data sets"),
    Library("huggingface_hub", "huggingface_hub", "the hub"),
    Library("kornia", "kornia", "augmentation"),
    Library("lightning-fabric", "lightning_fabric", "devices and processes"),
    Library("tensorboard", "tensorboard", "curves"),
    Library("pyyaml", "yaml", "recipes"),
    Library("filelock", "filelock", "folders of runs"),
    Library("pyarrow", "pyarrow", "parquet"),
    Library("matplotlib", "matplotlib", "pictures"),
    Library("jinja2", "jinja2", "reports"),
    Library("markupsafe", "markupsafe", "reports"),
    Library("shtab", "shtab", "completion in shells"),
    Library("onnx", "onnx", "export, backends onnxruntime and openvino", required=False),
    Library("onnxruntime", "onnxruntime", "backend onnxruntime", required=False),
    Library("openvino", "openvino", "backend openvino", required=False),
    Library("ray", "ray", "predict --engine ray", required=False),
    Library("fastapi", "fastapi", "serve", required=False),
    Library("uvicorn", "uvicorn", "serve", required=False),
    Library("python-multipart", "python_multipart", "serve", required=False),
    Library("prometheus-client", "prometheus_client", "serve", required=False),
)
"""What pyproject.toml names, in its order; a test holds them together."""


def is_installed(module: str) -> bool:
    """Whether a module is there, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # of a damaged installation
        return False


def version_of(name: str) -> str | None:
    """The installed version, as pip would tell it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def pip_line(names: Iterable[str]) -> str:
    """The command that installs some libraries."""
    return "pip install " + " ".join(names)


def describe(library: Library, error: str | None, *, loaded: bool = True) -> dict[str, Any]:
    """A library as JSON values; `error` is why it does not load, if it does not.

    Of one that was not `loaded` no more is known than that it is installed.
    """
    there = is_installed(library.module)
    works: Status = "works" if loaded else "installed"
    status: Status = "missing" if not there else works if error is None else "broken"
    version = version_of(library.name) if there else None
    line = pip_line([library.name])
    if status == "broken":
        # the same version again: the files are damaged, or do not fit this machine
        line = f"{line}{f'=={version}' if version else ''} --force-reinstall"
    return {
        "name": library.name,
        "status": status,
        "version": version,
        "use": library.use,
        "required": library.required,
        "error": error if there else None,
        "install": None if status == works else line,
    }
