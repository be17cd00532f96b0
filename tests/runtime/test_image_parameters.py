"""Parameters inside image files: they are read back as written, or refused when writing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pnp_trt.errors import InputError
from pnp_trt.runtime.images import FORMATS, read_parameters, save_image

PIXELS = np.zeros((8, 8, 3), np.uint8)
#: every Unicode character, including NUL, line endings and private use; surrogates are not characters
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=50, deadline=None)
@given(prompt=TEXT, name=TEXT)
def test_parameters_are_read_back_as_written(kind: str, prompt: str, name: str) -> None:
    parameters = {"prompt": prompt, "negative": name, "seed": 2**63, "guidance": 7.5, "nested": {name: [prompt, None]}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{FORMATS[kind][0]}"
        save_image(PIXELS, parameters, path, kind)
        assert read_parameters(path) == parameters


@pytest.mark.parametrize("kind", FORMATS)
def test_file_names_that_are_not_utf8_are_read_back(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_image(PIXELS, {"init": b"caf\xe9.png".decode("utf-8", "surrogateescape")}, path, kind)
    assert read_parameters(path) == {"init": "caf\udce9.png"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("parameters", [{"prompt": "a \ud83d\ude80"}, {"a": [{"\ud800\udfff": 1}]}])
def test_surrogate_pairs_that_json_would_join_are_refused(kind: str, parameters: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"surrogates U\+D8.* give the character U\+(1F680|103FF) itself"):
        save_image(PIXELS, parameters, tmp_path / "x", kind)
    assert not list(tmp_path.iterdir())


def test_deeply_nested_parameters_are_refused(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("pnp-trt", "[" * 100_000)
    Image.fromarray(PIXELS).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(InputError, match="has no parameters"):
        read_parameters(tmp_path / "x.png")
