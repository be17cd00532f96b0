"""Profiles: what is written, what is held, and what goes into a manifest."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnp_trt import backends
from pnp_trt.build.sizes import plan_sizes
from pnp_trt.build.spec import BuildSpec
from pnp_trt.build.work import Build
from pnp_trt.bundle.profiles import (
    MAX_SIDE,
    Profile,
    by_chunks,
    legal_sizes,
    once_and_twice,
    parse_size,
    split,
    tightest,
)  # fmt: skip
from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve
from pnp_trt.precision.recipes import recipe


@pytest.mark.parametrize(
    ("text", "batch", "height", "width"),
    [
        ("b1", (1, 1, 1), None, None),
        ("b2-8", (2, 8, 8), None, None),
        ("b1@512", (1, 1, 1), (512, 512, 512), (512, 512, 512)),
        ("b1-4@512x768", (1, 4, 4), (512, 512, 512), (768, 768, 768)),
        ("b1@256-768", (1, 1, 1), (256, 768, 768), (256, 768, 768)),
        ("b3@64x64-4096", (3, 3, 3), (64, 64, 64), (64, 4096, 4096)),
    ],
)
def test_profiles_say_batch_height_and_width(text: str, batch: object, height: object, width: object) -> None:
    p = Profile.parse(text)
    assert (p.name, p.extent("batch"), p.height, p.width) == (text, batch, height, width)


@pytest.mark.parametrize(
    "text",
    ["b1@", "b1@0", "b1@768-256", "b1@64x", "b1@64x64x64", "b1@5000", "@64", "b0@64", "b1 @64", "b1@٣"],
)
def test_what_is_no_profile_is_told_the_form(text: str) -> None:
    with pytest.raises(InputError, match=r"write b1 .* at most 32; .*@512x768 .*@256-768 .* at most 4096") as refused:
        Profile.parse(text)
    assert f"profile is '{text}'" in str(refused.value)


@pytest.mark.parametrize("text", ["", "0x64", "64x", "64*64", "5000", "-64", "64x64x64"])
def test_what_is_no_size_is_told_the_form(text: str) -> None:
    assert parse_size("512x768") == (512, 768) and parse_size("96") == (96, 96)
    with pytest.raises(InputError, match="such as 512x768, each from 1 to 4096"):
        parse_size(text)


extents = st.integers(1, 12).flatmap(lambda low: st.integers(low, 12).map(lambda high: (low, high)))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Any profile of a model whose sizes are multiples of 16 pixels."""
    (b0, b1), (h0, h1), (w0, w1) = draw(extents), draw(extents), draw(extents)
    return Profile("p", b0, b1, b1, (16 * h0, 16 * h1, 16 * h1), (16 * w0, 16 * w1, 16 * w1), 16)


