"""dynaslim: dynamic slimmable networks, sliced for real.

One trained network, and for every image only as much of it as that image needs.

    net = dynaslim.load("checkpoint.safetensors")   # or dynaslim.create_model("ds_mbnet")
    logits = net(x, net.spec.smallest)              # one route for the whole batch
    engine = dynaslim.Engine(net)
    logits, routes, madds = engine(x)               # every image along its own route

Names are imported on first use, so `import dynaslim` costs no torch.
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


_HOME = {
    "Checkpoint": "dynaslim.checkpoint",
    "CostTable": "dynaslim.cost",
    "Engine": "dynaslim.runtime.engine",
    "EngineOptions": "dynaslim.runtime.options",
    "Evaluation": "dynaslim.evaluation",
    "GateRecipe": "dynaslim.recipes",
    "GateSpec": "dynaslim.spec",
    "GatedOutput": "dynaslim.nn",
    "NetSpec": "dynaslim.spec",
    "Preprocessing": "dynaslim.preprocessing",
    "Route": "dynaslim.spec",
    "RoutedOutput": "dynaslim.runtime.options",
    "Rung": "dynaslim.runtime.cascade",
    "SlimNet": "dynaslim.nn",
    "StageSpec": "dynaslim.spec",
    "SupernetRecipe": "dynaslim.recipes",
    "ZOO": "dynaslim.zoo",
    "adapt": "dynaslim.adaptation",
    "cascade": "dynaslim.runtime.cascade",
    "convert": "dynaslim.conversion",
    "create_model": "dynaslim.checkpoint",
    "evaluate": "dynaslim.evaluation",
    "extract": "dynaslim.runtime.extract",
    "extract_segment": "dynaslim.runtime.extract",
    "from_official": "dynaslim.interop.official",
    "get_spec": "dynaslim.zoo",
    "load": "dynaslim.checkpoint",
    "load_images": "dynaslim.data",
    "load_recipe": "dynaslim.recipes",
    "madds": "dynaslim.cost",
    "open_source": "dynaslim.data",
    "params": "dynaslim.cost",
    "read": "dynaslim.checkpoint",
    "run_gate": "dynaslim.runs",
    "run_supernet": "dynaslim.runs",
    "save": "dynaslim.checkpoint",
}

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
    globals()[name] = value  # before a submodule of that name can take its place
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
