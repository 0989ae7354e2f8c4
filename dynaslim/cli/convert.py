"""Verbs that convert from and to other formats."""

from __future__ import annotations

from pathlib import Path

from dynaslim.cli.output import say


def import_official(file: Path, out: Path, *, ema: bool = False) -> None:
    """Convert a checkpoint of the released DS-Net code, without running anything from it.

    Args:
        file: The released file (.pth.tar).
        out: The checkpoint to write (.safetensors).
        ema: Take the averaged weights.
    """
    from dynaslim._files import check_writable
    from dynaslim.checkpoint import save
    from dynaslim.interop.official import import_official as convert

    check_writable(out)
    checkpoint = convert(file, ema=ema)
    save(out, checkpoint)
    spec = checkpoint.net.spec
    choices = spec.gates[0].choices
    say(f"{out}: {spec.name}, {spec.num_classes} classes, gate choices {choices}")
