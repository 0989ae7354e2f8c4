"""Repeats the ablation of training targets: `python -m results.quick` (`make results-quick`).

It trains with every target on the images that ship with the package, with one seed, in ten minutes,
and compares with the committed numbers. The exit code is 1 if a number is outside their spread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynaslim.checkpoint import read
from dynaslim.errors import DynaslimError, UsageError
from dynaslim.recipes import SupernetRecipe
from dynaslim.runs import RunOptions, run_supernet
from results.answers import answer, images_of
from results.cells import HERE
from results.plan import jobs_of
from results.run import log
from results.summaries import targets, within

FOLDER = HERE.parent / "runs" / "results-quick"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m results.quick", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    os.chdir(HERE.parent)
    try:
        committed = targets()
        if not committed:
            raise UsageError("no numbers to compare with: python -m results.run quick")
        repeated = repeat(given.seed, FOLDER)
    except DynaslimError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    lines = compare(repeated, committed["mean"])
    for line, _ in lines:
        log(line)
    return 0 if all(fine for _, fine in lines) else 1


def repeat(seed: int, folder: Path) -> dict[str, float]:
    """Top-1 on the test images, mean over the routes, by training target."""
    found = {}
    for job in jobs_of("quick", None, [seed]):
        assert isinstance(job.recipe, SupernetRecipe)
        run = folder / f"{job.cell.variant}_s{seed}"
        run_supernet(job.recipe, run, RunOptions(resume=True))
        network = read(run / "last.safetensors")
        assert network.preprocessing is not None
        images = images_of(job.recipe.data.path, "test", network.preprocessing)
        found[job.cell.variant] = statistics.fmean(answer(network, images).top1_R)
    return found


def compare(
    repeated: Mapping[str, float], committed: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, bool]]:
    """For each variant a line of text, and whether its number is within the spread."""
    lines = []
    for variant, value in repeated.items():
        before = committed[variant]
        fine = within(value, before)
        numbers = f"{before['mean']:.2%} ± {100 * before['sd']:.2f} (n = {before['n']})"
        verdict = "within the spread" if fine else "OUTSIDE the spread"
        lines.append((f"{variant:<13}{value:.2%}, committed {numbers}: {verdict}", fine))
    return lines


if __name__ == "__main__":
    sys.exit(main())
