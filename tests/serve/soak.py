"""Thousands of requests at one server, one in five hostile: memory, and that every image asked for comes.

python -m tests.serve.soak ENGINE --requests 10000     # ENGINE: a bundle with a guide; minutes for a small one
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import threading
from collections import Counter
from pathlib import Path

import httpx
import psutil

from pnp_trt.bundle.provenance import provenance
from pnp_trt.runtime.pipeline import Pipeline

from .conftest import serving
from .test_hostile import PATH, hostile

CLIENTS = 6


def main() -> None:
    """Run it, print a line a tenth, and fail where a good request was not answered with its image or 429."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    pipeline = Pipeline.load(given.engine, provider="cpu", threads=1)
    process, seen, memory = psutil.Process(), Counter[str](), []
    numbers, lock = iter(range(given.requests)), threading.Lock()

    def client(seed: int) -> None:
        draw = random.Random(seed)
        with httpx.Client(timeout=120) as http:
            while True:
                with lock:
                    i = next(numbers, None)
                if i is None:
                    return
                if i % 5 == 0:
                    hostile(server, (i // 5) % 7, draw)
                    what = "hostile"
                else:
                    body = {"prompt": f"a panda {i % 50}", "num_inference_steps": 1 + i % 4, "seed": i,
                            "method": ("guided", "guided", "cfg")[i % 3]}  # fmt: skip
                    answer = http.post(server.url + PATH, json=body)
                    what = str(answer.status_code)
                    if answer.status_code == 200:
                        assert answer.json()["pnp_trt"]["images"][0]["seed"] == i
                with lock:
                    seen[what] += 1
                    done = seen.total()
                    if done % max(1, given.requests // 10) == 0:
                        gc.collect()
                        row = {"requests": done, "resident_mib": process.memory_info().rss / 2**20,
                               "threads": process.num_threads(), "descriptors": process.num_fds()}  # fmt: skip
                        memory.append(row)
                        print(row, dict(seen), flush=True)

    with serving({pipeline.name: pipeline}, body_seconds=1.0) as server:
        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine = server.engines[pipeline.name]
        assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert engine.images == 0 and seen.total() == given.requests and set(seen) <= {"200", "429", "hostile"}, seen
    print("every request was answered:", dict(seen))
    if given.json is not None:
        record = {"provenance": provenance(["python", "-m", "tests.serve.soak"]), "seen": dict(seen), "memory": memory}
        given.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
