"""Replicas and workers as Ray processes: they generate the pipeline's images, and one may be killed."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.runtime.images import read_parameters
from pnp_trt.runtime.pipeline import Pipeline

from ..conftest import Result
from .test_loras import make_loras
from .test_offline import written

#: seconds to start two replicas on a busy machine
START = 300
needs_ray = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1500),  # two starts of Ray on a busy machine
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (make test-ray)"),
]


@contextlib.contextmanager
def command(engines: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run ``pnp-trt`` with Ray as a process; afterwards, check that it left no process."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # must be short, as Ray's sockets are in it
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PNP_TRT_ENGINES": str(engines), "RAY_TMPDIR": folder, "HOME": folder,
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    line = [sys.executable, "-m", "pnp_trt", *map(str, arguments)]
    child = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        yield child
        assert not (Path(folder) / ".ray").exists()  # Ray writes nothing to the home folder
    finally:
        started = family(child)
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(90)
        left = psutil.wait_procs(started, timeout=30)[1]
        for process in left:
            process.kill()
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, left


def family(child: subprocess.Popen[str], title: str = "") -> list[psutil.Process]:
    """Return the processes that ``child`` started whose title begins with ``title``, oldest first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [p for p in psutil.Process(child.pid).children(recursive=True) if titled(p).startswith(title)]
    return []


def titled(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Wait until ``condition`` returns a true value, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


@dataclass
class Served:
    child: subprocess.Popen[str]
    url: str

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=180)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def replicas(self) -> list[psutil.Process]:
        return family(self.child, "ray::ServeReplica")

    def labels(self) -> set[str]:
        """Return the labels of the replicas that report metrics."""
        return set(re.findall(r'replica="(\w+)"', self.get("/metrics").text))


@contextlib.contextmanager
def serving(engines: Path, *options: object) -> Iterator[Served]:
    arguments = ("--port", 0, "--provider", "cpu", "--threads", 1, "--slots", 2, "--queue", 30, *options)
    with command(engines, "serve", "guided", "--ray", *arguments) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        match = re.search(r"serving at (http://127\.0\.0\.1:\d+) ", line)
        assert match, line
        yield Served(child, match[1])