@given(profiles(), st.integers(1, 12), st.integers(1, 200), st.integers(1, 200))
def test_a_profile_holds_the_same_in_pixels_and_in_latents(p: Profile, batch: int, h: int, w: int) -> None:
    latents = p.in_latents(8)
    assert latents.shapes == p.shapes and latents.step == 2
    inside = all(low <= n <= high and n % 16 == 0 for n, (low, _, high) in ((h, p.extent("height")),
                                                                            (w, p.extent("width"))))  # fmt: skip
    assert p.holds_size((h, w)) == inside
    if h % 8 == 0 and w % 8 == 0:
        assert latents.holds_size((h // 8, w // 8)) == inside
    assert p.holds(batch, (h, w)) == (inside and p.holds(batch))


@given(profiles())
def test_a_manifest_gives_profiles_back(p: Profile) -> None:
    assert Profile.from_dict(json.loads(json.dumps(p.as_dict()))) == p


def test_a_profile_without_sizes_is_recorded_as_ever() -> None:
    held = {"name": "b2-8", "minimum": 2, "optimum": 8, "maximum": 8}
    assert Profile.parse("b2-8").as_dict() == held and Profile.from_dict(held).holds(3, (640, 8))


@given(st.lists(profiles(), min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_the_tightest_profile_is_chosen(held: list[Profile], batch: int, h: int, w: int) -> None:
    size = (16 * h, 16 * w)
    index = tightest(held, lambda p: p.holds(batch, size))
    fitting = [p for p in held if p.holds(batch, size)]
    assert (index is None) == (not fitting)
    if index is not None:
        assert held[index] in fitting and held[index].shapes == min(p.shapes for p in fitting)


@given(st.integers(0, 24), st.sets(st.integers(1, 9), min_size=1, max_size=4))
def test_images_are_split_into_the_fewest_legal_batches(count: int, batches: set[int]) -> None:
    """Against all sums of up to ``count`` legal sizes."""
    reached, parts = {0}, 0
    while count not in reached and parts < count:
        reached, parts = {done + b for done in reached for b in batches if done + b <= count}, parts + 1
    found = split(count, sorted(batches))
    assert sum(found) == count and found == sorted(found, reverse=True)
    if count in reached:
        assert set(found) <= batches and len(found) == parts
    else:
        assert all(b == max(batches) for b in found[:-1])


def test_batches_of_the_default_profiles() -> None:
    assert [split(n, [1, 4]) for n in (1, 3, 4, 7, 8)] == [[1], [1] * 3, [4], [4, 1, 1, 1], [4, 4]]
    assert split(9, range(2, 9)) == [7, 2] and split(40, range(1, 33)) == [32, 8] and split(3, [4]) == [3]


def test_legal_sizes_are_said_once() -> None:
    ranged = Profile("r", 1, 1, 1, (64, 64, 128), (64, 64, 64), 8)
    square = Profile("s", 1, 1, 1, (96, 96, 96), (96, 96, 96), 8)
    assert legal_sizes([Profile.parse("b1"), ranged, square, square]) == "64-128x64 in steps of 8, 96x96"
    assert MAX_SIDE >= 1024  # SDXL's own


def test_sequential_guidance_has_static_profiles_of_its_own() -> None:
    def batches(*texts: str) -> list[tuple[int, int, int]]:
        return [p.extent("batch") for p in once_and_twice([Profile.parse(t) for t in texts])]

    assert batches("b1") == [(1, 1, 1), (2, 2, 2)]
    assert batches("b1", "b4") == [(1, 1, 1), (4, 4, 4), (2, 2, 2), (8, 8, 8)]
    assert batches("b1", "b2", "b4") == [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8)]  # none twice
    assert batches("b2-8") == [(2, 8, 8), (4, 16, 16)]
    sized = once_and_twice([Profile.parse("b1@512x768")])
    assert [(p.minimum, p.height, p.width) for p in sized] == [(n, (512,) * 3, (768,) * 3) for n in (1, 2)]
    assert len({p.name for p in sized}) == 2
    mixed = once_and_twice([Profile.parse(t) for t in ("b1", "b4", "b2-8")])
    for batch in (1, 2, 4, 8):  # a static one runs where there is one
        index = tightest(mixed, lambda p, batch=batch: p.holds(batch))
        assert index is not None and mixed[index].extent("batch") == (batch,) * 3


def test_prompts_of_one_chunk_keep_static_profiles() -> None:
    held = by_chunks([Profile.parse("b1"), Profile.parse("b2-8")], 77, 3)
    assert [(p.extent("batch"), p.extent("tokens")) for p in held] == [
        ((1, 1, 1), (77, 77, 77)), ((2, 8, 8), (77, 77, 77)),
        ((1, 1, 1), (154, 154, 231)), ((2, 8, 8), (154, 154, 231)),
    ]  # fmt: skip
    assert [p.tokens for p in by_chunks([Profile.parse("b1")], 77, 2)] == [(77, 77, 77), (154, 154, 154)]
    assert len({p.name for p in held}) == 4
    for tokens, batch, index in ((77, 1, 0), (77, 3, 1), (154, 1, 2), (231, 8, 3), (308, 1, None)):
        assert tightest(held, lambda p, batch=batch, tokens=tokens: p.holds(batch, None, tokens)) == index
    assert Profile.from_dict(json.loads(json.dumps(held[3].as_dict()))) == held[3]


@pytest.mark.parametrize(("guide", "wanted"), [("none", [(1, 1, 1), (2, 2, 2)]), ("tiny", [(1, 1, 1)])])
def test_only_a_teachers_network_is_run_twice(guide: str, wanted: list[tuple[int, int, int]]) -> None:
    plan = plan_sizes([Profile.parse("b1")], resolve("random:sd15").sizes())
    spec = BuildSpec("random:sd15", guide, backend="tensorrt", precision="fp16")
    base, backend = resolve("random:sd15"), backends.get("tensorrt")
    work = Build(spec, base, {}, backend, recipe("fp16"), "sm_90", plan, lambda *_: None)
    assert [p.extent("batch") for p in work._profiles("unet")] == wanted
    assert [p.extent("batch") for p in work._profiles("vae_decoder")] == [(1, 1, 1)]
