"""Send thousands of requests to one server, one in five hostile: record memory, and check that no image is missing.

python -m tests.serve.soak                             # with a micro bundle built for it; minutes
python -m tests.serve.soak --engine ENGINE --requests 1000      # with another bundle, which needs a guide
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import httpx
import psutil

from pnp_trt.bundle.provenance import provenance
from pnp_trt.runtime.pipeline import Pipeline

from ..conftest import make_micro_base, make_micro_bundle, make_micro_guide
from .conftest import serving
from .test_hostile import KINDS, PATH, hostile

CLIENTS = 6


def main() -> None:
    """Print ten progress lines, and fail if a valid request was not answered with its image or 429."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", help="a bundle with a guide; default: a micro bundle built for this run")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="file of the record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        engine = Path(options.engine) if options.engine else _micro(Path(home))
        pipeline = Pipeline.load(engine, provider="cpu", threads=1)
        run(pipeline, options.requests, options.json)


def _micro(home: Path) -> Path:
    """Build the tests' micro bundle with a guide below ``home``."""
    base = make_micro_base(home / "base")
    make_micro_bundle(base, make_micro_guide(base, home / "guide"), home / "guided")
    return home / "guided"


def run(pipeline: Pipeline, requests: int, record: Path | None) -> None:
    """Serve ``requests`` requests, and write the record if a file is named."""
    process, seen, memory = psutil.Process(), Counter[str](), []
    numbers, lock = iter(range(requests)), threading.Lock()

    def client(seed: int) -> None:
        draw = random.Random(seed)
        with httpx.Client(timeout=120) as http:
            while True:
                with lock:
                    i = next(numbers, None)
                if i is None:
                    return
                if i % 5 == 0:
                    hostile(server, (i // 5) % KINDS, draw)
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
                    if done % max(1, requests // 10) == 0:
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
    assert engine.images == 0 and seen.total() == requests and set(seen) <= {"200", "429", "hostile"}, seen
    print("every request was answered:", dict(seen))
    if record is not None:
        document = {"provenance": provenance(["python", "-m", "tests.serve.soak", *sys.argv[1:]]), "seen": dict(seen),
                    "memory": memory}  # fmt: skip
        record.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
