"""The HTTP interfaces: OpenAI's client, requests of A1111 front-ends, and requests that are refused."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from pnp_trt.runtime.images import read_parameters
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.serve.http.openai import ImagesRequest

from .conftest import Running, serving

#: shared, because every client creates a TLS context
HTTP = httpx.Client(timeout=60)
INIT = np.random.default_rng(7).integers(0, 256, (32, 32, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def pixels(data: str | None) -> np.ndarray:
    """Decode an image in base64."""
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server: Running, path: str, body: Any, status: int = 200, **options: Any) -> Any:
    answer = HTTP.post(server.url + path, json=body, **options)
    assert answer.status_code == status, answer.text
    return answer.json()


def get(server: Running, path: str) -> Any:
    answer = HTTP.get(server.url + path)
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- OpenAI's client ---------------------------------------------------------------------------------------------------
def test_openai_images_equal_those_of_the_pipeline(
    client: openai.OpenAI, pipelines: dict[str, Pipeline], tmp_path: Path
) -> None:
    more = {"num_inference_steps": 3, "seed": 5, "guidance_scale": 2.5, "schedule": "dpm++"}
    response = client.images.generate(prompt="a red apple", model="guided", n=2, size="32x32", extra_body=more)
    alone = pipelines["guided"](["a red apple"] * 2, steps=3, seed=[5, 6], guidance=2.5, schedule="dpm++")
    assert response.data is not None and len(response.data) == 2
    for one, other in zip(response.data, alone, strict=True):
        np.testing.assert_array_equal(pixels(one.b64_json), other.pixels)
        file = tmp_path / f"{other.parameters['seed']}.png"
        file.write_bytes(base64.b64decode(one.b64_json or ""))
        assert read_parameters(file) == other.parameters
    address = client.images.generate(
        prompt="a red apple", response_format="url", output_format="webp", extra_body=more
    ).data
    assert address is not None and (address[0].url or "").startswith("data:image/webp;base64,")
    np.testing.assert_array_equal(pixels((address[0].url or "").partition(",")[2]), alone[0].pixels)
    assert [model.id for model in client.models.list()] == ["guided", "plain"]


def test_ignored_fields_are_listed_in_the_response(server: Running) -> None:
    body = {"prompt": "a cat", "num_inference_steps": 1, "quality": "hd", "num_inference_step": 3, "user": None}
    answer = post(server, "/v1/images/generations", body)["pnp_trt"]
    assert answer["ignored"] == ["num_inference_step", "quality", "user"] and answer["evaluations"] == 1
    assert post(server, "/v1/images/generations", {"prompt": "a cat", "n": 1})["pnp_trt"]["ignored"] == []
    many = {f"\x1b{i:03}{'x' * 300}": i for i in range(100)}
    listed = post(server, "/v1/images/generations", body | many)["pnp_trt"]["ignored"]
    assert len(listed) == 32 and all(len(name) <= 200 and name.isprintable() for name in listed)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("application/x-www-form-urlencoded", "sent as “application/x-www-form-urlencoded”; send JSON"),
     ("", "sent without a type; send JSON"), ("application/json", "prompt: Field required")],
)  # fmt: skip
def test_a_body_of_another_content_type_is_refused(server: Running, kind: str, message: str) -> None:
    body = b'{"prompt": "a cat"}' if "json" not in kind else b"{}"  # as curl's -d sends it without a header
    answer = HTTP.post(f"{server.url}/v1/images/generations", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_a_lora_given_by_name_has_scale_one() -> None:
    request = ImagesRequest.model_validate({"prompt": "a cat", "lora": ["one", {"name": "two", "scale": 0.5}]})
    assert [(lora.name, lora.scale) for lora in request.lora or ()] == [("one", 1.0), ("two", 0.5)]
    assert ImagesRequest.model_validate({"prompt": "a cat", "lora": "one"}).lora == (request.lora or [])[:1]


def test_openai_edits_are_image_to_image(client: openai.OpenAI, pipelines: dict[str, Pipeline]) -> None:
    edited = client.images.edit(
        image=("start.png", png(INIT), "image/png"), prompt="a panda", model="plain",
        extra_body={"num_inference_steps": 4, "seed": 1, "strength": 0.5, "guidance_scale": 4},
    ).data  # fmt: skip
    (alone,) = pipelines["plain"]("a panda", steps=4, seed=1, strength=0.5, guidance=4.0, init=INIT)
    assert edited is not None
    np.testing.assert_array_equal(pixels(edited[0].b64_json), alone.pixels)
    with pytest.raises(openai.BadRequestError, match="has no VAE encoder"):
        client.images.edit(image=png(INIT), prompt="a panda", model="guided")
    with pytest.raises(openai.BadRequestError, match="is not an image that can be read"):
        client.images.edit(image=b"GIF? no", prompt="a panda", model="plain")
    with pytest.raises(openai.BadRequestError, match="inpainting is not offered"):
        client.images.edit(image=png(INIT), mask=png(INIT), prompt="a panda", model="plain")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"extra_body": {"guidance_scale": 99}}, "guidance is 99; it must be between 1 and 9"),
        ({"extra_body": {"num_inference_steps": 0}}, "steps is 0; it must be between 1 and 1000"),
        ({"extra_body": {"method": "cfg-interval"}}, "cannot do 'cfg-interval' step by step"),
        ({"extra_body": {"schedule": "nonsense"}}, "known: "),
        ({"size": "512x512"}, "size is 512x512"),
        ({"size": "big"}, "size is “big”; write WIDTHxHEIGHT"),
        ({"n": 17}, "n: Input should be less than or equal to 16"),
        ({"prompt": "x" * 10_001}, "prompt: String should have at most 10000 characters"),
        ({"extra_body": {"seed": -3}}, "seed is -3"),
        ({"extra_body": {"seed": 2**80}}, "seed is "),
        ({"extra_body": {"stream": True}}, "stream is true"),
        ({"extra_body": {"prompt": ["a", "b"]}}, "prompt: Input should be a valid string"),
    ],
)
def test_openai_refusals_are_one_sentence(client: openai.OpenAI, given: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**{"prompt": "a cat", **given})
    body = refused.value.body
    assert isinstance(body, dict) and message in body["message"] and "\n" not in body["message"]


def test_openai_errors_for_an_unknown_model_and_a_full_queue(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has: guided, plain"):
        client.images.generate(prompt="a cat", model="dall-e-3")
    with server.standing():
        busy = threading.Thread(
            target=client.images.generate, kwargs={"prompt": "a cat", "n": 6, "extra_body": {"num_inference_steps": 2}}
        )
        busy.start()
        server.wait_for(1)
        with pytest.raises(openai.RateLimitError, match="6 images in its queue and room for 6") as refused:
            client.images.generate(prompt="a cat")
        assert int(refused.value.response.headers["retry-after"]) >= 1
    busy.join(60)
    # with its own retries, the client waits and tries again
    assert client.with_options(max_retries=2).images.generate(prompt="a cat", extra_body={"num_inference_steps": 1})


def test_a_negative_prompt_that_the_guide_cannot_take_is_served_by_cfg(server: Running) -> None:
    body = {"prompt": "a cat", "negative_prompt": "blue", "num_inference_steps": 2, "seed": 1}
    answer = post(server, "/v1/images/generations", body)["pnp_trt"]
    assert answer["images"][0]["method"] == "cfg" and answer["evaluations"] == 4
    assert post(server, "/v1/images/generations", body | {"negative_prompt": ""})["pnp_trt"]["evaluations"] == 2
    assert "takes no negative prompt" in str(post(server, "/v1/images/generations", body | {"method": "guided"}, 400))


def test_a_job_is_watched_and_cancelled_by_the_clients_id(server: Running) -> None:
    answers: list[Any] = []
    body = {"prompt": "a cat", "num_inference_steps": 400, "request_id": "mine-0001"}
    with server.standing():
        sent = threading.Thread(
            target=lambda: answers.append(HTTP.post(f"{server.url}/v1/images/generations", json=body))
        )
        sent.start()
        server.wait_for(1)
        assert "is running; choose another" in str(post(server, "/v1/images/generations", body, 409))
        job = get(server, "/v1/jobs/mine-0001")
        assert job["running"] and 1 <= job["steps_done"] < job["steps"] == 400 and job["preview"] is None
        server.gate.set()
        (listed,) = get(server, "/v1/jobs?id=mine-0001")["jobs"]
        assert (listed["id"], listed["steps"], listed["state"]) == ("mine-0001", 400, "running")
        preview = get(server, "/v1/jobs/mine-0001?preview=true")["preview"]
        assert pixels(preview.partition(",")[2]).shape == (32, 32, 3)
        assert HTTP.delete(f"{server.url}/v1/jobs/mine-0001").status_code == 204
    sent.join(60)
    assert answers[0].status_code == 409 and "cancelled after" in answers[0].json()["error"]["message"]
    server.wait_for(0)
    assert HTTP.get(f"{server.url}/v1/jobs/mine-0001").status_code == 404
    assert get(server, "/v1/jobs?id=mine-0001") == {"jobs": []}
    assert HTTP.get(f"{server.url}/v1/jobs").status_code == 400  # clients cannot list others' requests


# -- A1111's front-ends ------------------------------------------------------------------------------------------------
#: request bodies from the clients' sources
OPEN_WEBUI = {"prompt": "a red apple", "batch_size": 1, "width": 32, "height": 32, "steps": 3, "negative_prompt": "",
              "sampler_name": "DPM++ 2M", "scheduler": "Karras", "cfg_scale": 3.0}  # fmt: skip
SILLY_TAVERN = {
    "prompt": "a red apple", "negative_prompt": "", "sampler_name": "Euler", "scheduler": "Automatic", "steps": 3,
    "cfg_scale": 3, "width": 32, "height": 32, "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent",
    "hr_scale": 1, "hr_additional_modules": [], "denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": 11,
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic", "forge_additional_modules": []},
    "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True, "send_images": True,
    "do_not_save_grid": False, "do_not_save_samples": False,
}  # fmt: skip
LIBRE_CHAT = {"prompt": "a red apple", "negative_prompt": "", "cfg_scale": 4.5, "steps": 4, "width": 32, "height": 32}


@pytest.mark.parametrize(
    "body", [OPEN_WEBUI, SILLY_TAVERN, LIBRE_CHAT], ids=["open-webui", "silly-tavern", "libre-chat"]
)
def test_a1111_requests_of_public_clients_are_served(
    server: Running, pipelines: dict[str, Pipeline], body: dict[str, Any]
) -> None:
    answer = post(server, "/sdapi/v1/txt2img", body)
    info = json.loads(answer["info"])
    (alone,) = pipelines["guided"](
        body["prompt"], steps=body["steps"], guidance=body["cfg_scale"], seed=info["seed"],
        schedule=f"{body.get('sampler_name', 'DDIM')} {body.get('scheduler', 'Automatic')}", prompt_syntax="a1111",
    )  # fmt: skip
    np.testing.assert_array_equal(pixels(answer["images"][0]), alone.pixels)
    assert info["seed"] == body.get("seed", info["seed"]) and info["all_seeds"] == [info["seed"]]
    assert ("clip_skip" in body) == ("clip_skip" in info["ignored"]) == ("sd_vae" in info["ignored"])
    assert "steps" not in info["ignored"] and "clip_skip" not in answer["parameters"]
    assert f"Steps: {body['steps']}, " in info["infotexts"][0] and answer["parameters"]["prompt"] == body["prompt"]
    parsed = post(server, "/sdapi/v1/png-info", {"image": f"data:image/png;base64,{answer['images'][0]}"})
    assert parsed["info"] == info["infotexts"][0] == parsed["items"]["parameters"]
    assert parsed["parameters"]["Prompt"] == "a red apple" and parsed["parameters"]["Seed"] == str(info["seed"])


def test_a1111_image_to_image_and_the_model_of_a_request(server: Running, pipelines: dict[str, Pipeline]) -> None:
    body = {"prompt": "a panda", "steps": 4, "cfg_scale": 4, "seed": 1, "denoising_strength": 0.5, "n_iter": 2,
            "init_images": [base64.b64encode(png(INIT)).decode()],
            "override_settings": {"sd_model_checkpoint": get(server, "/sdapi/v1/sd-models")[1]["title"]}}  # fmt: skip
    images = post(server, "/sdapi/v1/img2img", body)["images"]
    alone = pipelines["plain"](["a panda"] * 2, steps=4, seed=[1, 2], strength=0.5, guidance=4.0, init=INIT)
    for one, other in zip(images, alone, strict=True):
        np.testing.assert_array_equal(pixels(one), other.pixels)


def test_a1111_options_choose_the_model_and_lists_are_available(server: Running) -> None:
    assert get(server, "/sdapi/v1/options")["sd_model_checkpoint"] == "guided"
    assert post(server, "/sdapi/v1/options", {"sd_model_checkpoint": "plain", "CLIP_stop_at_last_layers": 2}) == {}
    try:
        assert get(server, "/sdapi/v1/options")["sd_model_checkpoint"] == "plain"
        info = json.loads(post(server, "/sdapi/v1/txt2img", OPEN_WEBUI)["info"])
        assert info["sd_model_name"] == "plain" and info["method"] == "cfg"
        assert "this server has" in str(post(server, "/sdapi/v1/options", {"sd_model_checkpoint": "no"}, 404))
    finally:
        post(server, "/sdapi/v1/options", {"sd_model_checkpoint": "guided"})
    names = [sampler["name"] for sampler in get(server, "/sdapi/v1/samplers")]
    assert {"DDIM", "Euler", "DPM++ 2M"} <= set(names) and all(
        {"name", "aliases", "options"} == set(each) for each in get(server, "/sdapi/v1/samplers")
    )
    for path in ("loras", "schedulers", "upscalers", "sd-vae", "embeddings", "prompt-styles", "hypernetworks",
                 "latent-upscale-modes", "face-restorers", "scripts", "script-info", "cmd-flags"):  # fmt: skip
        get(server, f"/sdapi/v1/{path}")
    assert post(server, "/sdapi/v1/refresh-checkpoints", {}) == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"enable_hr": True}, "enable_hr is set and not offered here"),
        ({"sampler_name": "Euler a"}, "the sampler 'Euler a' adds noise at every step"),
        ({"batch_size": 5, "n_iter": 5}, "batch_size times n_iter is 25"),
        ({"height": None}, "one of width and height is missing"),
        ({"cfg_scale": 30}, "guidance is 30"),
        ({"steps": 100_000}, "steps is 100000"),
    ],
)
def test_a1111_errors_have_its_own_form(server: Running, more: dict[str, Any], message: str) -> None:
    answer = post(server, "/sdapi/v1/txt2img", OPEN_WEBUI | more, 400)
    assert message in answer["detail"] == answer["errors"] and set(answer) == {"error", "detail", "body", "errors"}


@pytest.mark.parametrize("image", ["/etc/passwd", "http://127.0.0.1:1/a.png", "file:///etc/passwd", "", "%%%", "AAAA"])
def test_no_path_or_url_of_a_client_is_opened(server: Running, image: str) -> None:
    body = OPEN_WEBUI | {"init_images": [image], "override_settings": {"sd_model_checkpoint": "plain"}}
    answer = post(server, "/sdapi/v1/img2img", body, 400)
    assert "image" in answer["detail"] and "root:" not in str(answer)
    post(server, "/sdapi/v1/png-info", {"image": image}, 400)


def test_a1111_progress_and_interrupt(server: Running) -> None:
    assert get(server, "/sdapi/v1/progress")["progress"] == 0
    answers: list[Any] = []
    with server.standing():
        send = lambda: answers.append(HTTP.post(f"{server.url}/sdapi/v1/txt2img", json=OPEN_WEBUI | {"steps": 500}))  # noqa: E731
        sent = threading.Thread(target=send)
        sent.start()
        server.wait_for(1)
        progress = get(server, "/sdapi/v1/progress?skip_current_image=true")
        assert (
            0 < progress["progress"] < 1
            and progress["state"]["sampling_steps"] == 500
            and progress["current_image"] is None
        )
        server.gate.set()
        assert pixels(get(server, "/sdapi/v1/progress")["current_image"]).shape == (32, 32, 3)
        post(server, "/sdapi/v1/interrupt", {})
    sent.join(60)
    assert answers[0].status_code == 200 and pixels(answers[0].json()["images"][0]).shape == (32, 32, 3)
    server.wait_for(0)


# -- the server itself -------------------------------------------------------------------------------------------------
def test_health_metrics_and_page(server: Running) -> None:
    assert get(server, "/healthz") == {"status": "ok"} and get(server, "/readyz")["engines"] == ["guided", "plain"]
    post(server, "/v1/images/generations", {"prompt": "a cat", "num_inference_steps": 2})
    text = HTTP.get(f"{server.url}/metrics").text
    for name in ('pnp_trt_requests_total{engine="guided",status="200"}', "pnp_trt_call_seconds_bucket",
                 'pnp_trt_rows_total{engine="guided",kind="used"}', 'pnp_trt_slots{engine="guided"} 2.0',
                 'pnp_trt_images_waiting{engine="guided"} 0.0', "pnp_trt_admission_seconds"):  # fmt: skip
        assert name in text, text
    page = HTTP.get(f"{server.url}/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("style.css", "app.js"):
        assert HTTP.get(f"{server.url}/page/{name}").status_code == 200
    for name in ("__init__.py", "..%2fapp.py", "nothing.css", "x" * 5000):
        assert HTTP.get(f"{server.url}/page/{name}").status_code == 404
    assert HTTP.get(f"{server.url}/docs").status_code == 404
    assert post(server, "/v1/models", {}, 405)["error"]["type"] == "invalid_request_error"


def test_another_host_another_origin_and_a_large_body_are_refused(server: Running) -> None:
    assert HTTP.get(server.url, headers={"Host": "evil.example"}).status_code == 403
    answer = HTTP.post(f"{server.url}/sdapi/v1/interrupt", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403 and "a page of another site" in answer.json()["detail"]
    assert HTTP.post(f"{server.url}/sdapi/v1/interrupt", headers={"Origin": server.url}).status_code == 200
    large = HTTP.post(f"{server.url}/v1/images/generations", content=b"x" * ((12 << 20) + 1))
    assert large.status_code == 413 and "more than 12 MiB" in large.json()["error"]["message"]
    bomb = io.BytesIO()
    Image.new("1", (5_000, 5_000)).save(bomb, "PNG")
    text = str(post(server, "/sdapi/v1/png-info", {"image": base64.b64encode(bomb.getvalue()).decode()}, 400))
    assert "more than 16,777,216 pixels" in text


def test_an_api_key_is_required_and_interfaces_can_be_disabled(pipelines: dict[str, Pipeline]) -> None:
    guided = {"guided": pipelines["guided"]}
    with serving(guided, body_seconds=0.3, api_key="secret", apis=("openai",), deadline=0.05, local=False) as server:
        for key, status in (("wrong", 401), ("secret", 200)):
            for headers in ({"Authorization": f"Bearer {key}"}, httpx.BasicAuth("any", key)):
                more = {"headers": headers} if isinstance(headers, dict) else {"auth": headers}
                assert HTTP.get(f"{server.url}/v1/models", **more).status_code == status
        for path, status in (("/", 200), ("/healthz", 200), ("/metrics", 401), ("/sdapi/v1/samplers", 401)):
            assert HTTP.get(server.url + path).status_code == status
        known = {"Authorization": "Bearer secret"}
        assert HTTP.get(f"{server.url}/sdapi/v1/samplers", headers=known).status_code == 404
        late = HTTP.post(f"{server.url}/v1/images/generations", headers=known,
                          json={"prompt": "a cat", "num_inference_steps": 1000})  # fmt: skip
        assert late.status_code == 504 and "was not done within 0.05 s" in late.json()["error"]["message"]

        def slowly() -> Any:
            yield b'{"prompt": '
            time.sleep(0.6)
            yield b'"a cat"}'

        slow = HTTP.post(f"{server.url}/v1/images/generations", headers=known, content=slowly())
        assert slow.status_code == 408 and "did not arrive within 0.3 s" in slow.json()["error"]["message"]
