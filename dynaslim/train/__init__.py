"""Training: stage I (the supernet) and stage II (the gates)."""

from dynaslim.train.calibrate import recalibrate
from dynaslim.train.loop import train_gate, train_supernet
from dynaslim.train.recipe import GateRecipe, SupernetRecipe

__all__ = ["GateRecipe", "SupernetRecipe", "recalibrate", "train_gate", "train_supernet"]
