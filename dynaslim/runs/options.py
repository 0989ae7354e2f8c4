"""What a run is told about the machine; none of it changes the numbers of a single process."""

from __future__ import annotations

from dataclasses import dataclass

from dynaslim.errors import check


@dataclass(frozen=True)
class RunOptions:
    """How a run goes about its work."""

    resume: bool = False
    """Go on where the run in the folder stopped; starts it if there is none."""
    force: bool = False
    """Resume although the recipe has changed."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `mps`; under torchrun each process takes one."""
    workers: int = 2
    """Processes that decode images, per process of the run; 0 decodes in the run itself."""
    save_every_s: float = 60.0
    """Seconds between snapshots, which are also written after every epoch."""
    log_every: int = 10
    """Steps between lines of the metrics file."""

    def __post_init__(self) -> None:
        check(self.device in ("auto", "cpu", "cuda", "mps"), f"device {self.device!r}: unknown")
        check(self.workers >= 0, f"workers {self.workers}: must not be negative")
        check(self.save_every_s >= 0, f"save_every_s {self.save_every_s}: must not be negative")
        check(self.log_every >= 1, f"log_every {self.log_every}: must be at least 1")
