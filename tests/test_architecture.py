"""The shape of the package: which room may import which, what is public, what stays out."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dynaslim

PACKAGE = Path(dynaslim.__file__).parent

# each may import only itself and what stands before it
LAYERS = [
    "version", "errors", "_files", "_memory", "distributed", "progress", "preprocessing", "seeds",
    "spec", "cascade_spec", "graph", "blocks", "shipped",
    "zoo", "model_names", "cost", "cost_file", "recipes", "nn", "checkpoint_content",
    "checkpoint", "data",
    "runtime", "conversion", "predict",
    "predict_tables", "predict_ray", "predict_stream", "evaluation",
    "train", "bench", "interop", "runs", "report", "serve", "imagenet", "demo", "adaptation",
    "doctor", "cli", "__main__",
]  # fmt: skip


def _layer(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "dynaslim":
                yield from (f"dynaslim.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_import_direction():
    files = [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]
    assert len(files) > 25
    for path in files:
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in _imports(path):
            if module.split(".")[0] == "dynaslim":
                there = _layer(module)
                assert LAYERS.index(there) <= LAYERS.index(here), f"{path} imports {module}"


def test_layers_without_torch():
    script = (
        "import sys, dynaslim, dynaslim.spec, dynaslim.zoo, dynaslim.cost, dynaslim.preprocessing\n"
        "import dynaslim.runtime.budget, dynaslim.runtime.escalation\n"
        "assert dynaslim.madds(dynaslim.get_spec('ds_mbnet'), "
        "dynaslim.get_spec('ds_mbnet').smallest, 224); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names():
    assert dynaslim.__all__ == sorted(dynaslim.__all__, key=lambda n: (not n.isupper(), n))
    assert set(dynaslim._HOME) == set(dynaslim.__all__)
    for name in dynaslim.__all__:
        value = getattr(dynaslim, name)
        if name != "ZOO":
            assert value.__doc__, name
    assert set(dynaslim.__all__) <= set(dir(dynaslim))
    for missing in ("nonsense", "__path__x"):
        with pytest.raises(AttributeError, match=missing):
            getattr(dynaslim, missing)


def test_type_checkers_and_users_see_the_same_names():
    """The names under TYPE_CHECKING are those that __getattr__ serves."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == dynaslim._HOME
