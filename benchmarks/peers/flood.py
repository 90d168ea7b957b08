"""Clients that wrk cannot be: a rate that no answer slows down, answers before the body is sent, broken pictures.

    python flood.py ORDER.json > RECORDS.json

The order names `port`, `files` ([path, kind, weight]), `clients` (connections at most), and either `rate`
(requests a second, come what may) or nothing (each client asks again when it has its answer); it ends after
`seconds`, or after `count` requests, or when the port is closed and nothing is open. `get` asks for an
address instead, with a `pause` in seconds. A record is [kind, sent at, seconds, status, Retry-After, version,
label]; status 0 is a connection that was refused, -1 a request that was sent and never answered.
"""

import asyncio
import json
import random
import sys
import time
from itertools import accumulate

import uvloop

HEAD = b'--automl-cv\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
TAIL = b"\r\n--automl-cv--\r\n"
REFUSED, LOST = 0, -1


class Talk(asyncio.Protocol):
    """One connection."""

    def __init__(self):
        self.answer, self.data, self.open = None, b"", True

    def connection_made(self, transport):
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future:
        """Send a request."""
        self.answer, self.data = asyncio.get_running_loop().create_future(), b""
        self.transport.write(request)
        return self.answer

    def data_received(self, data):
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        if not found or not self.answer or self.answer.done():
            return
        lines = [line.partition(b": ") for line in head.split(b"\r\n")[1:]]
        headers = {name.lower(): value.decode() for name, _, value in lines}
        if len(body) >= int(headers.get(b"content-length", 0)):
            if headers.get(b"connection") == "close" or self.transport.get_write_buffer_size():
                self.close()
            self.answer.set_result((int(head[9:12]), headers, body))

    def close(self) -> None:
        """Hang up."""
        self.open = False
        self.transport.abort()

    def connection_lost(self, error):
        self.open = False
        if self.answer and not self.answer.done():
            self.answer.set_result((LOST, {}, b""))


class Flood:
    """All clients of one order."""

    def __init__(self, order: dict):
        self.order, self.records, self.idle, self.busy, self.skipped = order, [], [], 0, 0
        self.random, self.started = random.Random(order.get("seed", 0)), time.perf_counter()
        self.bodies, weights = [], []
        for path, kind, weight in order.get("files", []):
            with open(path, "rb") as file:
                body = HEAD + file.read() + TAIL
            head = ("POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=automl-cv"
                    f"\r\nContent-Length: {len(body)}\r\n\r\n")
            self.bodies.append((kind, head.encode() + body))
            weights.append(weight)
        if "get" in order:
            self.bodies = [("get", f"GET {order['get']} HTTP/1.1\r\nHost: a\r\n\r\n".encode())]
            weights = [1]
        self.weights = list(accumulate(weights))  # adding them up for each request would take the server's time

    async def one(self) -> int:
        """Make one request on a free connection or a new one."""
        kind, request = self.random.choices(self.bodies, cum_weights=self.weights)[0]
        self.busy += 1
        talk = None
        while self.idle and not (talk and talk.open):
            talk = self.idle.pop()
        try:
            if not (talk and talk.open):
                loop = asyncio.get_running_loop()
                _, talk = await loop.create_connection(Talk, "127.0.0.1", self.order["port"])
            sent = time.perf_counter()
            status, headers, body = await talk.ask(request)
        except OSError:
            sent, (status, headers, body) = time.perf_counter(), (REFUSED, {}, b"")
        label = json.loads(body).get("label", "") if status == 200 and kind != "get" else ""
        self.records.append((kind, round(sent - self.started, 4), round(time.perf_counter() - sent, 5), status,
                             headers.get(b"retry-after", ""), headers.get(b"x-model-version", ""), label))
        self.busy -= 1
        if talk and talk.open:
            self.idle.append(talk)
        return status

    def over(self) -> bool:
        """Tell whether the order is fulfilled."""
        count = self.order.get("count")
        return (count is not None and len(self.records) + self.busy >= count
                or time.perf_counter() - self.started > self.order.get("seconds", 1e9))

    async def client(self) -> None:
        """Ask, wait for the answer, ask again."""
        while not self.over() and await self.one() != REFUSED:
            if pause := self.order.get("pause"):
                await asyncio.sleep(pause)

    async def run(self) -> None:
        """Fulfil the order."""
        if not self.order.get("rate"):
            return await asyncio.gather(*(self.client() for _ in range(self.order["clients"]))) and None
        jobs, due = set(), time.perf_counter()
        while not self.over():
            due += self.random.expovariate(self.order["rate"])
            await asyncio.sleep(max(0, due - time.perf_counter()))
            if self.busy >= self.order["clients"]:
                self.skipped += 1
                continue
            job = asyncio.ensure_future(self.one())
            jobs.add(job)
            job.add_done_callback(jobs.discard)
        await asyncio.gather(*jobs)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        flood = Flood(json.load(file))
    uvloop.run(flood.run())
    json.dump({"records": flood.records, "skipped": flood.skipped,
               "seconds": time.perf_counter() - flood.started}, sys.stdout)
