"""Prompts of several chunks, and starting images of several sizes.

Oracles: AUTOMATIC1111's published rules for chunks, transformers' text encoder and diffusers' pipelines.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.bundle.store import open_bundle
from pnp_trt.errors import InputError
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.runtime.prompt_syntax import apply_weights, cut_chunks, weighted_parts
from pnp_trt.runtime.verify import verify
from pnp_trt.serve.engine import Engine

from ..build.swap.lora_files import UNET, Pair, write
from ..bundles import document, reseal
from ..conftest import once

COMMA = 267
#: 90 tokens: one chunk and a part of another
LONG = "a red apple and a green pear " * 12 + ", on a table"


def make_wide(base: Path, folder: Path) -> None:
    """Build a bundle without a guide for three chunks, several sizes and starting images."""
    build(BuildSpec(str(base), "none", out=folder, image_to_image=True, tokens=231, profiles=("b1@16-48",)))


def make_guided(base: Path, guide: Path, folder: Path) -> None:
    """Build a bundle with a guide for two chunks."""
    build(BuildSpec(str(base), str(guide), out=folder, tokens=154))


@pytest.fixture(scope="module")
def wide(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = once(tmp_path_factory, "chunks/wide", partial(make_wide, micro_base))
    return Pipeline.load(folder, provider="cpu")


@pytest.fixture(scope="module")
def guided(micro_base: Path, micro_guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = once(tmp_path_factory, "chunks/guided", partial(make_guided, micro_base, micro_guide))
    return Pipeline.load(folder, provider="cpu")


# -- the rules -----------------------------------------------------------------------------------------------------


def by_the_rules(section: list[int], length: int) -> list[list[int]]:
    """Cut one section into chunks by the published rules."""
    out, rest = [], section
    while len(rest) > length:
        commas = [i for i in range(length - 20, length) if rest[i] == COMMA]
        cut = commas[-1] + 1 if commas and rest[length] != COMMA else length
        out.append(rest[:cut])
        rest = rest[cut:]
    return [*out, rest]


ids = st.lists(st.sampled_from([COMMA, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]), max_size=200)


@given(st.lists(ids, min_size=1, max_size=3), st.sampled_from([30, 75]))
def test_chunks_follow_the_published_rules(sections: list[list[int]], length: int) -> None:
    expected = [chunk for section in sections for chunk in by_the_rules(section, length)]
    if len(expected) > 1 and not sections[-1]:
        expected.pop()  # nothing follows the last BREAK
    flat = [token for section in sections for token in section]
    chunks = cut_chunks(sections, length, COMMA)
    assert [[flat[place] for place in chunk] for chunk in chunks] == expected
    assert [place for chunk in chunks for place in chunk] == list(range(len(flat)))
    assert cut_chunks(sections, length, None) == cut_chunks(sections, length, 9999)


def test_break_begins_a_section_and_brackets_continue_after_it() -> None:
    assert weighted_parts("a BREAK b") == [[("a", 1.0)], [("b", 1.0)]]
    assert weighted_parts("BREAK a BREAK") == [[], [("a", 1.0)], []]
    assert weighted_parts("(a BREAK b:1.5)\nBREAK c") == [[("a", 1.5)], [("b", 1.5)], [("c", 1.0)]]
    assert weighted_parts("BREAKFAST, a BREAKS b") == [[("BREAKFAST, a BREAKS b", 1.0)]]


# -- text states ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(micro_base: Path) -> Any:
    """The teacher as a diffusers pipeline."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(micro_base, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encoded(pipe: Any, *chunks: str) -> np.ndarray:
    """Return text states ``[1, 77·n, D]`` of chunks that transformers encodes one by one."""
    rows = []
    for chunk in chunks:
        tokens = pipe.tokenizer(chunk, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        with torch.no_grad():
            rows.append(pipe.text_encoder(tokens.input_ids)[0].numpy())
    return np.concatenate(rows, axis=1)


def test_states_are_the_concatenated_states_of_the_chunks(wide: Pipeline, reference: Any) -> None:
    states = np.asarray(wide.encode(["a red apple BREAK on a (table:1.0)"], "a1111"))
    np.testing.assert_allclose(states, encoded(reference, "a red apple", "on a table"), rtol=0, atol=1e-5)
    # there is no comma in the first 75 tokens, so the first chunk takes all of them
    assert np.asarray(wide.encode([LONG], "a1111")).shape[1] == 154
    first = "a red apple and a green pear " * 10 + "a red apple and a"
    second = "green pear a red apple and a green pear , on a table"
    np.testing.assert_allclose(
        np.asarray(wide.encode([LONG], "a1111")), encoded(reference, first, second), rtol=0, atol=1e-5
    )
    # a chunk ends at a comma among the last 20 of its 75 tokens
    head, tail = (
        "a red apple and a green pear " * 9 + ",",
        "one two three four five six seven eight nine ten eleven twelve",
    )
    assert len(reference.tokenizer(f"{head} {tail}").input_ids) - 2 == 76
    np.testing.assert_allclose(
        np.asarray(wide.encode([f"{head} {tail}"], "a1111")), encoded(reference, head, tail), rtol=0, atol=1e-5
    )


def test_weights_scale_each_chunk_separately(wide: Pipeline, reference: Any) -> None:
    states = np.asarray(wide.encode(["a red apple BREAK on a (table:1.4)"], "a1111"))[0]
    plain = encoded(reference, "a red apple", "on a table")[0]
    np.testing.assert_allclose(states[:77], plain[:77], rtol=0, atol=1e-5)
    weights = np.ones(77)
    weights[3] = 1.4  # start, on, a, table
    np.testing.assert_allclose(states[77:], apply_weights(plain[77:], weights), rtol=0, atol=1e-5)


def test_shorter_prompts_are_padded_with_empty_chunks(wide: Pipeline, reference: Any) -> None:
    states = np.asarray(wide.encode(["a cat", LONG], "a1111"))
    assert states.shape[:2] == (2, 154)
    np.testing.assert_allclose(states[:1], encoded(reference, "a cat", ""), rtol=0, atol=1e-5)


def test_sdxl_chunks_use_both_text_encoders_and_the_first_pooled_text(micro_sdxl: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    spec = BuildSpec(
        str(micro_sdxl), "none", "torch", out=tmp_path / "xl", tokens=154, image_to_image=True, profiles=("b1@16-32",)
    )
    build(spec)
    ours = Pipeline.load(tmp_path / "xl", provider="cpu")
    theirs = StableDiffusionXLPipeline.from_pretrained(micro_sdxl, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    with torch.no_grad():
        first, second, empty = (
            theirs.encode_prompt(t, do_classifier_free_guidance=False) for t in ("a red apple", "on a table", "")
        )
        noise = ours.noise([4])
        text = ours.encode(["a red apple BREAK on a table"], "a1111")
        states, pooled = torch.cat([first[0], second[0]], dim=1), first[2]
        np.testing.assert_allclose(text.states, states.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(text.added["text_embeds"], pooled.numpy(), rtol=0, atol=1e-4)
        image = theirs(
            prompt_embeds=states, pooled_prompt_embeds=pooled, negative_prompt_embeds=torch.zeros_like(states),
            negative_pooled_prompt_embeds=torch.zeros_like(pooled), num_inference_steps=3, guidance_scale=3.0,
            latents=torch.from_numpy(noise), output_type="latent",
        ).images.numpy()  # fmt: skip
    # without a negative prompt SDXL reads zeros
    latents = ours.denoise(text, noise, steps=3, guidance=3.0)
    np.testing.assert_allclose(latents, image, rtol=0, atol=1e-4 * np.abs(image).max())
    start_image = np.random.default_rng(3).integers(0, 256, (32, 16, 3), np.uint8)
    pixels = torch.from_numpy(start_image).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        clean = theirs.vae.encode(pixels).latents * theirs.vae.config.scaling_factor
    np.testing.assert_allclose(ours.encode_image(start_image[None]), clean.numpy(), rtol=0, atol=1e-4)
    assert ours("a cat", steps=2, size=(32, 16), init=start_image)[0].pixels.shape == (32, 16, 3)
    short = ours.encode(["a red apple", "a BREAK b"], "a1111")[:1]
    np.testing.assert_allclose(short.states[:, 77:], empty[0].numpy(), rtol=0, atol=1e-4)


# -- images --------------------------------------------------------------------------------------------------------


def test_images_of_long_prompts_equal_those_of_diffusers(wide: Pipeline, reference: Any) -> None:
    noise = wide.noise([4])
    prompt, negative = "a red apple BREAK on a table", "blurred BREAK dark BREAK grey"
    latents = wide.denoise(
        wide.encode([prompt, negative], "a1111")[:1], noise, steps=5, guidance=3.0,
        negative=wide.encode([negative], "a1111"),
    )  # fmt: skip
    theirs = reference(
        prompt_embeds=torch.from_numpy(encoded(reference, "a red apple", "on a table", "")),
        negative_prompt_embeds=torch.from_numpy(encoded(reference, "blurred", "dark", "grey")),
        num_inference_steps=5, guidance_scale=3.0, latents=torch.from_numpy(noise), output_type="latent",
    ).images.numpy()  # fmt: skip
    shorter = wide.denoise(
        wide.encode([prompt], "a1111"), noise, steps=5, guidance=3.0, negative=wide.encode([negative], "a1111")
    )
    assert np.array_equal(latents, shorter)
    np.testing.assert_allclose(latents, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    image = wide(prompt, negative=negative, steps=5, guidance=3.0, seed=4, prompt_syntax="a1111")[0]
    assert np.array_equal(image.pixels, wide.decode(latents)[0])


@pytest.mark.parametrize("name", ["wide", "guided"])
def test_no_image_depends_on_other_prompts(name: str, request: pytest.FixtureRequest) -> None:
    pipe: Pipeline = request.getfixturevalue(name)
    prompts = [LONG, "a cat", "a red apple BREAK on a table", "a dog"]
    progress: list[tuple[int, int]] = []
    common: dict[str, Any] = {"steps": 3, "guidance": 3.0, "prompt_syntax": "a1111"}
    together = pipe(prompts, seed=[1, 2, 3, 4], callback=lambda i, n: progress.append((i, n)), **common)
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, seed=i + 1, **common)[0]
        assert together[i].parameters == alone.parameters
        # equal batches give equal bits; others may differ by one level
        assert np.abs(together[i].pixels.astype(int) - alone.pixels).max() <= 1
    assert progress[-1][0] == progress[-1][1] and [i for i, _ in progress] == list(range(1, len(progress) + 1))


def test_prompts_of_one_chunk_give_the_images_of_an_engine_for_one(wide: Pipeline, micro_bundles: Path) -> None:
    usual = Pipeline.load(micro_bundles / "plain", provider="cpu")
    for syntax in ("plain", "a1111"):
        a, b = (p("a red apple", steps=3, prompt_syntax=syntax)[0].pixels.astype(int) for p in (wide, usual))
        assert np.abs(a - b).max() <= 1
    with pytest.warns(UserWarning, match=r"has 90 tokens and was cut to 77; dropped: “.*, on a table”"):
        cut = wide(LONG, steps=1)[0]
    assert cut.parameters["dropped"].endswith(", on a table")
    assert np.asarray(wide.encode(["a cat"])).shape[1] == 77


def test_warnings_and_parameters_state_what_was_cut(wide: Pipeline, guided: Pipeline, micro_bundles: Path) -> None:
    with pytest.warns(UserWarning, match=r"has 4 chunks of 77 tokens and was cut to 3; dropped: “d \(x\)”"):
        image = wide(r"a BREAK b BREAK c BREAK d \(x\)", steps=1, prompt_syntax="a1111", negative="e")[0]
    assert image.parameters["dropped"] == "d (x)" and "negative_dropped" not in image.parameters
    with pytest.warns(UserWarning, match="has 4 chunks of 77 tokens and was cut to 2; dropped: “b BREAK c”") as caught:
        guided.encode([f"{LONG} BREAK b BREAK c"], "a1111")
    assert len(caught) == 1
    usual = Pipeline.load(micro_bundles / "plain", provider="cpu")
    with pytest.warns(UserWarning, match="BREAK in a prompt is read as a space: .* build it with --tokens 154"):
        spaced = usual("a BREAK b", steps=1, prompt_syntax="a1111")[0]
    assert np.array_equal(spaced.pixels, usual("a b", steps=1, prompt_syntax="a1111")[0].pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "dropped" not in wide("a BREAK b", steps=1, prompt_syntax="a1111")[0].parameters


def test_given_states_may_have_several_chunks(wide: Pipeline) -> None:
    states = wide.encode([LONG], "a1111")
    usual, from_states = wide(LONG, steps=2, prompt_syntax="a1111")[0], wide("x", steps=2, context=states)[0]
    assert np.array_equal(usual.pixels, from_states.pixels)
    longer = wide(LONG, steps=2, negative="a BREAK b BREAK c", prompt_syntax="a1111")[0]
    same = wide("x", steps=2, context=states, negative="a BREAK b BREAK c", prompt_syntax="a1111")[0]
    assert np.array_equal(longer.pixels, same.pixels)
    shapes = r"\[1, 77, 32\] or \[1, 154, 32\] or \[1, 231, 32\]"
    with pytest.raises(InputError, match=rf"^context is float32 of shape \[1, 100, 32\]; pass .* {shapes}$"):
        wide("x", steps=2, context=np.zeros((1, 100, 32), np.float32))


def test_served_images_equal_those_of_the_pipeline(wide: Pipeline, guided: Pipeline) -> None:
    white = np.full((48, 16, 3), 255, np.uint8)
    for pipe in (wide, guided):
        requests: list[dict[str, Any]] = [
            {"prompts": prompt, "seed": i, "steps": 3 + i, "prompt_syntax": "a1111"}
            for i, prompt in enumerate(["a cat", LONG, "a red apple BREAK on a table", "a dog"])
        ]
        if pipe is wide:
            requests += [
                {"prompts": "a cat", "seed": 9, "steps": 4, "size": (48, 16), "init": white, "strength": 0.5},
                {
                    "prompts": "a cat",
                    "seed": 9,
                    "steps": 4,
                    "size": (48, 16),
                    "negative": LONG,
                    "prompt_syntax": "a1111",
                },
            ]
        engine = Engine(pipe, slots=6)
        jobs = [engine.submit(pipe.prepare(**request)) for request in requests]
        for request, job in zip(requests, jobs, strict=True):
            (served,) = job.future.result(120)
            (alone,) = pipe(**request)
            assert served.parameters == alone.parameters and np.array_equal(served.pixels, alone.pixels)
        assert engine.stop()


@pytest.mark.parametrize("size", [(16, 48), (48, 32), (32, 32)])
def test_image_to_image_at_several_sizes_equals_that_of_diffusers(
    size: tuple[int, int], wide: Pipeline, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as module

    start_image = np.random.default_rng(3).integers(0, 256, (*size, 3), np.uint8)
    noise = wide.noise([4], size)
    table = wide.schedule(10, "ddim").start(0.6)
    latents = wide.denoise(
        wide.encode(["a cat"]),
        noise,
        steps=10,
        guidance=3.0,
        schedule=table,
        image=wide.encode_image(start_image[None]),
    )
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(noise))
    parts = {name: part for name, part in reference.components.items() if name != "scheduler"}
    scheduler = DDIMScheduler.from_config(reference.scheduler.config, timestep_spacing="trailing")
    pipe = StableDiffusionImg2ImgPipeline(**parts, scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a cat", image=Image.fromarray(start_image), strength=0.6, num_inference_steps=10, guidance_scale=3.0,
        output_type="latent",
    ).images.numpy()  # fmt: skip
    np.testing.assert_allclose(latents, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    image = wide("a cat", steps=10, guidance=3.0, schedule="ddim", seed=4, size=size, init=start_image, strength=0.6)[0]
    assert np.array_equal(image.pixels, wide.decode(latents)[0]) and image.pixels.shape[:2] == size


def test_a_starting_image_is_resized_to_the_requested_size(wide: Pipeline) -> None:
    white = np.full((32, 32, 3), 255, np.uint8)
    with pytest.warns(UserWarning, match="was resized to the engine's 16 × 48"):
        resized = wide("a cat", steps=4, size=(48, 16), init=white, strength=0.25)[0]
    exact = wide("a cat", steps=4, size=(48, 16), init=np.full((48, 16, 3), 255, np.uint8), strength=0.25)[0]
    assert np.array_equal(resized.pixels, exact.pixels)


def test_openvino_takes_every_number_of_tokens(wide: Pipeline) -> None:
    pytest.importorskip("openvino")
    from pnp_trt.backends.base import LoadOptions
    from pnp_trt.backends.openvino.backend import OpenVino

    record = wide.bundle.manifest.networks["unet"]
    network = OpenVino().load(wide.bundle.file("unet"), record, LoadOptions("cpu", 1))
    assert network.describe().inputs["encoder_hidden_states"] == ("float32", ("batch", "tokens", 32))
    generator = np.random.default_rng(0)
    for tokens, size in ((77, (8, 8)), (231, (8, 8)), (154, (4, 12))):
        inputs = {
            "sample": generator.standard_normal((2, 4, *size), np.float32), "timestep": np.array([801, 41]),
            "encoder_hidden_states": generator.standard_normal((2, tokens, 32), np.float32),
        }  # fmt: skip
        expected = wide._unet(**inputs)
        np.testing.assert_allclose(network(**inputs), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    for unbound, message in (
        (network, "size; bind it with the latents' size and"),
        (wide._unet, "tokens; bind it with"),
    ):
        with pytest.raises(InputError, match=f"has an open {message} the tokens"), unbound.bind(1, (8, 8)):
            pass


# -- bundles -------------------------------------------------------------------------------------------------------


def test_inspect_shows_the_maximum_length_of_prompts(guided: Pipeline, micro_bundles: Path, cli: Any) -> None:
    output = " ".join(cli("inspect", guided.bundle.folder).out.split())
    assert "prompts up to 154 tokens in chunks of 77" in output
    assert "prompts 77 tokens" in " ".join(cli("inspect", micro_bundles / "plain").out.split())


def test_parity_is_checked_for_one_chunk_and_for_all_chunks(guided: Pipeline) -> None:
    manifest = guided.bundle.manifest
    assert list(manifest.networks["unet"].parity.sizes) == ["32x32", "154 tokens"]
    assert "--tokens 154" in manifest.rebuild
    errors = verify(guided.bundle)
    assert errors["unet@154 tokens"] < 1e-5 and errors["unet"] < 1e-5


def test_a_lora_does_not_change_chunks_and_sizes(wide: Pipeline, micro_base: Path, tmp_path: Path) -> None:
    weights = load_file(micro_base / "unet" / "diffusion_pytorch_model.safetensors")
    shapes = {name: tuple(weights[f"{name}.weight"].shape) for name in UNET}
    write(tmp_path / "sepia.safetensors", "diffusers", [Pair(name, 2, 1.0) for name in UNET], shapes, seed=1)
    plug(PlugSpec(str(wide.bundle.folder), None, (str(tmp_path / "sepia.safetensors"),), tmp_path / "plugged"))
    plugged = Pipeline.load(tmp_path / "plugged", provider="cpu")
    assert plugged.bundle.manifest.text == wide.bundle.manifest.text and plugged.bundle.manifest.text.chunks == 3
    assert list(plugged.bundle.manifest.networks["unet"].parity.sizes) == ["32x32", "16x48", "231 tokens"]
    common: dict[str, Any] = {"steps": 2, "prompt_syntax": "a1111", "size": (16, 48)}
    assert not np.array_equal(plugged(LONG, **common)[0].pixels, wide(LONG, **common)[0].pixels)


@pytest.mark.parametrize("tokens", [100, 76, 77 * 9])
def test_tokens_that_are_not_whole_chunks_are_refused(tokens: int, micro_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--tokens is {tokens}; .* chunks of 77 tokens; give a multiple .* 77 to 616"):
        build(BuildSpec(str(micro_base), "none", out=tmp_path / "x", tokens=tokens))
    assert not (tmp_path / "x").exists()


def test_a_runtime_without_an_open_number_of_tokens_refuses_chunks(
    micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pnp_trt.backends.onnxruntime.backend import OnnxRuntime

    monkeypatch.setattr(OnnxRuntime, "open_tokens", False)
    with pytest.raises(InputError, match="'onnxruntime' supports prompts of one chunk only; .* --backend .*torch"):
        build(BuildSpec(str(micro_base), "none", out=tmp_path / "x", tokens=154))


def test_a_manifest_whose_chunks_do_not_fit_the_graph_is_refused(guided: Pipeline, tmp_path: Path) -> None:
    import shutil

    for chunks in (1, 9):
        folder = Path(shutil.copytree(guided.bundle.folder, tmp_path / str(chunks)))
        assert document(folder)["text"]["chunks"] == 2
        reseal(folder, lambda m, n=chunks: m["text"].update(chunks=n), files=False)
        with pytest.raises(InputError, match=r"must have a 'tokens' dimension|text\.chunks"):
            open_bundle(folder)
