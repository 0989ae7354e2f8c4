"""The verb that reports what is installed and works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dynaslim.cli.output import new_table, print_json, say


def doctor(*, quick: bool = False, timeout: float = 120.0, json: bool = False) -> int:
    """Check the installation: libraries, backends by a small run of each, and the machine.

    Exit code 1 means that something does not work though it is installed, or that a library is
    missing that dynaslim cannot do without.

    Args:
        quick: Leave out the backend that compiles for half a minute (inductor), and look libraries
            up without loading them.
        timeout: Seconds that a backend's run may take.
        json: Print one JSON object.
    """
    from dynaslim.doctor import examine
    from dynaslim.errors import check

    check(timeout > 0, f"--timeout {timeout:g}: must be above 0")
    found = examine(quick=quick, timeout_s=timeout)
    if json:
        print_json(found)
    else:
        _print(found, "what was tried works" if quick else "all that is installed works")
    return 0 if found["ok"] else 1


def _print(found: dict[str, Any], verdict: str) -> None:
    say(f"dynaslim {found['dynaslim']}, Python {found['python']}, {found['system']}")
    table = new_table("library", "version", "", "extra")
    table.columns[2].justify = table.columns[3].justify = "left"
    for one in found["libraries"]:
        table.add_row(one["name"], one["version"] or "", one["status"], ", ".join(one["extras"]))
    say(table)
    table = new_table("backend", "", "precisions", "ready in", "then")
    table.add_column("why not", overflow="fold")
    table.columns[1].justify = table.columns[2].justify = "left"
    for one in found["backends"]:
        table.add_row(
            one["name"],
            one["status"],
            " ".join(one["precisions"]),
            "" if one["ready_s"] is None else f"{one['ready_s']:.1f} s",
            "" if one["ms"] is None else f"{one['ms']:.1f} ms",
            ": ".join(part for part in (one["why"], one["install"]) if part),
        )
    say(table)
    for label, line in _machine_lines(found):
        say(f"{label:<11}{line}")
    say(f"{'more':<11}python -m torch.utils.collect_env\n")
    for line in found["hints"]:
        say(f"could be better: {line}")
    for line in found["problems"]:
        say(f"problem: {line}")
    if found["ok"]:
        say(verdict)


def _machine_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    cpu, threads, gpu, cache = (found[key] for key in ("processor", "threads", "gpu", "cache"))
    yield "processor", cpu["name"]
    limit = "" if cpu["cgroup_cores"] is None else f", a limit allows {cpu['cgroup_cores']:g}"
    yield (
        "cores",
        f"{cpu['usable_cores']} usable of {cpu['cores']}{limit}; torch uses "
        f"{threads['torch'] or 'no'} threads, OMP_NUM_THREADS is "
        f"{threads['OMP_NUM_THREADS'] or 'not set'}",
    )
    line = f"none: {gpu['why_not']}"
    if gpu["devices"]:
        sizes = [(one["name"], one["memory_bytes"]) for one in gpu["devices"]]
        names = [f"{name} ({size / 2**30:.1f} GiB)" if size else name for name, size in sizes]
        line = ", ".join(names)
        line += f"; driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda'] or 'none'}"
    yield "GPU", line
    state = "writable" if cache["writable"] else f"not writable: {cache['error']}"
    by = f", by {cache['set_by']}" if cache["set_by"] else ""
    size = f"{cache['networks']} networks, {cache['bytes'] / 1e6:.1f} MB"
    yield "cache", f"{cache['folder'] or 'nowhere'}{by}: {size}, {state}"
