"""dynaslim: dynamic slimmable networks, sliced for real.

One trained network that runs only as much of itself as each image needs.

    net = dynaslim.load("checkpoint.safetensors")   # or dynaslim.create_model("ds_mbnet")
    logits = net(x, net.spec.smallest)              # one route for the whole batch
    engine = dynaslim.Engine(net)
    logits, routes, madds = engine(x)               # every image along its own route

Names are imported on first use, so `import dynaslim` does not import torch.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynaslim.version import __version__ as __version__

if TYPE_CHECKING:
    from dynaslim.adaptation import adapt
    from dynaslim.checkpoint import Checkpoint, create_model, load, read, save
    from dynaslim.conversion import convert
    from dynaslim.cost import CostTable, madds, params
    from dynaslim.data import load_images, open_source
    from dynaslim.evaluation import Evaluation, evaluate
    from dynaslim.interop.official import from_official
    from dynaslim.nn import GatedOutput, SlimNet
    from dynaslim.preprocessing import Preprocessing
    from dynaslim.recipes import GateRecipe, SupernetRecipe, load_recipe
    from dynaslim.runs import run_gate, run_supernet
    from dynaslim.runtime.cascade import Rung, cascade
    from dynaslim.runtime.engine import Engine
    from dynaslim.runtime.extract import extract, extract_segment
    from dynaslim.runtime.options import EngineOptions, RoutedOutput
    from dynaslim.spec import GateSpec, NetSpec, Route, StageSpec
    from dynaslim.zoo import ZOO, get_spec


_NAMES = {
    "dynaslim.adaptation": ("adapt",),
    "dynaslim.checkpoint": ("Checkpoint", "create_model", "load", "read", "save"),
    "dynaslim.conversion": ("convert",),
    "dynaslim.cost": ("CostTable", "madds", "params"),
    "dynaslim.data": ("load_images", "open_source"),
    "dynaslim.evaluation": ("Evaluation", "evaluate"),
    "dynaslim.interop.official": ("from_official",),
    "dynaslim.nn": ("GatedOutput", "SlimNet"),
    "dynaslim.preprocessing": ("Preprocessing",),
    "dynaslim.recipes": ("GateRecipe", "SupernetRecipe", "load_recipe"),
    "dynaslim.runs": ("run_gate", "run_supernet"),
    "dynaslim.runtime.cascade": ("Rung", "cascade"),
    "dynaslim.runtime.engine": ("Engine",),
    "dynaslim.runtime.extract": ("extract", "extract_segment"),
    "dynaslim.runtime.options": ("EngineOptions", "RoutedOutput"),
    "dynaslim.spec": ("GateSpec", "NetSpec", "Route", "StageSpec"),
    "dynaslim.zoo": ("ZOO", "get_spec"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "ZOO",
    "Checkpoint",
    "CostTable",
    "Engine",
    "EngineOptions",
    "Evaluation",
    "GateRecipe",
    "GateSpec",
    "GatedOutput",
    "NetSpec",
    "Preprocessing",
    "Route",
    "RoutedOutput",
    "Rung",
    "SlimNet",
    "StageSpec",
    "SupernetRecipe",
    "adapt",
    "cascade",
    "convert",
    "create_model",
    "evaluate",
    "extract",
    "extract_segment",
    "from_official",
    "get_spec",
    "load",
    "load_images",
    "load_recipe",
    "madds",
    "open_source",
    "params",
    "read",
    "run_gate",
    "run_supernet",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dynaslim' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    if "dynaslim.nn.net" in sys.modules:
        import_module("dynaslim.interop.hub")  # adds methods to networks and checkpoints
    globals()[name] = value  # so that a submodule of the same name does not shadow it
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
