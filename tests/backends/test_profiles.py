"""Profiles: parsing, legal sizes, choice by shape, batches, and their form in a manifest."""

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
def test_profiles_state_batch_height_and_width(text: str, batch: object, height: object, width: object) -> None:
    p = Profile.parse(text)
    assert (p.name, p.extent("batch"), p.height, p.width) == (text, batch, height, width)


@pytest.mark.parametrize(
    "text",
    ["b1@", "b1@0", "b1@768-256", "b1@64x", "b1@64x64x64", "b1@5000", "@64", "b0@64", "b1 @64", "b1@٣"],
)
def test_invalid_profiles_are_refused_with_the_format(text: str) -> None:
    with pytest.raises(InputError, match=r"write b1 .* at most 32; .*@512x768 .*@256-768 .* at most 4096") as refused:
        Profile.parse(text)
    assert f"profile is '{text}'" in str(refused.value)


@pytest.mark.parametrize("text", ["", "0x64", "64x", "64*64", "5000", "-64", "64x64x64"])
def test_invalid_sizes_are_refused_with_the_format(text: str) -> None:
    assert parse_size("512x768") == (512, 768) and parse_size("96") == (96, 96)
    with pytest.raises(InputError, match="such as 512x768, each from 1 to 4096"):
        parse_size(text)


