"""AUTOMATIC1111's prompt syntax: its documented examples, weights on text states, and text states of the caller."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnp_trt.errors import InputError
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.runtime.prompt_syntax import apply_weights, lora_tags, take_lora_tags, weighted_parts, without_breaks

#: the web UI's documented examples and others, with their weighted parts
TABLE: dict[str, list[tuple[str, float]]] = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
    "": [],
    "((x))": [("x", 1.21)],
    "[[x]]": [("x", 1 / 1.21)],
    "[x": [("x", 1 / 1.1)],
    "a) b] :": [("a) b] :", 1.0)],
    "(a: 1.5 )": [("a", 1.5)],
    "(a:-1)": [("a", -1.0)],
    "(a:b:0.5)": [("a:b", 0.5)],
    "x:1.3)": [("x:1.3)", 1.0)],
    r"a \\ (b\))": [("a \\ ", 1.0), ("b)", 1.1)],
    "a BREAK b": [("a b", 1.0)],
    "(a:1.2.3)": [("a:1.2.3", 1.1)],
}  # fmt: skip


@pytest.mark.parametrize("prompt", TABLE)
def test_parts_and_weights_equal_the_table(prompt: str) -> None:
    (parts,) = weighted_parts(without_breaks(prompt))
    assert [text for text, _ in parts] == [text for text, _ in TABLE[prompt]]
    assert [w for _, w in parts] == pytest.approx([w for _, w in TABLE[prompt]], rel=1e-12)


@given(st.text(alphabet="ab ()[]\\:.1", max_size=30))
def test_only_syntax_is_removed_from_prompts(prompt: str) -> None:
    joined = "".join(text for part in weighted_parts(prompt) for text, _ in part)
    assert [c for c in joined if c in "ab"] == [c for c in prompt if c in "ab"]
    assert weighted_parts("") == [[]] and all(np.isfinite(w) for part in weighted_parts(prompt) for _, w in part)


def test_weights_out_of_range_are_refused() -> None:
    for weight in ("101", "-200", "9" * 400):
        with pytest.raises(InputError, match=r"the weight of “\(a:.*” is .*; give at most 100"):
            weighted_parts(f"(a:{weight})")


def test_weights_multiply_states_and_keep_their_mean() -> None:
    states = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32) + np.float32(1)
    weights = np.array([1, 1.3, 0.5, 1, 1], np.float32)
    weighted = apply_weights(states, weights)
    assert weighted.dtype == np.float32 and weighted.mean() == pytest.approx(states.mean(), rel=1e-5)
    ratio = weighted / (states * weights[:, None])
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    assert apply_weights(states, np.ones(5)) is states
    assert (apply_weights(states, np.zeros(5)) == 0).all()
    centred = states - states.mean()  # a mean of zero cannot be kept by scaling
    assert np.array_equal(apply_weights(centred, weights), centred * weights[:, None])


@pytest.fixture(scope="module")
def plain(micro_bundles: Path) -> Pipeline:
    return Pipeline.load(micro_bundles / "plain", provider="cpu")


def states_of(pipe: Pipeline, prompts: list[str], syntax: str = "plain") -> np.ndarray:
    """Text states ``[n, 77, D]``."""
    return np.asarray(pipe.encode(prompts, syntax))


def test_weights_apply_to_the_states_of_their_tokens(plain: Pipeline) -> None:
    bare = states_of(plain, ["a red apple"])
    assert np.array_equal(states_of(plain, ["a red apple"], "a1111"), bare)
    assert not np.array_equal(states_of(plain, ["a (red:1.5) apple"]), bare)  # plain reads the brackets
    ids = [states_of(plain, ["a"]), states_of(plain, ["a red"])]
    first, last = (int(np.flatnonzero((a != b).any(-1)[0])[0]) for a, b in ((ids[0], bare), (ids[1], bare)))
    weights = np.ones(bare.shape[1], np.float32)
    weights[first:last] = 1.5  # the tokens of "red": causal attention does not change the states before them
    np.testing.assert_allclose(
        states_of(plain, ["a (red:1.5) apple"], "a1111")[0], apply_weights(bare[0], weights), rtol=1e-6, atol=1e-7
    )
    assert np.array_equal(states_of(plain, [r"a \(red\) apple"], "a1111"), states_of(plain, ["a (red) apple"]))


def test_long_weighted_prompts_are_cut_with_a_warning(plain: Pipeline) -> None:
    with pytest.warns(UserWarning, match="tokens and was cut to 77; dropped: “.*the end”"):
        cut = states_of(plain, ["(red apple) " * 60 + "the end"], "a1111")
    assert cut.shape == states_of(plain, ["a"]).shape


def test_images_follow_and_record_the_prompt_syntax(plain: Pipeline) -> None:
    common: dict[str, Any] = {"steps": 2, "seed": 3, "negative": "(blurred:1.2)"}
    weighted = plain("a (red:1.4) apple", prompt_syntax="a1111", **common)[0]
    assert weighted.parameters["prompt_syntax"] == "a1111" and weighted.parameters["prompt"] == "a (red:1.4) apple"
    with pytest.warns(UserWarning, match="is read as plain words"):
        words = plain("a (red:1.4) apple", **common)[0]
    assert "prompt_syntax" not in words.parameters and not np.array_equal(words.pixels, weighted.pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="“<lora:x:1>” in a prompt is not interpreted"):
            plain("a (red:1.4) <lora:x:1>", prompt_syntax="a1111", steps=1)
    with pytest.raises(InputError, match="the prompt syntax is 'compel'; known: plain, a1111"):
        plain("a", prompt_syntax="compel", steps=1)


def test_given_states_replace_the_prompts(plain: Pipeline) -> None:
    prompts = ["a red apple", "a cat"]
    states = states_of(plain, prompts)
    usual, from_states = plain(prompts, steps=2), plain(["x", "y"], steps=2, context=states.astype(np.float64))
    for a, b in zip(usual, from_states, strict=True):
        assert (
            np.array_equal(a.pixels, b.pixels) and b.parameters["context"] == "given" and "context" not in a.parameters
        )
    for wrong in (states[:1], states[:, :-1], states[..., :-1], np.full_like(states, np.nan), states.astype(int), "a"):
        with pytest.raises(InputError, match=r"^context is .*; pass finite text states of shape \[2, 77, \d+\]$"):
            plain(prompts, steps=2, context=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "rest", "loras"),
    [
        ("a cat", "a cat", ()),
        (" a cat ", " a cat ", ()),
        ("a cat <lora:sepia:0.8>", "a cat", (("sepia", 0.8),)),
        ("<lora:b v1.5>a (cat:1.2)<lora: a :-.5>", "a (cat:1.2)", (("b v1.5", 1.0), ("a", -0.5))),
        ("<lora:a:0.123456789> <lyco:a:1> <lora:a", "<lyco:a:1> <lora:a", (("a", 0.123456789),)),
    ],
)
def test_lora_tags_are_removed_from_a_prompt(prompt: str, rest: str, loras: tuple[tuple[str, float], ...]) -> None:
    assert take_lora_tags(prompt) == (rest, loras)
    assert take_lora_tags(lora_tags(loras)) == ("", loras)


@pytest.mark.parametrize("tag", ["<lora:>", "<lora::0.5>", "<lora:a:b>", "<lora:a:1:2>", "<lora:a:unet=1>"])
def test_an_invalid_lora_tag_is_refused(tag: str) -> None:
    with pytest.raises(InputError, match=r"write <lora:NAME:0\.8>"):
        take_lora_tags(f"a cat {tag}")
