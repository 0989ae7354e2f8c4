"""Runs experiments: `python -m results.run headline labels gates --data FOLDER --jobs 2`.

Jobs whose cell exists are skipped, so the same command continues after any interruption. With
`--jobs 2`, two networks are trained side by side on one core each, which is faster than one network
on two cores. `--judge` compares the trained networks on held-out images, or, with `--test`, on the
test split.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from dynaslim.errors import DynaslimError, UsageError
from results.cells import HERE
from results.plan import EXPERIMENTS, Job, jobs_of


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m results.run", description=__doc__)
    parser.add_argument("experiments", nargs="+", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--data", help="folder with cifar10, imagenette; else the hub")
    parser.add_argument("--seeds", default="0,1,2", help="such as 0,1,2")
    parser.add_argument("--only", default="", help="variants, such as supernet,static0")
    parser.add_argument("--rates", default="0.1,0.2,0.4", help="learning rates that rates_... try")
    parser.add_argument("--jobs", type=int, default=1, help="networks trained side by side")
    parser.add_argument("--list", action="store_true", help="print what is done and what is not")
    parser.add_argument("--judge", action="store_true", help="compare what is trained")
    parser.add_argument("--test", action="store_true", help="judge on the test split")
    given = parser.parse_args(argv)
    os.chdir(HERE.parent)  # recipes name spec files from here
    seeds = [int(seed) for seed in given.seeds.split(",")]
    only = [variant for variant in given.only.split(",") if variant]
    try:
        rates = _rates(given.rates)
        if given.judge:
            from results.judging import JUDGED, judge

            for name in given.experiments:
                if name not in JUDGED:
                    raise UsageError(f"experiment {name!r}: choose from {', '.join(JUDGED)}")
                for cell in judge(name, given.data, seeds, given.test):
                    log(f"{cell}: written")
            return 0
        if "imagenette" in given.experiments and not has_gpu():
            log("imagenette: skipped, it needs a GPU (on two cores a seed takes more than a day)")
        jobs = [
            job
            for name in given.experiments
            if name != "imagenette" or has_gpu()
            for job in jobs_of(name, given.data, seeds, only, rates)
        ]
        return _run(jobs, given)
    except DynaslimError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def _rates(text: str) -> list[float]:
    try:
        return [float(rate) for rate in text.split(",") if rate.strip()]
    except ValueError:
        raise UsageError(f"--rates {text!r}: expected numbers such as 0.1,0.2,0.4") from None


def has_gpu() -> bool:
    """Whether torch finds a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def log(line: str) -> None:
    """Print a line with the time of day."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def _run(jobs: list[Job], given: argparse.Namespace) -> int:
    left = [job for job in jobs if not job.cell.is_done(job.settings())]
    for job in jobs if given.list else left:
        log(f"{job.cell}: {'to do' if job in left else 'done'}")
    if given.list:
        return 0
    if given.jobs == 1:
        from results.training import run

        for job in left:
            started = time.monotonic()
            run(job)
            log(f"{job.cell}: done in {(time.monotonic() - started) / 60:.1f} min")
        return 0
    return _side_by_side(left, given)


def _side_by_side(left: list[Job], given: argparse.Namespace) -> int:
    """Run every job in its own process on one core, `given.jobs` at a time."""
    waiting, running, failed = list(left), dict[subprocess.Popen[bytes], Job](), set[str]()
    try:
        while waiting or running:
            for process, job in list(running.items()):
                if process.poll() is not None:
                    del running[process]
                    log(f"{job.cell}: {'done' if process.returncode == 0 else 'FAILED'}")
                    if process.returncode:
                        failed.add(str(job.cell))
            waiting = [job for job in waiting if not (job.needs and str(job.needs.cell) in failed)]
            ready = [job for job in waiting if _is_ready(job, left)]
            if ready and len(running) < given.jobs:
                waiting.remove(ready[0])
                running[_start(ready[0], given)] = ready[0]
                continue
            time.sleep(1)
    finally:
        for process in running:
            process.terminate()  # trainings save a snapshot and stop
            process.wait()
    return 1 if failed else 0


def _is_ready(job: Job, left: list[Job]) -> bool:
    needs = job.needs
    return needs is None or needs not in left or needs.cell.is_done(needs.settings())


def _start(job: Job, given: argparse.Namespace) -> subprocess.Popen[bytes]:
    cell = job.cell
    cell.run.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "results.run", cell.experiment]
    argv += ["--only", cell.variant, "--seeds", str(cell.seed)]
    argv += ["--rates", given.rates]
    argv += [] if given.data is None else ["--data", given.data]
    log(f"{cell}: started")
    with open(cell.run / "log.txt", "ab") as output:
        return subprocess.Popen(
            argv, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


if __name__ == "__main__":
    sys.exit(main())
