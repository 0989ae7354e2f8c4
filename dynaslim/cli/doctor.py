"""The verb that says what works here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    from dynaslim.doctor import examine, steps
    from dynaslim.errors import check
    from dynaslim.progress import progress

    check(timeout > 0, f"--timeout {timeout:g}: must be above 0")
    with progress("examining", len(steps(quick=quick))) as bar:
        found = examine(
            quick=quick, timeout_s=timeout, on_done=lambda label: bar.advance(note=label)
        )
    if json:
        print_json(found)
    else:
        _say(found)
    return 0 if found["ok"] else 1


def _say(found: Mapping[str, Any]) -> None:
    say(f"dynaslim {found['dynaslim']}, Python {found['python']}, {found['system']}")
    say(_libraries_table(found["libraries"]))
    say(_backends_table(found["backends"]))
    for label, told in _machine_lines(found):
        say(f"{label:<11}{told}")
    say("")
    for line in found["hints"]:
        say(f"could be better: {line}")
    for line in found["problems"]:
        say(f"problem: {line}")
    if found["ok"]:
        quick = any(one["status"] == "installed" for one in found["libraries"])
        say("what was tried works" if quick else "all that is installed works")


def _libraries_table(libraries: list[dict[str, Any]]) -> Any:
    table = new_table("library", "version", "", "for")
    table.columns[2].justify = table.columns[3].justify = "left"
    for one in libraries:
        use = one["use"] if one["required"] else f"{one['use']} (optional)"
        table.add_row(one["name"], one["version"] or "", one["status"], use)
    return table


def _backends_table(backends: list[dict[str, Any]]) -> Any:
    table = new_table("backend", "", "precisions", "ready in", "then")
    table.add_column("why not", overflow="fold")
    table.columns[1].justify = table.columns[2].justify = "left"
    for one in backends:
        told = [part for part in (one["why"], one["install"]) if part]
        table.add_row(
            one["name"],
            one["status"],
            " ".join(one["precisions"]),
            "" if one["ready_s"] is None else f"{one['ready_s']:.1f} s",
            "" if one["ms"] is None else f"{one['ms']:.1f} ms",
            ": ".join(told),
        )
    return table


def _machine_lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    cpu, memory, gpu, cache = (found[name] for name in ("processor", "memory", "gpu", "cache"))
    yield "processor", cpu["name"]
    features = cpu["features"]
    if features:
        have = [name for name, there in features.items() if there]
        lack = [name for name, there in features.items() if not there]
        yield "", f"{' '.join(have) or 'none'}; without {' '.join(lack) or 'none'}"
    limit = cpu["cgroup_cores"]
    limited = "" if limit is None else f", a limit allows {limit:g}"
    threads = found["threads"]
    omp = threads["OMP_NUM_THREADS"]
    yield (
        "cores",
        f"{cpu['usable_cores']} usable of {cpu['cores']}{limited}; torch takes "
        f"{threads['torch'] or 'no'} threads, OMP_NUM_THREADS is {omp or 'not set'}",
    )
    total, free, most = memory.values()
    told = [f"{_gb(total)} in all" if total else "", f"{_gb(free)} available" if free else ""]
    told.append(f"a limit allows {_gb(most)}" if most else "")
    yield "memory", ", ".join(filter(None, told)) or "not told by the system"
    if gpu["devices"]:
        names = ", ".join(
            one["name"] + (f" ({_gb(one['memory_bytes'])})" if one["memory_bytes"] else "")
            for one in gpu["devices"]
        )
        yield "GPU", f"{names}; driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda'] or 'none'}"
    else:
        yield "GPU", f"none: {gpu['why_not']}"
    state = "writable" if cache["writable"] else f"not writable: {cache['error']}"
    by = f", by {cache['set_by']}" if cache["set_by"] else ""
    yield (
        "cache",
        f"{cache['folder'] or 'nowhere'}{by}: {cache['networks']} networks, "
        f"{cache['bytes'] / 1e6:.1f} MB, "
        f"{state}",
    )


def _gb(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
