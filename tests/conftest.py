import os
import shutil
import signal
import subprocess
from functools import partial

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's library
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell ignores Ctrl-C for what it starts in the background, and so would what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_dataset_cache(tmp_path_factory):
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    # side by side (pytest -n) one each: threads that spin while they wait take each other's cores
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True, scope="session")
def _own_program_cache(tmp_path_factory):
    """Compiled programs of the tests stay out of the user's cache, processes of theirs included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNASLIM_CACHE", str(tmp_path_factory.mktemp("programs")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _adapt_times_few_rounds():
    """The report of `adapt` would else time networks of no size for ten seconds."""
    from dynaslim import adaptation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptation, "ReportOptions", partial(adaptation.ReportOptions, rounds=2))
        yield


@pytest.fixture
def one_thread():
    """One core for torch in the test's own thread: small networks are fastest so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_disk(tmp_path):
    """A folder of its own on a disk of 256 KB, for what happens when one is full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    yield folder
    # lazily: a library may still have one of its files mapped
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def browser():
    """A browser without a window, with a made-up camera."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install 'dynaslim[dev]'")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()