extents = st.integers(1, 12).flatmap(lambda low: st.integers(low, 12).map(lambda high: (low, high)))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Generate a profile of a model whose image sizes are multiples of 16 pixels."""
    (b0, b1), (h0, h1), (w0, w1) = draw(extents), draw(extents), draw(extents)
    return Profile("p", b0, b1, b1, (16 * h0, 16 * h1, 16 * h1), (16 * w0, 16 * w1, 16 * w1), 16)


@given(profiles(), st.integers(1, 12), st.integers(1, 200), st.integers(1, 200))
def test_a_profile_accepts_the_same_sizes_in_pixels_and_in_latents(p: Profile, batch: int, h: int, w: int) -> None:
    latents = p.in_latents(8)
    assert latents.shapes == p.shapes and latents.step == 2
    inside = all(low <= n <= high and n % 16 == 0 for n, (low, _, high) in ((h, p.extent("height")),
                                                                            (w, p.extent("width"))))  # fmt: skip
    assert p.holds_size((h, w)) == inside
    if h % 8 == 0 and w % 8 == 0:
        assert latents.holds_size((h // 8, w // 8)) == inside
    assert p.holds(batch, (h, w)) == (inside and p.holds(batch))


@given(profiles())
def test_profiles_survive_a_round_trip_through_json(p: Profile) -> None:
    assert Profile.from_dict(json.loads(json.dumps(p.as_dict()))) == p


def test_a_profile_without_sizes_is_recorded_with_batch_sizes_only() -> None:
    record = {"name": "b2-8", "minimum": 2, "optimum": 8, "maximum": 8}
    assert Profile.parse("b2-8").as_dict() == record and Profile.from_dict(record).holds(3, (640, 8))


@given(st.lists(profiles(), min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_the_tightest_profile_is_chosen(candidates: list[Profile], batch: int, h: int, w: int) -> None:
    size = (16 * h, 16 * w)
    index = tightest(candidates, lambda p: p.holds(batch, size))
    fitting = [p for p in candidates if p.holds(batch, size)]
    assert (index is None) == (not fitting)
    if index is not None:
        assert candidates[index] in fitting and candidates[index].shapes == min(p.shapes for p in fitting)


@given(st.integers(0, 24), st.sets(st.integers(1, 9), min_size=1, max_size=4))
def test_images_are_split_into_the_fewest_legal_batches(count: int, batches: set[int]) -> None:
    """Compare with an exhaustive search over sums of legal batch sizes."""
    reached, parts = {0}, 0
    while count not in reached and parts < count:
        reached, parts = {done + b for done in reached for b in batches if done + b <= count}, parts + 1
    chosen = split(count, sorted(batches))
    assert sum(chosen) == count and chosen == sorted(chosen, reverse=True)
    if count in reached:
        assert set(chosen) <= batches and len(chosen) == parts
    else:
        assert all(b == max(batches) for b in chosen[:-1])


def test_batches_of_the_default_profiles() -> None:
    assert [split(n, [1, 4]) for n in (1, 3, 4, 7, 8)] == [[1], [1] * 3, [4], [4, 1, 1, 1], [4, 4]]
    assert split(9, range(2, 9)) == [7, 2] and split(40, range(1, 33)) == [32, 8] and split(3, [4]) == [3]


def test_legal_sizes_are_listed_once() -> None:
    ranged = Profile("r", 1, 1, 1, (64, 64, 128), (64, 64, 64), 8)
    square = Profile("s", 1, 1, 1, (96, 96, 96), (96, 96, 96), 8)
    assert legal_sizes([Profile.parse("b1"), ranged, square, square]) == "64-128x64 in steps of 8, 96x96"
    assert MAX_SIDE >= 1024  # SDXL's image size


def test_sequential_guidance_gets_static_profiles_for_both_batch_sizes() -> None:
    def batches(*texts: str) -> list[tuple[int, int, int]]:
        return [p.extent("batch") for p in once_and_twice([Profile.parse(t) for t in texts])]

    assert batches("b1") == [(1, 1, 1), (2, 2, 2)]
    assert batches("b1", "b4") == [(1, 1, 1), (4, 4, 4), (2, 2, 2), (8, 8, 8)]
    assert batches("b1", "b2", "b4") == [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8)]  # no duplicates
    assert batches("b2-8") == [(2, 8, 8), (4, 16, 16)]
    sized = once_and_twice([Profile.parse("b1@512x768")])
    assert [(p.minimum, p.height, p.width) for p in sized] == [(n, (512,) * 3, (768,) * 3) for n in (1, 2)]
    assert len({p.name for p in sized}) == 2
    mixed = once_and_twice([Profile.parse(t) for t in ("b1", "b4", "b2-8")])
    for batch in (1, 2, 4, 8):  # a static profile is preferred
        index = tightest(mixed, lambda p, batch=batch: p.holds(batch))
        assert index is not None and mixed[index].extent("batch") == (batch,) * 3


def test_prompts_of_one_chunk_keep_static_profiles() -> None:
    chunked = by_chunks([Profile.parse("b1"), Profile.parse("b2-8")], 77, 3)
    assert [(p.extent("batch"), p.extent("tokens")) for p in chunked] == [
        ((1, 1, 1), (77, 77, 77)), ((2, 8, 8), (77, 77, 77)),
        ((1, 1, 1), (154, 154, 231)), ((2, 8, 8), (154, 154, 231)),
    ]  # fmt: skip
    assert [p.tokens for p in by_chunks([Profile.parse("b1")], 77, 2)] == [(77, 77, 77), (154, 154, 154)]
    assert len({p.name for p in chunked}) == 4
    for tokens, batch, index in ((77, 1, 0), (77, 3, 1), (154, 1, 2), (231, 8, 3), (308, 1, None)):
        assert tightest(chunked, lambda p, batch=batch, tokens=tokens: p.holds(batch, None, tokens)) == index
    assert Profile.from_dict(json.loads(json.dumps(chunked[3].as_dict()))) == chunked[3]


@pytest.mark.parametrize(("guide", "wanted"), [("none", [(1, 1, 1), (2, 2, 2)]), ("tiny", [(1, 1, 1)])])
def test_only_a_teachers_unet_gets_profiles_of_twice_the_batch(guide: str, wanted: list[tuple[int, int, int]]) -> None:
    plan = plan_sizes([Profile.parse("b1")], resolve("random:sd15").sizes())
    spec = BuildSpec("random:sd15", guide, backend="tensorrt", precision="fp16")
    base, backend = resolve("random:sd15"), backends.get("tensorrt")
    work = Build(spec, base, {}, backend, recipe("fp16"), "sm_90", plan, lambda *_: None)
    assert [p.extent("batch") for p in work._profiles("unet")] == wanted
    assert [p.extent("batch") for p in work._profiles("vae_decoder")] == [(1, 1, 1)]
