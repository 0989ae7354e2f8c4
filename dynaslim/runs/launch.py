"""Devices and processes, by Lightning Fabric: alone, or as one of torchrun's processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dynaslim.errors import UsageError
from dynaslim.progress import note
from dynaslim.runtime.cache import usable_cores


def note_if_busy() -> None:
    """Say so if other programs keep the processor busy: threads wait for one another then.

    The number of threads is left as it is: results depend on it.
    """
    if hasattr(os, "getloadavg") and "OMP_NUM_THREADS" not in os.environ:
        line = busy(os.getloadavg()[0], usable_cores(), torch.get_num_threads())
        if line is not None:
            note(line)


def busy(load: float, cores: int, threads: int) -> str | None:
    """What to say of a load of so many running programs; None if that leaves cores enough."""
    if threads == 1 or load < cores / 2:
        return None
    return (
        f"warning: other programs keep this machine busy (load {load:.1f} on {cores} cores), and "
        f"{threads} threads that wait for one another can be several times slower than fewer: stop "
        f"this and start it with OMP_NUM_THREADS={max(1, min(threads, int(cores - load)))}"
    )


@contextmanager
def launched(device: str) -> Iterator[torch.device]:
    """Join the run's other processes, if torchrun started any; the device to work on.

    Raises:
        UsageError: if there is no such device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations at import
        from lightning_fabric import Fabric
        from lightning_fabric.utilities.exceptions import MisconfigurationException

    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    hosts = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    try:
        fabric = Fabric(
            accelerator=device,
            devices=here,
            num_nodes=hosts,
            # only its process group is used: gradients of all passes of a step are averaged once,
            # by the step itself, where a wrapper around the module would do it once per pass
            strategy="ddp" if here * hosts > 1 else "auto",
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise UsageError(f"device {device}: {' '.join(str(error).split())}") from None
    fabric.launch()
    if fabric.device.type == "cpu":
        note_if_busy()
    try:
        yield fabric.device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
