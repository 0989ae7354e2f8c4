"""The clients of benchmarks/serve.py, in a separate process, with as little work as possible.

Reads one JSON object from standard input (see `Plan`) and writes one to standard output.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any


@dataclass
class Plan:
    """Which requests to send, how often and how long."""

    port: int
    requests: list[str]
    """Bodies to send in turn, as latin-1 text."""
    content_type: str
    seconds: float
    clients: int = 0
    """Closed loop: number of clients, each of which waits for an answer before its next request."""
    rate: float = 0.0
    """Open loop: requests per second, at random times (Poisson), independent of answers."""
    path: str = "/v1/predict"
    json_length: int | None = None
    """For bodies with binary tensors: number of bytes of JSON before them."""
    settle_s: float = 0.5
    """Answers in this first period do not count."""
    connections: int = 512
    """Open loop: most connections; if none is free, a request is not sent, but counted."""
    patience_s: float = 20.0
    until_stopped: bool = False
    """Closed loop: a client ends when a reply says that the server is stopping."""
    seed: int = 0


class Connection(asyncio.Protocol):
    """A persistent connection for one request at a time."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.waiter: asyncio.Future[tuple[int, bytes]] | None = None
        self.buffer = b""
        self.open = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result((0, b""))  # closed without an answer

    def send(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """A future of status and body; the status is 0 if the connection closes first."""
        self.waiter = asyncio.get_running_loop().create_future()
        if not self.open:
            self.waiter.set_result((0, b""))
        else:
            self.transport.write(request)
        return self.waiter

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lower = head.lower()
        at = lower.index(b"\r\ncontent-length:") + 17
        length = int(lower[at : lower.find(b"\r\n", at) if b"\r\n" in lower[at:] else None])
        if len(body) < length:
            return
        self.buffer = body[length:]
        if b"connection: close" in lower:
            self.open = False
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result((int(head[9:12]), body[:length]))


class Clients:
    """All clients of a plan, and their measurements."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.requests = [self._request(body.encode("latin-1")) for body in plan.requests]
        self.rng = random.Random(plan.seed)
        self.codes: Counter[int] = Counter()
        self.latencies: list[float] = []
        self.engine_batches: list[int] = []
        self.sent: list[float] = []
        """Seconds from sending to the answer, without the client's own delay."""
        self.not_sent = 0
        self.connections = 0
        self.idle: deque[Connection] = deque()
        self.end = 0.0
        self.begin = 0.0

    def _request(self, body: bytes) -> bytes:
        head = (
            f"POST {self.plan.path} HTTP/1.1\r\nHost: bench\r\n"
            f"Content-Type: {self.plan.content_type}\r\nContent-Length: {len(body)}\r\n"
        )
        if self.plan.json_length is not None:
            head += f"Inference-Header-Content-Length: {self.plan.json_length}\r\n"
        head += "\r\n"
        return head.encode() + body

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(Connection, "127.0.0.1", self.plan.port)
        return made

    async def request(self, connection: Connection, number: int, began: float) -> int:
        """Send one request; `began` is the time when it was due."""
        sent = time.perf_counter()
        status, body = await connection.send(self.requests[number % len(self.requests)])
        now = time.perf_counter()
        if began >= self.begin:
            self.codes[status] += 1
            if status == 200:
                self.latencies.append(now - began)
                self.sent.append(now - sent)
                _, found, rest = body.rpartition(b'"batch_size":')
                if found:  # missing in the Open Inference Protocol
                    self.engine_batches.append(int(rest[: rest.index(b",")]))
        return status

    async def closed(self) -> None:
        """Run a closed loop: each client sends its next request after an answer."""

        async def one(number: int) -> None:
            """Send until the end, or until the server stops."""
            connection = await self.connect()
            while (now := time.perf_counter()) < self.end:
                status = await self.request(connection, number, now)
                number += self.plan.clients
                if self.plan.until_stopped and status in (0, 503):
                    break
                if not connection.open:
                    connection = await self.connect()
                if status in (429, 503):
                    await asyncio.sleep(0.05)
            connection.transport.close()

        await asyncio.gather(*(one(number) for number in range(self.plan.clients)))

    async def open(self) -> None:
        """Run an open loop: requests are sent at random times, independent of answers."""
        tasks: set[asyncio.Task[None]] = set()

        async def one(number: int, due: float) -> None:
            while self.idle and not self.idle[-1].open:
                self.idle.pop()
                self.connections -= 1
            if not self.idle and self.connections >= self.plan.connections:
                self.not_sent += due >= self.begin
                return
            try:
                if self.idle:
                    connection = self.idle.pop()
                else:
                    self.connections += 1
                    connection = await self.connect()
                await self.request(connection, number, due)
                self.idle.append(connection)
            except OSError:
                self.codes[0] += 1
                self.connections -= 1

        due, number = time.perf_counter(), 0
        while due < self.end:
            delay = due - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            task = asyncio.create_task(one(number, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += self.rng.expovariate(self.plan.rate)
            number += 1
        if tasks:
            await asyncio.wait(tasks, timeout=self.plan.patience_s)

    async def run(self) -> dict[str, Any]:
        start = time.perf_counter()
        self.begin = start + self.plan.settle_s
        self.end = self.begin + self.plan.seconds
        used = resource.getrusage(resource.RUSAGE_SELF)
        await (self.closed() if self.plan.clients else self.open())
        after = resource.getrusage(resource.RUSAGE_SELF)
        lasted = time.perf_counter() - start
        cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        ordered, sent = sorted(self.latencies), sorted(self.sent)

        def quantile(values: list[float], q: float) -> float | None:
            return values[min(len(values) - 1, int(q * len(values)))] * 1e3 if values else None

        return {
            "seconds": self.plan.seconds,
            "codes": {str(code): count for code, count in sorted(self.codes.items())},
            "cut_off": self.codes[0],
            "not_sent": self.not_sent,
            "answered_per_s": self.codes[200] / self.plan.seconds,
            "p50_ms": quantile(ordered, 0.5),
            "p99_ms": quantile(ordered, 0.99),
            "longest_ms": quantile(ordered, 1.0),
            "longest_from_sending_ms": quantile(sent, 1.0),
            "mean_batch": sum(self.engine_batches) / len(ordered) if ordered else None,
            "client_cpu_share": cpu / lasted,
        }


def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    json.dump(asyncio.run(Clients(plan).run()), sys.stdout)


if __name__ == "__main__":
    main()
