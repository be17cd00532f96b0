"""The runtime's tokenizer compared with transformers' CLIP tokenizer."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from pnp_trt.assets import ROOT
from pnp_trt.runtime.tokenizer import Tokenizer

FOLDER = ROOT / "emoji" / "tokenizer"


@pytest.fixture(scope="module")
def both() -> tuple[Tokenizer, CLIPTokenizer]:
    return Tokenizer(FOLDER / "tokenizer.json"), CLIPTokenizer.from_pretrained(FOLDER)


def test_the_vocabulary_is_that_of_clip(both: tuple[Tokenizer, CLIPTokenizer]) -> None:
    ids = both[0].weighted([("a photograph of an astronaut riding a horse", 1.0)])[0]
    assert ids[:10].tolist() == [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]
    assert (ids[10:] == 49407).all() and ids.shape == (77,)


@settings(max_examples=150)
@given(st.text(max_size=120))
def test_tokens_equal_those_of_transformers(both: tuple[Tokenizer, CLIPTokenizer], text: str) -> None:
    ours, theirs = both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = ours.weighted([(text, 1.0)])[0].tolist()
    assert got == theirs(text, padding="max_length", max_length=77, truncation=True).input_ids


def test_a_long_prompt_is_cut_with_a_warning_that_shows_the_rest(both: tuple[Tokenizer, CLIPTokenizer]) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    with pytest.warns(UserWarning, match=r"cut to 77; dropped: “.*word59”"):
        ids = both[0].weighted([(words, 1.0)])[0]
    assert ids[0] == 49406 and ids[-1] == 49407


def test_a_prompt_that_just_fits_is_not_cut(both: tuple[Tokenizer, CLIPTokenizer]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (both[0].weighted([("apple " * 75, 1.0)])[0] == 49407).sum() == 1
