"""A server with hostile clients: others are served as usual, and no job or memory is left behind."""

from __future__ import annotations

import contextlib
import gc
import json
import random
import select
import socket
import threading
import time
from collections import Counter
from typing import Any

import httpx
import numpy as np
import psutil

from pnp_trt.runtime.pipeline import Pipeline

from .conftest import Running, serving
from .test_http import pixels

PATH = "/v1/images/generations"
#: number of kinds of hostile clients, and of those that take less than a second
KINDS, QUICK_KINDS = 9, 7
GOOD = {"prompt": "a red apple", "num_inference_steps": 2, "seed": 3}
#: invalid bodies
WRONG: list[bytes] = [
    b"", b"{", b"null", b"[]", b'"a"', b"\xff\xfe", b'{"prompt": 5}', b'{"prompt": "a", "n": 0}', b"[" * 5000,
    b'{"prompt": "a", "n": 1e99}', b'{"prompt": "a", "seed": "x"}', b'{"prompt": "a", "guidance_scale": NaN}',
    b'{"prompt": "a", "num_inference_steps": 1' + b"0" * 5000 + b"}", b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "size": "-1x-1"}', b'{"prompt": "a", "size": "99999x99999"}',
    b'{"prompt": "a", "method": "__init__"}',
    json.dumps({"prompt": "x" * 200_000}).encode(), json.dumps({"prompt": "a", "strength": 0.5}).encode(),
]  # fmt: skip


def raw(port: int, data: bytes, wait: float = 0) -> bytes:
    """Send bytes, wait, return what the server has answered, and drop the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        time.sleep(wait)
        connection.setblocking(False)
        return connection.recv(1 << 16)
    return b""


def request(body: bytes, length: int | None = None) -> bytes:
    """Return a POST request of OpenAI's interface."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def hostile(server: Running, kind: int, draw: random.Random) -> None:
    """Run one hostile client of a kind."""
    slow = json.dumps(GOOD | {"num_inference_steps": 500}).encode()
    if kind == 0:
        answer = httpx.post(server.url + PATH, content=draw.choice(WRONG), headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, answer.text
        assert "\n" not in answer.json()["error"]["message"]
    elif kind == 1:  # requests a long image and disconnects
        raw(server.port, request(slow), 0.01)
    elif kind == 2:  # sends less than its Content-Length
        raw(server.port, request(b'{"prompt": "a', 5000), 0.01)
    elif kind == 3:  # is not HTTP
        raw(server.port, draw.randbytes(300))
    elif kind == 4:  # sends a header that is too long
        raw(server.port, b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000, 0.01)
    elif kind == 5:  # cancels its own request by its id
        name = f"hostile-{draw.randrange(10**9)}"
        body = json.loads(slow) | {"request_id": name}
        sent = threading.Thread(target=lambda: httpx.post(server.url + PATH, json=body, timeout=60))
        sent.start()
        while sent.is_alive():
            httpx.delete(f"{server.url}/v1/jobs/{name}")
        sent.join()
    elif kind == 6:  # states a huge Content-Length
        raw(server.port, request(b"{}", 10**12))
    elif kind == 7:  # sends single bytes slowly until it is refused
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(request(slow[:1], len(slow)))
            for byte in slow[1:]:
                if select.select([connection], [], [], 0.2)[0]:
                    break
                connection.sendall(bytes([byte]))
            assert b" 408 " in connection.recv(1 << 16)
    else:  # sends a body that is too large
        with contextlib.suppress(httpx.TransportError):  # it may be cut off before it has sent all
            answer = httpx.post(server.url + PATH, content=b"x" * (13 << 20), timeout=60)
            assert answer.status_code == 413, answer.text


def test_hostile_clients_do_not_affect_other_clients(pipelines: dict[str, Pipeline]) -> None:
    draw, statuses, wrong = random.Random(5), Counter[int](), []
    (alone,) = pipelines["guided"]("a red apple", steps=2, seed=3)
    with serving({"guided": pipelines["guided"]}, body_seconds=1.0) as server:
        finished = threading.Event()

        def good() -> None:
            with httpx.Client(timeout=60) as client:
                while not finished.is_set():
                    answer = client.post(server.url + PATH, json=GOOD)
                    statuses[answer.status_code] += 1
                    if answer.status_code == 200:
                        data: Any = answer.json()["data"][0]["b64_json"]
                        wrong.extend([] if np.array_equal(pixels(data), alone.pixels) else [data])
                    time.sleep(0.01)

        client = threading.Thread(target=good)
        client.start()
        for i in range(70):
            hostile(server, i % QUICK_KINDS, draw)
            if i == 20:
                gc.collect()
                before = psutil.Process().memory_info().rss
        finished.set()
        client.join(60)
        server.wait_for(0)
        engine = server.engines["guided"]
        assert engine.images == 0 and engine.alive and httpx.get(f"{server.url}/readyz").status_code == 200
        gc.collect()
        assert psutil.Process().memory_info().rss - before < 64 << 20
    assert not wrong and set(statuses) <= {200, 429} and statuses[200] >= 3, statuses