@pytest.fixture(scope="module")
def loras(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_loras(micro_base, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "plugged"


@pytest.fixture(scope="module")
def served(micro_bundles: Path, loras: Path, cache: Path) -> Iterator[Served]:
    with serving(micro_bundles, "--replicas", 2, "--loras", loras, "--lora-cache", cache) as running:
        yield running


@pytest.fixture(scope="module")
def alone(micro_bundles: Path) -> Pipeline:
    return Pipeline.load(micro_bundles / "guided", provider="cpu", threads=1)


def pixels(response: httpx.Response) -> np.ndarray:
    (image,) = response.json()["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))


def request(i: int, steps: int) -> dict[str, Any]:
    return {"prompt": f"a red apple {i}", "num_inference_steps": steps, "guidance_scale": 1.0 + i % 4, "seed": i}


def is_the_pipelines(response: httpx.Response, alone: Pipeline, i: int, steps: int) -> None:
    assert response.status_code == 200, response.text
    (other,) = alone(f"a red apple {i}", steps=steps, guidance=1.0 + i % 4, seed=i)
    np.testing.assert_array_equal(pixels(response), other.pixels)


class TestServe:
    pytestmark = needs_ray

    def test_two_replicas_generate_the_pipelines_images(self, served: Served, alone: Pipeline) -> None:
        with ThreadPoolExecutor(12) as pool:
            steps = [5 + 7 * (i % 5) for i in range(24)]
            for i, answer in enumerate(pool.map(lambda i: served.post(**request(i, steps[i])), range(24))):
                is_the_pipelines(answer, alone, i, steps[i])
        assert len(served.labels()) == 2
        text = served.get("/metrics").text
        assert sum(map(float, re.findall(r"^pnp_trt_images_total{.*} (.*)$", text, re.M))) == 24
        assert text.count("# TYPE pnp_trt_images_total") == 1

    def test_errors_are_the_same_as_without_ray(self, served: Served) -> None:
        assert served.get("/healthz").json() == {"status": "ok"}
        ready = {"status": "ready", "engines": ["guided"], "lora_requests_waiting": 0}
        assert served.get("/readyz").json() == ready
        assert "<html" in served.get("/").text and served.get("/nothing").status_code == 404
        wrong = served.post(prompt="a", num_inference_steps=0)
        assert wrong.status_code == 400 and "steps" in wrong.json()["error"]["message"]
        other = httpx.get(f"{served.url}/healthz", headers={"Host": "example.org"})
        assert other.status_code == 403

    def test_ports_that_other_machines_reach_refuse_calls_without_the_token(self, served: Served) -> None:
        import grpc

        listening = [
            c.laddr for process in family(served.child) for c in process.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and not c.laddr.ip.endswith("127.0.0.1")
        ]  # fmt: skip
        assert len(listening) == 2  # one port of each replica
        for address in listening:
            with grpc.insecure_channel(f"127.0.0.1:{address.port}") as channel:
                for kind in ("HandleRequest", "HandleRequestWithRejection"):
                    with pytest.raises(grpc.RpcError) as refused:
                        channel.unary_unary(f"/ray.serve.ASGIService/{kind}")(b"", timeout=30)
                    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED

    def test_a_job_is_found_and_cancelled_on_any_replica(self, served: Served) -> None:
        for name in ("the-first-one", "the-second-one", "the-third-one"):
            with ThreadPoolExecutor(1) as pool:
                sent = pool.submit(served.post, prompt="a", num_inference_steps=1000, n=16, request_id=name)
                until(lambda name=name: served.get(f"/v1/jobs/{name}").json().get("steps_done"))
                assert httpx.delete(f"{served.url}/v1/jobs/{name}").status_code == 204
                assert sent.result().status_code == 409

    def test_web_ui_progress_and_interrupt_reach_the_replica_of_the_request(self, served: Served) -> None:
        api = f"{served.url}/sdapi/v1"
        body = {"prompt": "a", "steps": 1000, "batch_size": 16}
        for _ in range(3):
            with ThreadPoolExecutor(1) as pool:
                sent = pool.submit(httpx.post, f"{api}/txt2img", json=body, timeout=180)
                until(lambda: httpx.get(f"{api}/progress", timeout=60).json()["progress"])
                assert httpx.post(f"{api}/interrupt", timeout=60).status_code == 200
                assert sent.result().status_code == 200 and len(sent.result().json()["images"]) == 1

    def test_loras_are_offered_by_every_replica_and_merged_once(
        self, served: Served, micro_bundles: Path, loras: Path, cache: Path, tmp_path: Path
    ) -> None:
        lora = {"lora": {"name": "sepia", "scale": 0.8}}
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(served.post, **request(0, 5), **lora, request_id="the-first-lora")
            until(lambda: served.get("/v1/jobs/the-first-lora").json().get("state") == "loading")
            assert first.result().status_code == 200
        plug(PlugSpec(str(micro_bundles / "guided"), None, (f"{loras / 'sepia.safetensors'}:0.8",), tmp_path / "one"))
        alone = Pipeline.load(tmp_path / "one", provider="cpu", threads=1)
        sent = 0

        def loaded() -> bool:
            return len(re.findall(r"^pnp_trt_lora_engines{.*} 1\.0$", served.get("/metrics").text, re.M)) == 2

        while not loaded():  # until both replicas have loaded it
            assert sent < 60
            with ThreadPoolExecutor(6) as pool:
                answers = pool.map(lambda i: served.post(**request(i, 12), **lora), range(sent, sent + 6))
                for i, answer in enumerate(answers, sent):
                    is_the_pipelines(answer, alone, i, 12)
            sent += 6
        assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
        wrong = served.post(prompt="a", lora={"name": "foreign"})
        assert wrong.status_code == 400 and "cannot use the LoRA" in wrong.json()["error"]["message"]

    def test_a_client_that_disconnects_cancels_its_request(self, served: Served) -> None:
        body = {"prompt": "a", "num_inference_steps": 1000, "n": 16, "request_id": "the-left-one"}

        def leave() -> None:
            with contextlib.suppress(httpx.TimeoutException):
                httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=3)

        with ThreadPoolExecutor(1) as pool:
            left = pool.submit(leave)
            until(lambda: served.get("/v1/jobs/the-left-one").status_code == 200)
            left.result()
        until(lambda: served.get("/v1/jobs/the-left-one").status_code == 404, 5)

    def test_a_killed_replica_loses_only_its_running_requests(self, served: Served, alone: Pipeline) -> None:
        until(lambda: len(served.labels()) == 2)
        answers: dict[int, httpx.Response] = {}

        def client(mine: range) -> None:
            for i in mine:
                answers[i] = served.post(**request(i, 150))

        threads = [threading.Thread(target=client, args=(range(k, 48, 8),)) for k in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) >= 8)
        killed = served.replicas()[0]
        killed.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
        lost = [i for i, answer in answers.items() if answer.status_code != 200]
        assert 1 <= len(lost) <= 8 and len(answers) == 48  # at most one request of each client
        for i in lost:
            assert answers[i].status_code == 503 and int(answers[i].headers["Retry-After"]) <= 10
            assert "has ended; try again" in answers[i].json()["error"]["message"]
            answers[i] = served.post(**request(i, 150))
        for i, answer in answers.items():
            is_the_pipelines(answer, alone, i, 150)
        until(lambda: len(served.labels()) == 2 and killed.pid not in {p.pid for p in served.replicas()})

    def test_sigterm_finishes_running_requests_and_leaves_no_process(self, served: Served) -> None:
        started = family(served.child)
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(served.post, prompt="a", num_inference_steps=600, n=4, request_id="the-last-one")
            until(lambda: served.get("/v1/jobs/the-last-one").json().get("steps_done"))
            served.child.send_signal(signal.SIGTERM)
            answer = sent.result()
        assert answer.status_code == 200 and len(answer.json()["data"]) == 4
        assert served.child.wait(90) == 0
        assert not psutil.wait_procs(started, timeout=30)[1]


class TestGenerate:
    pytestmark = needs_ray

    def test_rows_are_generated_once_despite_a_killed_worker_and_a_killed_run(
        self, micro_bundles: Path, alone: Pipeline, tmp_path: Path
    ) -> None:
        rows = [{"prompt": f"apple {i}", "steps": 400, "seed": i} for i in range(64)]
        table, out = written(tmp_path, "rows.parquet", rows), tmp_path / "out"
        arguments = ("generate", table, "--out", out, "--engine", "guided", "--provider", "cpu", "--slots", 2,
                     "--ray", "--replicas", 2)  # fmt: skip

        def modified() -> dict[str, int]:
            return {f.name: f.stat().st_mtime_ns for f in out.glob("*.png")} if out.is_dir() else {}

        with command(micro_bundles, *arguments) as first:  # the whole run is killed after a few images
            until(lambda: len(modified()) >= 4, START)
        first_files = modified()
        assert 4 <= len(first_files) < 64
        with command(micro_bundles, *arguments) as second:
            until(lambda: len(modified()) >= len(first_files) + 4, START)
            worker = family(second, "ray::MapWorker")[0]
            worker.send_signal(signal.SIGKILL)
            before = modified()
            output = second.communicate(timeout=START)[0]
            assert second.returncode == 0 and output.startswith(f"{64 - len(first_files)} images generated"), output
        assert first.returncode != 0
        after = modified()
        assert sorted(after) == [f"{i:08d}.png" for i in range(1, 65)]
        assert before.items() <= after.items()  # no file was written again
        assert sorted(out.iterdir()) == sorted(out / name for name in after)  # and no partial file is left
        for i in (0, 31, 63):
            (one,) = alone(f"apple {i}", steps=400, seed=i)
            file = out / f"{i + 1:08d}.png"
            np.testing.assert_array_equal(np.asarray(Image.open(file)), one.pixels)
            assert read_parameters(file) == one.parameters

    def test_an_invalid_row_is_refused_before_any_image_is_generated(self, micro_bundles: Path, tmp_path: Path) -> None:
        table = written(tmp_path, "rows.jsonl", [{"prompt": "a"}, {"prompt": "b", "guidance": 30.0}])
        arguments = ("generate", table, "--out", tmp_path / "out", "--engine", "guided", "--provider", "cpu", "--ray")
        with command(micro_bundles, *arguments) as child:
            child.communicate(timeout=START)
        assert child.returncode == 2 and not list((tmp_path / "out").iterdir())


def test_replicas_without_ray_are_refused(engines: Path, cli: Callable[..., Result], tmp_path: Path) -> None:
    table = written(tmp_path, "rows.jsonl", [{"prompt": "a"}])
    for arguments in (("serve", "--replicas", 2), ("generate", table, "--out", tmp_path / "out", "--replicas", 2)):
        done = cli(*arguments)
        assert done.code == 2 and "--replicas is given without --ray; add --ray" in done.err


def test_metrics_of_replicas_are_labelled() -> None:
    from pnp_trt.serve.http.metrics import Metrics
    from pnp_trt.serve.ray.figures import merge

    texts = []
    for replica, count in (("a", 2), ("b", 3)):
        metrics = Metrics()
        metrics.images.labels("guided", "cfg").inc(count)
        texts.append((replica, metrics.text()))
    lines = merge(texts).decode().splitlines()
    for replica, count in (("a", 2), ("b", 3)):
        assert f'pnp_trt_images_total{{engine="guided",method="cfg",replica="{replica}"}} {count}.0' in lines
    assert lines.count("# TYPE pnp_trt_images_total counter") == 1
