"""Rows through programs that take just so many of them, more than there are."""

from __future__ import annotations

from collections.abc import Sequence

from dynaslim.runtime.arrays import Array
from dynaslim.runtime.backends import Program
from dynaslim.runtime.forms import Form
from dynaslim.runtime.workers import Workspace


def run_padded(
    program: Program,
    x: Array,
    outs: Sequence[Array],
    rows: int,
    workspace: Workspace,
    form: Form,
) -> None:
    """Run a form's program, which takes `rows` rows, on fewer: those of x, into those of `outs`.

    Behind x stand zeros; what the program makes of them is ignored. Until this returns, nobody else
    may use the workspace.
    """
    # the last are logits: float32 whatever the precision
    floats = [False, True] if len(outs) > 1 else [True]
    full = workspace.rows(("pad", form.segment), rows, tuple(x.shape[1:]))
    full[: len(x)] = x
    full[len(x) :] = 0
    room = [
        workspace.rows(("padded", form, n), rows, tuple(out.shape[1:]), floats=kind)
        for n, (out, kind) in enumerate(zip(outs, floats, strict=True))
    ]
    program(full, room)
    for out, made in zip(outs, room, strict=True):
        out[:] = made[: len(x)]
