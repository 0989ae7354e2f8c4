"""Sliceable layers, gates and the network."""

from dynaslim.nn.functional import argmax_one_hot, gumbel_one_hot
from dynaslim.nn.net import GatedOutput, SlimNet

__all__ = ["GatedOutput", "SlimNet", "argmax_one_hot", "gumbel_one_hot"]
