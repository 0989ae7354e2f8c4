"""The server under load: throughput by batching, latency, overload, malformed requests, drain.

    python benchmarks/serve.py --json benchmarks/results/serve.json

Networks with random weights are written to a temporary folder. Each server is one process and its
clients (serve_client.py) are another, on the same machine; `client_cpu_share`, beside each number,
is the clients' CPU use as a share of one core. Throughput is measured in rounds in which the arms
take turns: the server with default settings, with batches of one, and with batches of one on one
core, which is faster for small networks. Takes about six minutes; with --quick less than one, but
those numbers only show that it runs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dynaslim.bench.models import random_network
from dynaslim.bench.timing import hardware, summary
from dynaslim.checkpoint import Checkpoint, save
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.export import export_package

ARMS = {
    "batched": [],
    "one_at_a_time": ["--max-batch", "1"],
    "one_at_a_time_one_core": ["--max-batch", "1", "--workers", "1"],
}
BACKEND = "onnxruntime"
BOUNDARY = "bench"
ADMIN = "admin"
MALFORMED = (
    "/v1/predict",
    "/v2/models/{name}/infer",
    "/v2/repository/index",
    "/v2/repository/models/{name}/load",
    "/v2/repository/models/{name}/unload",
)
"""Paths that get malformed requests."""
DEADLINE_MS = 2000.0


@dataclass
class Case:
    """A network and the requests sent to it."""

    model: str
    side: int
    images: int
    """Number of images in a request."""
    exported: bool = True
    """Whether it is served as a package; otherwise a checkpoint, as export would take minutes."""
    full: bool = True
    """Whether latency and overload are measured besides throughput."""

    @property
    def name(self) -> str:
        return f"{self.model} at {self.side} px, {self.images} a request"


CASES = (
    Case("ds_mbnet_tiny", 32, 1),
    Case("ds_mbnet_tiny", 32, 4, full=False),
    Case("ds_mbnet", 224, 1, exported=False),
)


class Server:
    """A process of `dynaslim serve`."""

    def __init__(self, *models: Path | str, flags: list[str]) -> None:
        command = [sys.executable, "-m", "dynaslim", "serve", *map(str, models), "--port", "0"]
        command += ["--backend", BACKEND]
        self.process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r":(\d+)/", line)
        assert found, f"the server did not start: {line}"
        self.port = int(found[1])

    def rss_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu_s(self) -> float:
        """CPU seconds used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> int:
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def write(case: Case, model: Path) -> None:
    net = random_network(case.model, case.side)
    checkpoint = Checkpoint(net, preprocessing=Preprocessing(case.side))
    if case.exported:
        export_package(checkpoint, model)
    else:
        save(model, checkpoint)


