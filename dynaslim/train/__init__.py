"""Training: stage I (the supernet) and stage II (the gates)."""

from dynaslim.train.calibrate import recalibrate
from dynaslim.train.fit import fit_gate_to_images
from dynaslim.train.loop import GateTraining, SupernetTraining, train_gate, train_supernet

__all__ = [
    "GateTraining",
    "SupernetTraining",
    "fit_gate_to_images",
    "recalibrate",
    "train_gate",
    "train_supernet",
]
