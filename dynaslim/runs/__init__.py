"""Training runs: each has its own folder and can be stopped and resumed."""

from dynaslim.recipes import RunOptions
from dynaslim.runs.context import Stopped
from dynaslim.runs.gate import run_gate
from dynaslim.runs.supernet import run_supernet

__all__ = ["RunOptions", "Stopped", "run_gate", "run_supernet"]
