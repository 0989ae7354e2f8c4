"""A small package to serve, with a budget curve, and servers of it."""

import math
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import uvicorn
from helpers import encoded, forced_curve, lively, micro_spec, ready, until
from starlette.testclient import TestClient

from dynaslim.checkpoint import Checkpoint
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.export import export_package
from dynaslim.serve import ServeOptions, create_app, model_info

SIDE = 16
CLASSES = tuple("abcde")


def _export(folder, **changes):
    spec = micro_spec()
    fields = {
        "class_names": CLASSES,
        "preprocessing": Preprocessing(SIDE, std=(0.05,) * 3),
        "budget": forced_curve(spec, SIDE).to_dict(),
        **changes,
    }
    export_package(Checkpoint(lively(spec, image_size=SIDE), **fields), folder)
    return folder


_LIMITS = {"_SPREAD": model_info._SPREAD, "_STEADY": model_info._STEADY}


@pytest.fixture(scope="session", autouse=True)
def any_times():
    """Times are shown, steady or not: those of a network this small are of microseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_info, "_SPREAD", math.inf)
        patch.setattr(model_info, "_STEADY", 0)
        yield


@pytest.fixture
def steady_times(monkeypatch):
    """Times are shown only if they are steady, as in a server."""
    for name, value in _LIMITS.items():
        monkeypatch.setattr(model_info, name, value)


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """A package with a budget curve; not to be changed."""
    return _export(tmp_path_factory.mktemp("served") / "micro")


@pytest.fixture(scope="session")
def plain_package(tmp_path_factory):
    """One without a curve and without names of its classes."""
    return _export(tmp_path_factory.mktemp("served") / "plain", class_names=None, budget=None)


@pytest.fixture(scope="session")
def engine(package):
    """The package's engine; shared."""
    made = Engine.from_package(package, backend="onnxruntime", workers=1)
    made.warm_up()
    return made


@pytest.fixture(scope="session")
def pictures():
    """Encoded pictures that the gates can distinguish."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(8):
        rough = rng.standard_normal((20 + n, 24, 3)) * rng.uniform(0, 80)
        made.append(encoded((rng.uniform(0, 255, 3) + rough).clip(0, 255).astype(np.uint8)))
    return made


class Held:
    """An engine that waits for `open` before it answers, and records its calls."""

    def __init__(self, engine):
        self._engine = engine
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.calls = []

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def hold(self):
        """Forget former calls, and let none pass from here on."""
        self.calls.clear()
        while self.entered.acquire(blocking=False):
            pass
        self.open.clear()

    def __call__(self, x, **arguments):
        self.calls.append((len(x), arguments))
        self.entered.release()
        assert self.open.wait(20), "the engine was not opened"
        return self._engine(x, **arguments)


@pytest.fixture
def held(engine):
    """An engine that is open; close it by `held.hold()`."""
    made = Held(engine)
    made.open.set()
    yield made
    made.open.set()


@contextmanager
def _ready(app):
    with TestClient(app, raise_server_exceptions=False) as client:
        ready(client)
        yield client


@pytest.fixture
def serve(engine):
    """`with serve(option=...) as client:` a ready server of the engine, or of another model."""

    def start(model=None, **options):
        return _ready(create_app(engine if model is None else model, ServeOptions(**options)))

    return start


@pytest.fixture(scope="session")
def live():
    """`with live(app) as port:` an app behind a real socket."""

    @contextmanager
    def start(app):
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        until(lambda: server.started and app.state.service.state == "ready")
        try:
            yield server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()

    return start
