"""AUTOMATIC1111's text in images: what its readers find in ours, and what is read of theirs."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pnp_trt.errors import InputError
from pnp_trt.runtime.a1111 import parse_parameters, read_text, text_of
from pnp_trt.runtime.images import encode_image, read_parameters
from pnp_trt.version import __version__

PIXELS = np.zeros((8, 8, 3), np.uint8)
RECORD = {
    "prompt": "a red apple, (shiny:1.2)\non a table", "negative": "blurred, dark", "seed": 7, "steps": 20,
    "guidance": 3.0, "method": "guided", "engine": "emoji-tiny", "schedule": "dpm++:karras", "size": "64x96",
    "init": "a.png", "strength": 0.6,
}  # fmt: skip
WORDS = f"""a red apple, (shiny:1.2)
on a table
Negative prompt: blurred, dark
Steps: 20, CFG scale: 3, Seed: 7, Sampler: DPM++ 2M, Schedule type: Karras, Size: 96x64, Model: emoji-tiny, \
Denoising strength: 0.6, Guidance method: guided, Version: pnp-trt {__version__}"""


def chunks(png: bytes) -> dict[bytes, list[bytes]]:
    """A PNG's chunks by type, by the format's definition."""
    at, found = 8, {}
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found.setdefault(png[at + 4 : at + 8], []).append(png[at + 8 : at + 8 + length])
        at += length + 12
    return found


def test_a_png_has_the_text_chunk_that_a1111_writes() -> None:
    made = encode_image(PIXELS, RECORD, "png", Path("x"))
    assert chunks(made)[b"tEXt"] == [b"parameters\0" + WORDS.encode("latin-1")]
    wide = encode_image(PIXELS, RECORD | {"prompt": "苹果 🍎"}, "png", Path("x"))
    assert b"tEXt" not in chunks(wide)  # what Latin-1 lacks is in an international chunk, as Pillow writes it
    assert (
        Image.open(io.BytesIO(wide)).info["parameters"].startswith("苹果 🍎\nNegative prompt: blurred, dark\nSteps: 20")
    )


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_exif_has_the_comment_that_piexif_writes(kind: str) -> None:
    made = Image.open(io.BytesIO(encode_image(PIXELS, RECORD, kind, Path("x"))))
    comment = made.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + WORDS.encode("utf-16-be")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_both_records_are_read_back(kind: str, tmp_path: Path) -> None:
    data = encode_image(PIXELS, RECORD | {"prompt": "🍎 b\\ö"}, kind, Path("x"))
    (tmp_path / "x").write_bytes(data)
    assert read_parameters(tmp_path / "x")["prompt"] == parse_parameters(read_text(data))["Prompt"] == "🍎 b\\ö"
    assert read_text(tmp_path / "x") == read_text(data)
    without = encode_image(PIXELS, {"images": []}, kind, Path("x"))  # a grid's
    assert read_text(without) == "" and text_of({"images": []}) is None


def test_a_long_jpeg_keeps_our_own_record(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encode_image(PIXELS, {"prompt": "a" * 59_000}, "jpeg", Path("x")))
    assert read_text(tmp_path / "x") == "" and read_parameters(tmp_path / "x") == {"prompt": "a" * 59_000}
    assert len(read_text(encode_image(PIXELS, {"prompt": "a" * 20_000}, "jpeg", Path("x")))) > 20_000


#: texts of images that people share, with what their readers find
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "old": (
        "masterpiece, a cat\nNegative prompt: lowres, bad hands\n"
        "Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1234567890, Size: 512x768, Model hash: 6ce0161689, "
        "Model: v1-5-pruned-emaonly, Clip skip: 2, ENSD: 31337",
        {"Prompt": "masterpiece, a cat", "Negative prompt": "lowres, bad hands", "Steps": "28",
         "Sampler": "DPM++ 2M Karras", "CFG scale": "7", "Seed": "1234567890", "Size": "512x768", "Size-1": "512",
         "Size-2": "768", "Model hash": "6ce0161689", "Model": "v1-5-pruned-emaonly", "Clip skip": "2",
         "ENSD": "31337"},
    ),
    "lines": (
        "a cat\n\n<lora:x:0.8>, Steps: yes\nNegative prompt: one\ntwo\nSteps: 20, Sampler: Euler a, Seed: 5",
        {"Prompt": "a cat\n\n<lora:x:0.8>, Steps: yes", "Negative prompt": "one\ntwo", "Steps": "20",
         "Sampler": "Euler a", "Seed": "5"},
    ),
    "quoted": (
        'x\nSteps: 20, Sampler: Euler, Seed: 5, Lora hashes: "a: 12ab, b \\"c\\": 34cd", TI: "", Version: v1.9.4',
        {"Prompt": "x", "Negative prompt": "", "Steps": "20", "Sampler": "Euler", "Seed": "5",
         "Lora hashes": 'a: 12ab, b "c": 34cd', "TI": "", "Version": "v1.9.4"},
    ),
    "no pairs": ("a cat, size: big", {"Prompt": "a cat, size: big", "Negative prompt": ""}),
    "empty": ("", {"Prompt": "", "Negative prompt": ""}),
    "no negative": ("x\r\nSteps: 1, Seed: 2, Size: 8", {"Prompt": "x", "Negative prompt": "", "Steps": "1", "Seed": "2",
                                                          "Size": "8"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_texts_of_shared_images_are_parsed(name: str) -> None:
    text, found = SHARED[name]
    assert parse_parameters(text) == found


def test_images_of_other_writers_are_read() -> None:
    text = SHARED["old"][0]
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    for comment in (b"UNICODE\0" + text.encode("utf-16-be"), b"UNICODE\0" + text.encode("utf-16-le"),
                    b"ASCII\0\0\0" + text.encode(), b"\0" * 8 + text.encode()):  # fmt: skip
        exif = Image.Exif()
        exif[0x8769] = {0x9286: comment}
        held = io.BytesIO()
        Image.fromarray(PIXELS).save(held, "JPEG", exif=exif)
        assert read_text(held.getvalue()) == text
    held = io.BytesIO()
    Image.fromarray(PIXELS).save(held, "PNG", pnginfo=info)
    assert read_text(held.getvalue()) == text
    with pytest.raises(InputError, match="the image cannot be read .*; give a PNG, JPEG or WebP image"):
        read_text(b"GIF89a, or not")


LINE = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=30).filter(
    lambda line: not line.startswith("Negative prompt:")
)


@settings(max_examples=60)
@given(prompt=st.lists(LINE, min_size=1, max_size=3), negative=st.lists(LINE, max_size=3), engine=LINE)
def test_what_is_written_is_parsed(prompt: list[str], negative: list[str], engine: str) -> None:
    record = RECORD | {"prompt": "\n".join(prompt), "negative": "\n".join(negative), "engine": engine}
    found = parse_parameters(str(text_of(record)))
    assert found["Prompt"] == record["prompt"] and found["Negative prompt"] == record["negative"]
    assert found["Model"] == engine and found["Sampler"] == "DPM++ 2M" and found["Size-1"] == "96"