def pictures(side: int, count: int) -> list[bytes]:
    """JPEG files of smooth noise, somewhat larger than the network's input."""
    rng, found = np.random.default_rng(0), []
    size = side if side <= 32 else side * 8 // 7
    for _ in range(count):
        rough = rng.integers(0, 256, (max(4, size // 8),) * 2 + (3,), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(rough).resize((size, size)).save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found


def form(images: list[bytes]) -> bytes:
    head = b'Content-Disposition: form-data; name="images"; filename="a.jpg"\r\n\r\n'
    edge = f"--{BOUNDARY}".encode()
    return b"".join(edge + b"\r\n" + head + one + b"\r\n" for one in images) + edge + b"--\r\n"


def tensor(name: str, datatype: str, shape: list[int], content: bytes) -> tuple[bytes, int]:
    """A body of the Open Inference Protocol with one binary tensor, and the length of its JSON."""
    sized = {"binary_data_size": len(content)}
    sent = {"name": name, "datatype": datatype, "shape": shape, "parameters": sized}
    head = json.dumps({"inputs": [sent], "parameters": {"binary_data_output": True}}).encode()
    return head + content, len(head)


def bodies(case: Case, kind: str) -> dict[str, Any]:
    """Requests of a kind, from 32 pictures in turn: forms, encoded files or normalised tensors."""
    if kind == "form":
        files = pictures(case.side, 32)
        made = [form([files[(n + k) % 32] for k in range(case.images)]) for n in range(32)]
        return {"content_type": f"multipart/form-data; boundary={BOUNDARY}", "requests": made}
    if kind == "bytes":
        # padded to equal length, so that the JSON part has one length; bytes behind a JPEG are
        # ignored
        longest = max(map(len, pictures(case.side, 32)))
        files = [one.ljust(longest, b"\0") for one in pictures(case.side, 32)]
        prefix = longest.to_bytes(4, "little")
        pairs = [tensor("image", "BYTES", [1], prefix + one) for one in files]
    else:
        shape = [1, 3, case.side, case.side]
        x = np.random.default_rng(0).standard_normal((32, *shape), np.float32)
        pairs = [tensor("x", "FP32", shape, row.tobytes()) for row in x]
    return {
        "content_type": "application/octet-stream",
        "path": f"/v2/models/{case.model}/infer",
        "requests": [body for body, _ in pairs],
        "json_length": pairs[0][1],
    }


def plan(case: Case, port: int, kind: str = "form", **options: Any) -> str:
    made = bodies(case, kind)
    made["requests"] = [body.decode("latin-1") for body in made["requests"]]
    return json.dumps({"port": port, **made, **options})


def start_clients(text: str) -> subprocess.Popen[str]:
    made = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("serve_client.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert made.stdin is not None
    made.stdin.write(text)
    made.stdin.close()
    return made


def result_of(clients: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    """The results of the clients, waiting at most `seconds`."""
    try:
        clients.wait(seconds)
    except subprocess.TimeoutExpired:
        clients.kill()
        raise
    assert clients.stdout is not None
    found: dict[str, Any] = json.loads(clients.stdout.read())
    return found


def load(server: Server, case: Case, seconds: float, **options: Any) -> dict[str, Any]:
    cpu, start = server.cpu_s(), time.perf_counter()
    clients = start_clients(plan(case, server.port, seconds=seconds, **options))
    found = result_of(clients, seconds + 40)
    found["server_cpu_share"] = (server.cpu_s() - cpu) / (time.perf_counter() - start)
    return found


# -- measurements ---------------------------------------------------------------------------------


def throughput(
    servers: dict[str, Server], case: Case, rounds: int, seconds: float
) -> dict[str, Any]:
    """Images per second of every arm by closed-loop clients, in turn."""
    clients = max(4, 32 // case.images)
    periods: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for server in servers.values():
        load(server, case, seconds / 2, clients=clients)
    for turn in range(rounds):
        order = list(servers.items())
        for name, server in order if turn % 2 == 0 else reversed(order):
            periods[name].append(load(server, case, seconds, clients=clients))
    arms: dict[str, Any] = {}
    for name, found in periods.items():
        arms[name] = {
            "images_per_s": summary([p["answered_per_s"] * case.images for p in found]),
            "p50_ms": statistics.median(p["p50_ms"] for p in found),
            "mean_batch": statistics.median(p["mean_batch"] for p in found),
            "client_cpu_share": statistics.median(p["client_cpu_share"] for p in found),
            "server_cpu_share": statistics.median(p["server_cpu_share"] for p in found),
            "codes": dict(sum((Counter(p["codes"]) for p in found), Counter())),
        }
    ratios = {
        name: summary(
            [
                batched["answered_per_s"] / other["answered_per_s"]
                for batched, other in zip(periods["batched"], periods[name], strict=True)
            ]
        )
        for name in servers
        if name != "batched"
    }
    return {"clients": clients, "rounds": rounds, "arms": arms, "batched_over": ratios}


def protocol(server: Server, case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    """The Open Inference Protocol compared with /v1/predict, for one client and for 32, in turn."""
    kinds = ("form", "bytes", "fp32")
    found: dict[str, Any] = {"rounds": rounds}
    for clients in (1, 32):
        periods: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for turn in range(rounds + 1):
            for kind in kinds if turn % 2 else reversed(kinds):
                one = load(server, case, seconds, kind=kind, clients=clients)
                if turn:  # the first is a warm-up
                    periods[kind].append(one)
        found[f"{clients} clients"] = {
            kind: {
                "answered_per_s": summary([one["answered_per_s"] for one in ran]),
                "p50_ms": statistics.median(one["p50_ms"] for one in ran),
                "over_form": summary(
                    [
                        one["answered_per_s"] / form_["answered_per_s"]
                        for one, form_ in zip(ran, periods["form"], strict=True)
                    ]
                ),
                "codes": dict(sum((Counter(one["codes"]) for one in ran), Counter())),
            }
            for kind, ran in periods.items()
        }
    return found


def latency(server: Server, case: Case, capacity: float, seconds: float) -> dict[str, Any]:
    """Latency in an open loop at half and four fifths of `capacity` (requests per second)."""
    return {
        f"{share:.0%}": load(server, case, seconds, rate=share * capacity) for share in (0.5, 0.8)
    }


def overload(server: Server, case: Case, capacity: float, seconds: float) -> dict[str, Any]:
    """Send three times the capacity, twice; memory must not grow in the second period."""
    before = server.rss_mb()
    first = load(server, case, seconds, rate=3 * capacity)
    between = server.rss_mb()
    second = load(server, case, seconds, rate=3 * capacity, seed=1)
    after = server.rss_mb()
    longest = max(p["longest_from_sending_ms"] or 0 for p in (first, second))
    return {
        "first": first,
        "second": second,
        "rss_mb": [before, between, after],
        "longest_answered_ms": longest,
        "alive": server.alive(),
    }


def malformed(server: Server, case: Case, count: int, path: str) -> dict[str, Any]:
    """Send malformed requests of all kinds: generated from the OpenAPI document, and by hand."""
    import httpx
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode

    url = f"http://127.0.0.1:{server.port}"
    statuses: Counter[int] = Counter()
    before = half = server.rss_mb()
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[path]["POST"]
    changes = "/repository/" in path
    path = path.format(name="none" if changes else case.model)
    admin = {"authorization": f"Bearer {ADMIN}"}
    made_up = count * 2 // 5

    @settings(
        max_examples=made_up,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(GenerationMode.NEGATIVE))
    def fuzz(case: Any) -> None:
        statuses[case.call(base_url=url, headers=admin).status_code] += 1

    fuzz()
    rng = np.random.default_rng(0)
    kinds = [encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]
    with httpx.Client(timeout=30) as client:

        def post(content: bytes, kept: float = 1.0) -> int:
            """The status for a picture; `kept` is the share of the request's body that is sent."""
            headers = dict(admin)
            if changes:
                body = content
            elif path.startswith("/v2/"):
                packed = len(content).to_bytes(4, "little") + content
                body, length = tensor("image", "BYTES", [1], packed)
                headers["inference-header-content-length"] = str(length)
            else:
                body = form([content])
                headers["content-type"] = f"multipart/form-data; boundary={BOUNDARY}"
            sent = body[: round(kept * len(body))]
            return client.post(f"{url}{path}", content=sent, headers=headers).status_code

        # a damaged picture may still decode: answered requests do not count
        while sum(statuses.values()) - statuses[200] < count:
            turn = sum(statuses.values())
            content = bytearray(kinds[turn % len(kinds)])
            match turn % 4:
                case 0:  # truncated
                    content = content[: rng.integers(0, len(content))]
                case 1:  # damaged
                    for at in rng.integers(0, len(content), 20):
                        content[at] = rng.integers(0, 256)
                case 2:  # a huge size in the header
                    at = rng.integers(0, 40)
                    content[at : at + 4] = b"\xff\xff\xff\x7f"
                case 3:  # random bytes
                    content = bytearray(rng.bytes(int(rng.integers(0, 2000))))
            # every tenth body is truncated
            statuses[post(bytes(content), rng.random() if turn % 10 == 9 else 1.0)] += 1
            if turn == count // 2:
                half = server.rss_mb()
        path, changes = "/v1/predict", False
        good = post(encoded("PNG"))
    return {
        "requests": sum(statuses.values()),
        "refused": sum(statuses.values()) - statuses[200],
        "made_up_from_the_document": made_up,
        "codes": {str(code): n for code, n in sorted(statuses.items())},
        # 504 is the right reply to a request with a deadline of a millisecond
        "server_errors": sum(n for code, n in statuses.items() if code >= 500 and code != 504),
        "rss_mb": [before, half, server.rss_mb()],
        "alive": server.alive() and good == 200,
    }


def encoded(kind: str) -> bytes:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def drain(model: Path, case: Case) -> dict[str, Any]:
    """Send SIGTERM while clients send requests continuously."""
    server = Server(model, flags=[])
    clients = start_clients(
        plan(case, server.port, seconds=20, clients=32, settle_s=0, until_stopped=True)
    )
    time.sleep(2.5)
    code = server.stop()
    found = result_of(clients, 40)
    return {
        "exit_code": code,
        "answered": found["codes"].get("200", 0),
        "refused_with_503": found["codes"].get("503", 0),
        "cut_off": found["cut_off"],
    }


# -- the whole benchmark --------------------------------------------------------------------------


def measure(case: Case, model: Path, quick: bool, result: dict[str, Any]) -> None:
    """Measure throughput and, if the case is `full`, latency and overload."""
    rounds, seconds, longer = (2, 0.7, 1.5) if quick else (5, 2.0, 7.0)
    servers = {name: Server(model, flags=flags) for name, flags in ARMS.items()}
    try:
        found = throughput(servers, case, rounds, seconds)
        result["throughput"] = found
        speed = found["arms"]["batched"]["images_per_s"]["median"]
        for name, ratio in found["batched_over"].items():
            other = found["arms"][name]["images_per_s"]["median"]
            print(
                f"{case.name}: batched {speed:.0f} images/s, {name} {other:.0f}: "
                f"{ratio['median']:.2f}x ({ratio['q1']:.2f} to {ratio['q3']:.2f})",
                flush=True,
            )
        if not case.full:
            return
        if case == CASES[0]:
            result["protocol"] = protocol(servers["batched"], case, rounds, seconds)
            for clients, kinds in result["protocol"].items():
                if clients != "rounds":
                    print(f"  {clients}:", {k: one["answered_per_s"] for k, one in kinds.items()})
        capacity = speed / case.images
        result["latency"] = latency(servers["batched"], case, capacity, longer)
        for share, one in result["latency"].items():
            print(f"  at {share}: p50 {one['p50_ms']:.1f} ms, p99 {one['p99_ms']:.1f} ms")
        result["overload"] = overload(servers["batched"], case, capacity, longer)
        over = result["overload"]
        print(
            f"  at 300%: {over['second']['codes']}, {over['second']['not_sent']} not sent, "
            f"the longest answered {over['longest_answered_ms']:.0f} ms, RSS {over['rss_mb']} MB",
            flush=True,
        )
    finally:
        for server in servers.values():
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--quick", action="store_true", help="short, to see that it runs")
    options = parser.parse_args()
    start = time.perf_counter()
    result: dict[str, Any] = {
        "hardware": hardware(),
        "backend": BACKEND,
        "deadline_ms": DEADLINE_MS,
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DYNASLIM_CACHE"] = str(Path(folder) / "cache")  # not reusable: random weights
        models: dict[str, Path] = {}
        for case in CASES:
            model = models.setdefault(case.model, Path(folder) / case.model)
            if not model.exists():
                write(case, model)
            measure(case, model, options.quick, result["cases"].setdefault(case.name, {}))
        tiny = models[CASES[0].model]
        # a server of two models that allows changes of models
        server = Server(tiny, f"second={tiny}", flags=["--admin-token", ADMIN])
        try:
            result["malformed"] = {
                path: malformed(server, CASES[0], 200 if options.quick else 2000, path)
                for path in MALFORMED
            }
        finally:
            server.stop()
        for path, found in result["malformed"].items():
            print(f"malformed, {path}:", found, flush=True)
        result["drain"] = drain(tiny, CASES[0])
        print("drain:", result["drain"], flush=True)
    result["took_s"] = time.perf_counter() - start
    print(f"took {result['took_s']:.0f} s")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
