"""A server with LoRAs: images equal those of plugged bundles, and a failing LoRA affects no other request."""

from __future__ import annotations

import gc
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from safetensors.torch import load_file

from pnp_trt.build.swap import cache
from pnp_trt.build.swap.cache import PlugCache
from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.bundle.store import Bundle, open_bundle
from pnp_trt.errors import InputError
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.serve.engine import Engine
from pnp_trt.serve.loras import LoraEngines, read_loras

from ..build.swap.lora_files import TEXT, UNET, Pair, write
from ..conftest import Result
from .conftest import Running, serving
from .test_http import HTTP, INIT, get, pixels, png, post

TXT2IMG = {"prompt": "a red apple", "steps": 3, "cfg_scale": 3.0, "seed": 4}
GENERATE = {"prompt": "a red apple", "num_inference_steps": 3, "seed": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folder(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRAs of the U-Net, of U-Net and text encoder, of another architecture, and a damaged one."""
    return make_loras(micro_base, tmp_path_factory.mktemp("loras"))


def make_loras(micro_base: Path, out: Path) -> Path:
    """Write the LoRAs to ``out``."""
    weights = load_file(micro_base / "unet" / "diffusion_pytorch_model.safetensors")
    shapes = {name: tuple(weights[f"{name}.weight"].shape) for name in UNET} | {TEXT[0]: (32, 32)}
    layers = list(UNET)
    write(out / "sepia.safetensors", "diffusers", [Pair(name, 2, 1.0) for name in layers[:8]], shapes, seed=1)
    both = [Pair(layers[9], 2, None), Pair(TEXT[0], 2, None)]
    write(out / "both v1.safetensors", "kohya", both, shapes, seed=2)
    write(out / "foreign.safetensors", "diffusers", [Pair("conv_in", 2, None)], {"conv_in": (99, 98, 3, 3)})
    (out / "damaged.safetensors").write_bytes((out / "sepia.safetensors").read_bytes()[:-100])
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "plugged"


def with_loras(folder: Path, home: Path, start: Callable[[Bundle], Engine]) -> LoraEngines:
    return LoraEngines(read_loras(folder), PlugCache(home).take, start, most=2, waiting=5)


@pytest.fixture(scope="module")
def offering(pipelines: dict[str, Pipeline], folder: Path, home: Path) -> Iterator[Running]:
    with serving(pipelines, loras=partial(with_loras, folder, home)) as running:
        yield running


@pytest.fixture(scope="module")
def sepia(micro_bundles: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The guided bundle plugged with sepia at 0.8 by the command's function."""
    out = tmp_path_factory.mktemp("alone") / "sepia"
    plug(PlugSpec(str(micro_bundles / "guided"), None, (f"{folder / 'sepia.safetensors'}:0.8",), out))
    return Pipeline.load(out, provider="cpu", threads=1)


def test_an_image_with_a_lora_equals_that_of_the_plugged_bundle(
    offering: Running, sepia: Pipeline, pipelines: dict[str, Pipeline]
) -> None:
    ((alone,), (without,)) = (
        pipeline("a red apple", steps=3, seed=4, guidance=3.0, schedule=schedule)
        for pipeline, schedule in ((sepia, None), (pipelines["guided"], None))
    )
    assert not np.array_equal(alone.pixels, without.pixels)
    answer = post(offering, "/sdapi/v1/txt2img", TXT2IMG | {"prompt": "a red apple <lora:sepia:0.8>"})
    info = json.loads(answer["info"])
    np.testing.assert_array_equal(pixels(answer["images"][0]), alone.pixels)
    assert info["prompt"] == "a red apple" and info["infotexts"][0].startswith("a red apple <lora:sepia:0.8>\n")
    assert info["sd_model_name"] == "guided"
    for lora in ({"name": "sepia", "scale": 0.8}, [{"name": "sepia", "scale": 0.8}]):
        generated = post(offering, "/v1/images/generations", GENERATE | {"lora": lora})
        np.testing.assert_array_equal(pixels(generated["data"][0]["b64_json"]), alone.pixels)
        assert generated["pnp_trt"]["images"][0] == alone.parameters | {"engine": "guided", "loras": "<lora:sepia:0.8>"}
    plain = post(offering, "/v1/images/generations", GENERATE)  # other requests are unchanged
    np.testing.assert_array_equal(pixels(plain["data"][0]["b64_json"]), without.pixels)
    text = HTTP.get(f"{offering.url}/metrics").text
    assert 'pnp_trt_lora_engines{engine="guided"} 1.0' in text and 'pnp_trt_slots{engine="guided"} 4.0' in text


def test_two_loras_and_image_to_image_through_openais_client(
    offering: Running, micro_bundles: Path, folder: Path, tmp_path: Path
) -> None:
    """LoRAs are merged in the request's order into U-Net and text encoder of the requested bundle."""
    loras = tuple(f"{folder / name}.safetensors{scale}" for name, scale in (("both v1", ":-0.5"), ("sepia", "")))
    plug(PlugSpec(str(micro_bundles / "plain"), None, loras, tmp_path / "two"))
    alone = Pipeline.load(tmp_path / "two", provider="cpu", threads=1)
    body = TXT2IMG | {
        "prompt": "<lora:both v1:-0.5><lora:sepia>a red apple",
        "override_settings": {"sd_model_checkpoint": "plain"},
    }
    answer = post(offering, "/sdapi/v1/txt2img", body)
    np.testing.assert_array_equal(
        pixels(answer["images"][0]), alone("a red apple", steps=3, seed=4, guidance=3.0)[0].pixels
    )
    client = openai.OpenAI(base_url=f"{offering.url}/v1", api_key="none", max_retries=0)
    edited = client.images.edit(
        image=("start.png", png(INIT), "image/png"), prompt="a panda", model="plain",
        extra_body={"num_inference_steps": 4, "seed": 1, "strength": 0.5, "lora": {"name": "sepia", "scale": 0.5}},
    ).data  # fmt: skip
    plug(PlugSpec(str(micro_bundles / "plain"), None, (f"{folder / 'sepia.safetensors'}:0.5",), tmp_path / "one"))
    (alone_too,) = Pipeline.load(tmp_path / "one", provider="cpu", threads=1)(
        "a panda", steps=4, seed=1, strength=0.5, init=INIT
    )
    assert edited is not None
    np.testing.assert_array_equal(pixels(edited[0].b64_json), alone_too.pixels)


def test_a_restarted_server_plugs_nothing_again(
    offering: Running, pipelines: dict[str, Pipeline], sepia: Pipeline, folder: Path, home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    body = TXT2IMG | {"prompt": "a red apple <lora:sepia:0.8>"}
    post(offering, "/sdapi/v1/txt2img", body)
    before = sorted(home.iterdir())

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was plugged again")

    monkeypatch.setattr(cache, "plug", never)
    guided = {"guided": pipelines["guided"]}
    with serving(guided, loras=partial(with_loras, folder, home)) as again:
        answer = post(again, "/sdapi/v1/txt2img", body)
    (alone,) = sepia("a red apple", steps=3, seed=4)
    np.testing.assert_array_equal(pixels(answer["images"][0]), alone.pixels)
    assert sorted(home.iterdir()) == before


def test_requests_wait_for_their_lora_while_others_are_served(
    offering: Running, pipelines: dict[str, Pipeline], folder: Path, home: Path
) -> None:
    gate, answers, created = threading.Event(), list[Any](), list[LoraEngines]()

    class Slow(PlugCache):
        def take(self, *arguments: Any) -> Any:
            assert gate.wait(60)
            return super().take(*arguments)

    def make(start: Callable[[Bundle], Engine]) -> LoraEngines:
        created.append(LoraEngines(read_loras(folder), Slow(home).take, start, most=1, waiting=2))
        return created[-1]

    def until_waiting(count: int) -> None:
        deadline = time.monotonic() + 15
        while sum(entry.users for entry in created[-1]._entries.values()) != count:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    body = TXT2IMG | {"prompt": "a red apple <lora:sepia:0.8>"}
    with serving({"guided": pipelines["guided"]}, loras=make, deadline=20.0) as server:
        send = lambda: answers.append(HTTP.post(f"{server.url}/sdapi/v1/txt2img", json=body))  # noqa: E731
        sent = [threading.Thread(target=send) for _ in range(2)]
        with pytest.raises(httpx.ReadTimeout):  # a client that disconnects occupies no place
            httpx.post(f"{server.url}/sdapi/v1/txt2img", json=body, timeout=0.2)
        until_waiting(0)
        for each in sent:
            each.start()
        until_waiting(2)
        answer = post(server, "/sdapi/v1/txt2img", TXT2IMG)
        assert answer["images"] and not answers
        full = HTTP.post(f"{server.url}/sdapi/v1/txt2img", json=body)
        assert full.status_code == 429 and int(full.headers["retry-after"]) > 0
        assert "too many requests wait" in full.json()["detail"]
        gate.set()
        for each in sent:
            each.join(60)
    assert [each.status_code for each in answers] == [200, 200]
    gate.clear()
    with serving({"guided": pipelines["guided"]}, loras=make, deadline=0.2) as server:
        late = HTTP.post(f"{server.url}/sdapi/v1/txt2img", json=body)
        assert late.status_code == 504 and "was not loaded within 0.2 s" in late.json()["detail"]
        gate.set()


def test_a_request_that_waits_for_its_lora_is_listed_and_can_be_cancelled(
    pipelines: dict[str, Pipeline], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate, answers, plugs = threading.Event(), dict[str, httpx.Response](), list[float]()

    class Slow(PlugCache):
        def take(self, bundle: Bundle, loras: Any) -> Any:
            plugs.append(loras[0][1])
            assert gate.wait(60)
            return super().take(bundle, loras)

    def make(start: Callable[[Bundle], Engine]) -> LoraEngines:
        return LoraEngines(read_loras(folder), Slow(tmp_path).take, start, most=2, waiting=9)

    def figure(server: Running) -> str:
        lines = HTTP.get(f"{server.url}/metrics").text.splitlines()
        return next(line for line in lines if line.startswith('pnp_trt_lora_requests_waiting{engine="guided"}'))

    def until(server: Running, waiting: int) -> None:
        deadline = time.monotonic() + 15
        while get(server, "/readyz")["lora_requests_waiting"] != waiting:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    with serving({"guided": pipelines["guided"]}, loras=make, deadline=60.0) as server:

        def send(name: str, path: str, body: dict[str, Any]) -> threading.Thread:
            post_it = lambda: answers.update({name: HTTP.post(f"{server.url}{path}", json=body, timeout=60)})  # noqa: E731
            thread = threading.Thread(target=post_it)
            thread.start()
            return thread

        lora = {"name": "sepia", "scale": 0.7}
        generate = partial(send, path="/v1/images/generations")
        sent = [generate("kept", body=GENERATE | {"lora": lora, "request_id": "kept-1234"})]
        until(server, 1)
        sent.append(generate("ended", body=GENERATE | {"lora": lora | {"scale": 0.6}, "request_id": "ended-1234"}))
        until(server, 2)
        assert figure(server).endswith(" 2.0")
        job = get(server, "/v1/jobs/kept-1234?preview=true")
        assert (job["state"], job["running"], job["steps_done"], job["steps"]) == ("loading", False, 0, 3)
        assert job["seconds"] > 0 and job["preview"] is None
        taken = HTTP.post(f"{server.url}/v1/images/generations", json=GENERATE | {"request_id": "kept-1234"})
        assert taken.status_code == 409
        assert post(server, "/v1/images/generations", GENERATE)["data"]  # others are served

        assert HTTP.delete(f"{server.url}/v1/jobs/ended-1234").status_code == 204
        sent[1].join(60)
        assert answers["ended"].status_code == 409 and "while its LoRA was loaded" in answers["ended"].text
        assert HTTP.get(f"{server.url}/v1/jobs/ended-1234").status_code == 404
        until(server, 1)

        sent.append(send("web", "/sdapi/v1/txt2img", TXT2IMG | {"prompt": "a <lora:sepia:0.5>"}))
        until(server, 2)
        progress = get(server, "/sdapi/v1/progress")
        assert progress["textinfo"] == "loading <lora:sepia:0.5>" and progress["state"]["job_count"] == 1
        assert (
            progress["progress"] == 0 and progress["current_image"] is None and progress["state"]["sampling_steps"] == 3
        )
        assert post(server, "/sdapi/v1/interrupt", {}) == {}
        sent[2].join(60)
        assert answers["web"].status_code == 409
        gate.set()
        sent[0].join(60)
        assert answers["kept"].status_code == 200 and answers["kept"].json()["pnp_trt"]["waited"] > 0
        assert figure(server).endswith(" 0.0")
    assert plugs == [0.7]  # nothing is plugged for cancelled requests
    gc.collect()
    assert "never retrieved" not in capsys.readouterr().err  # asyncio would log an abandoned result


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("<lora:foreign:1>", "engine 'guided' cannot use the LoRA “foreign”: the LoRA 'foreign' is for another unet"),
        ("<lora:damaged:1>", "engine 'guided' cannot use the LoRA “damaged”: 'damaged' was cut short"),
        ("<lora:../sepia:1>", "no LoRA has the name “../sepia”; this server has: both v1, damaged, foreign, sepia"),
        ("<lora:/etc/passwd>", "no LoRA has the name “/etc/passwd”"),
        ("<lora:a\x1b[31m\n:1>", "no LoRA has the name “a\\x1b[31m”"),
        (f"<lora:{'x' * 5000}:1>", "no LoRA has the name “xxxx"),
        ("<lora:sepia:nan>", "the scale of the LoRA “sepia” is nan; it must be between -100 and 100"),
        ("<lora:sepia:inf>", "is inf; it must be between"),
        ("<lora:sepia:1e9>", "is 1e+09; it must be between"),
        ("<lora:sepia:high>", "the scale in “<lora:sepia:high>” is not one number"),
        ("<lora:sepia:1:0.5>", "is not one number"),
        ("<lora::1>", "names no LoRA"),
        ("<lora:sepia:1><lora:sepia:1>", "is named twice"),
        ("<lora:sepia>" * 5, "at most 4 are merged at once"),
    ],
)
def test_an_unusable_lora_gives_a_one_sentence_error(
    offering: Running, folder: Path, home: Path, tag: str, message: str
) -> None:
    answer = post(offering, "/sdapi/v1/txt2img", TXT2IMG | {"prompt": f"a cat {tag}"}, 400)
    assert message in answer["detail"] and answer["detail"].isprintable()
    assert str(folder.parent) not in str(answer) and str(home) not in str(answer)
    assert get(offering, "/readyz")["status"] == "ready"


@pytest.mark.parametrize(
    "lora",
    [
        {"name": "../sepia"}, {"name": "x" * 300}, {"name": 5}, {"scale": 1}, "seppia", 5, {"name": "b", "path": "/"},
        {"name": "sepia", "scale": "high"}, {"name": "sepia", "scale": 1e9}, [{"name": "sepia"}] * 2, {"name": "a\0"},
    ],
)  # fmt: skip
def test_an_invalid_lora_field_is_refused(offering: Running, lora: Any) -> None:
    error = post(offering, "/v1/images/generations", GENERATE | {"lora": lora}, 400)["error"]
    assert "lora" in error["message"].lower() and error["message"].isprintable()
    for scale in (math.nan, math.inf):
        body = json.dumps(GENERATE | {"lora": {"name": "sepia", "scale": scale}})
        assert HTTP.post(f"{offering.url}/v1/images/generations", content=body).status_code == 400


def test_loras_are_listed_by_name_and_refused_by_a_server_without(offering: Running, server: Running) -> None:
    listed = get(offering, "/sdapi/v1/loras")
    assert [each["name"] for each in listed] == ["both v1", "damaged", "foreign", "sepia"]
    assert all(each["path"] == each["name"] == each["alias"] for each in listed)
    assert get(offering, "/v1/engines")["loras"] == [each["name"] for each in listed]
    assert get(server, "/sdapi/v1/loras") == [] == get(server, "/v1/engines")["loras"]
    answer = post(server, "/sdapi/v1/txt2img", TXT2IMG | {"prompt": "a cat <lora:sepia:1>"}, 400)
    assert "this server offers none; leave it out, or start the server with --loras DIR" in answer["detail"]


# -- the cache ---------------------------------------------------------------------------------------------------------
def test_the_cache_keeps_used_bundles_and_replaces_damaged_ones(
    offering: Running, micro_bundles: Path, folder: Path, home: Path, tmp_path: Path
) -> None:
    bundle, sepia = open_bundle(micro_bundles / "guided"), folder / "sepia.safetensors"
    small = PlugCache(tmp_path / "small", max_bundles=1)
    first = small.take(bundle, [(sepia, 0.8)])
    second = small.take(bundle, [(sepia, 0.9)])
    assert first.bundle.folder.is_dir() and second.bundle.folder.is_dir()  # both in use
    first.close()
    second.close()
    (second.bundle.folder / "unet.onnx.data").write_bytes(b"")
    third = small.take(bundle, [(sepia, 0.9)])
    assert third.bundle.manifest.files == second.bundle.manifest.files and not first.bundle.folder.exists()
    assert Pipeline.load(third.bundle.folder, provider="cpu")
    third.close()


def test_servers_that_share_a_cache_plug_a_bundle_once(
    micro_bundles: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks belong to open files, so threads with a cache each behave like processes."""
    bundle, outputs, real = open_bundle(micro_bundles / "guided"), [], plug

    def slow(spec: PlugSpec, **options: Any) -> Any:
        outputs.append(spec.out)
        time.sleep(0.5)  # the other one starts before this bundle exists
        return real(spec, **options)

    monkeypatch.setattr(cache, "plug", slow)
    with ThreadPoolExecutor(2) as pool:
        take = lambda _: PlugCache(tmp_path).take(bundle, [(folder / "sepia.safetensors", 0.8)])  # noqa: E731
        one, other = pool.map(take, range(2))
    assert len(outputs) == 1 and one.bundle.manifest.seal == other.bundle.manifest.seal
    one.close()
    other.close()


def test_a_replaced_bundle_and_a_remote_base_are_refused(micro_bundles: Path, folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    bundle = open_bundle(micro_bundles / "guided")
    home = PlugCache(tmp_path)
    home.check(bundle)
    other = Bundle(bundle.folder, replace(bundle.manifest, seal="0" * 64))
    with pytest.raises(InputError, match="was replaced on disk after it was loaded; restart"):
        home.take(other, [(folder / "sepia.safetensors", 1.0)])
    remote = replace(bundle.manifest, base=replace(bundle.manifest.base, name="someone/model"))
    with pytest.raises(InputError, match="add --fetch-base to download it from the hub"):
        home.check(Bundle(bundle.folder, remote))
    PlugCache(tmp_path, fetch_base=True).check(Bundle(bundle.folder, remote))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--loras", "OUT/nothing"), "--loras OUT/nothing cannot be read"),
        (("--loras", "OUT"), "has no .safetensors file; name a folder of LoRAs"),
        (("--loras", "LORAS", "--max-loras", 0), "--max-loras"),
        (("--loras", "LORAS", "--lora-cache", "LORAS/sepia.safetensors"), "--lora-cache"),
    ],
)
def test_unusable_lora_options_are_refused_at_startup(
    engines: Path, cli: Callable[..., Result], folder: Path, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    options = [str(each).replace("OUT", str(tmp_path)).replace("LORAS", str(folder)) for each in arguments]
    done = cli("serve", "guided", "--port", 0, "--provider", "cpu", *options)
    assert done.code == 2 and message.replace("OUT", str(tmp_path)) in done.err
