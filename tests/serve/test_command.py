"""``pnp-trt serve`` as a process: its printed address, SIGTERM under load, and arguments that it refuses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..conftest import Result


def test_sigterm_finishes_running_requests_and_accepts_no_more(engines: Path) -> None:
    command = [sys.executable, "-m", "pnp_trt", "serve", "guided", "--port", "0", "--provider", "cpu", "--slots", "2"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        match = re.search(r"serving at (http://127\.0\.0\.1:\d+) ", line)
        assert match, line
        url, answers = match[1], []
        body = {"prompt": "a cat", "num_inference_steps": 100, "request_id": "the-long-one", "n": 3}
        sent = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/images/generations", json=body, timeout=120))
        )
        sent.start()
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/v1/jobs/the-long-one").json().get("steps_done", 0) == 0:
            assert time.monotonic() < deadline
        child.send_signal(signal.SIGTERM)
        sent.join(120)
        assert child.wait(60) == 0
        assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 3
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/healthz")
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host", "0.0.0.0"), "is reached by other machines and there is no API key"),
        (("--api", "openai,soap"), "--api is 'openai,soap'; known: openai, a1111"),
        (("guided", "guided"), "two engines have the name 'guided'"),
        (("nothing",), "nothing"),
        (("guided", "--host", "203.0.113.7", "--no-key", "--port", "0"), "cannot listen at 203.0.113.7"),
    ],
)
def test_invalid_arguments_are_refused_in_one_sentence(
    engines: Path, cli: Callable[..., Result], arguments: tuple[Any, ...], message: str
) -> None:
    done = cli("serve", *arguments)
    assert done.code == 2 and message in done.err and len(done.err.strip().splitlines()) == 1
