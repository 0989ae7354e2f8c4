"""Devices and processes, by Lightning Fabric: alone, or as one of torchrun's processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dynaslim.errors import UsageError


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
    try:
        yield fabric.device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
