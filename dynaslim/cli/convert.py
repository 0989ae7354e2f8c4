"""Verbs that convert from and to other formats."""

from __future__ import annotations

from pathlib import Path

from dynaslim.cli.output import print_json, say


def import_official(file: Path, out: Path, *, ema: bool = False, json: bool = False) -> None:
    """Convert a checkpoint of the released DS-Net code, without running anything from it.

    Args:
        file: The released file (.pth.tar).
        out: The checkpoint to write (.safetensors).
        ema: Take the averaged weights.
        json: Print one JSON object.
    """
    from dynaslim._files import check_writable
    from dynaslim.errors import CheckpointError

    check_writable(out)
    if not file.exists():
        raise CheckpointError(f"{file}: no such file")

    from dynaslim.checkpoint import save
    from dynaslim.interop.official import import_official as convert

    checkpoint = convert(file, ema=ema)
    save(out, checkpoint)
    spec = checkpoint.net.spec
    choices = spec.gates[0].choices
    if json:
        told = {"out": str(out), "model": spec.name, "num_classes": spec.num_classes}
        print_json({**told, "choices": list(choices)})
        return
    say(f"{out}: {spec.name}, {spec.num_classes} classes, gate choices {choices}")
