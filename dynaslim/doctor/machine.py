"""The machine: processor, cores, memory, GPU, and the folder of compiled programs. No torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from dynaslim.runtime.cache import (
    VARIABLE,
    cache_folder,
    processor_name,
    usable_cores,
    why_not_writable,
)

FEATURES: Final[dict[str, tuple[str, ...]]] = {
    "x86_64": (
        "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
        "amx_tile", "amx_int8", "amx_bf16",
    ),
    "aarch64": ("asimd", "asimddp", "fphp", "bf16", "i8mm", "sve", "sve2"),
}  # fmt: skip
"""Instructions that backends make use of, as Linux calls them."""
CGROUP: Final = Path("/sys/fs/cgroup")


def describe_processor() -> dict[str, Any]:
    """Name, instructions and cores; what the system does not tell is None."""
    known = FEATURES.get({"amd64": "x86_64", "arm64": "aarch64"}.get(_machine(), _machine()), ())
    flags = _flags()
    return {
        "name": processor_name(),
        "machine": _machine(),
        "features": None if flags is None else {name: name in flags for name in known},
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "cgroup_cores": _cgroup_cores(),
    }


def _machine() -> str:
    return platform.machine().lower()


def _flags() -> set[str] | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    told = (line for line in lines if line.lower().startswith(("flags", "features")))
    return set(next(told, "").partition(":")[2].split())


def _cgroup_cores(root: Path = CGROUP) -> float | None:
    """Cores that a container's limit comes to; None without one."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        return (
            quota_us / int((root / "cpu/cpu.cfs_period_us").read_text()) if quota_us > 0 else None
        )
    except (OSError, ValueError, ZeroDivisionError):
        return None


def describe_memory(root: Path = CGROUP) -> dict[str, int | None]:
    """Bytes in all, free for use, and allowed to a container; None where it is not told."""
    told = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            told[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    total = told.get("MemTotal")
    if total is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = None
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limit = int((root / name).read_text())
            break
        except (OSError, ValueError):
            continue
    if limit is not None and total is not None and limit >= total:
        limit = None
    return {
        "total_bytes": total,
        "available_bytes": told.get("MemAvailable"),
        "cgroup_limit_bytes": limit,
    }


def describe_gpu(torch: Mapping[str, Any] | None) -> dict[str, Any]:
    """The GPUs that torch finds, the driver, or why there is none; `torch` is what it said."""
    driver = _nvidia_driver()
    devices = [] if torch is None else torch["devices"]
    why = None
    if torch is None:
        why = "torch does not load"
    elif torch["mps"]:
        devices = [{"name": "Apple GPU (mps)", "memory_bytes": None}]  # torch lists CUDA's alone
    elif not devices and torch["cuda_build"] is None:
        why = "torch is a build for CPUs" + (", though there is a driver" if driver else "")
    elif not devices:
        why = torch["error"] or "torch finds no device"
        if driver is None:
            why = f"no NVIDIA driver (nvidia-smi does not run): {why}"
    return {
        "devices": devices,
        "driver": driver,
        "cuda": None if torch is None else torch["cuda_build"],
        "why_not": why,
    }


def _nvidia_driver() -> str | None:
    """Version of the driver, as its own tool tells it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def describe_cache() -> dict[str, Any]:
    """Where compiled programs are kept, how much there is, and why no more can be written."""
    told: dict[str, Any] = {
        "folder": None,
        "set_by": VARIABLE if os.environ.get(VARIABLE) else None,
        "networks": 0,
        "bytes": 0,
        "free_bytes": None,
    }
    try:
        folder = cache_folder("").parent
    except RuntimeError as error:
        return {**told, "writable": False, "error": str(error)}
    why = why_not_writable(folder)
    with suppress(OSError):  # of folders that may not be looked into
        networks = [entry for entry in folder.iterdir() if entry.is_dir()]
        told["networks"] = len(networks)
        told["bytes"] = sum(f.lstat().st_size for f in folder.rglob("*") if f.is_file())
    with suppress(OSError):
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        told["free_bytes"] = shutil.disk_usage(nearest).free
    return {**told, "folder": str(folder), "writable": why is None, "error": why}


def cxx_compiler() -> str | None:
    """The C++ compiler that torch's own would call."""
    asked = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [asked] if asked else ["g++", "clang++"])), None)
