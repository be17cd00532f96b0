"""AUTOMATIC1111's parameters in images: writing them for its readers, and reading them from other programs' files."""

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
    """Return a PNG's chunks by type, read by the format's definition."""
    at, by_type = 8, {}
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        by_type.setdefault(png[at + 4 : at + 8], []).append(png[at + 8 : at + 8 + length])
        at += length + 12
    return by_type


def test_a_png_has_the_text_chunk_that_a1111_writes() -> None:
    png = encode_image(PIXELS, RECORD, "png", Path("x"))
    assert chunks(png)[b"tEXt"] == [b"parameters\0" + WORDS.encode("latin-1")]
    wide = encode_image(PIXELS, RECORD | {"prompt": "苹果 🍎"}, "png", Path("x"))
    assert b"tEXt" not in chunks(wide)  # Pillow writes characters that Latin-1 lacks into an international chunk
    assert (
        Image.open(io.BytesIO(wide)).info["parameters"].startswith("苹果 🍎\nNegative prompt: blurred, dark\nSteps: 20")
    )


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_exif_has_the_comment_that_piexif_writes(kind: str) -> None:
    image = Image.open(io.BytesIO(encode_image(PIXELS, RECORD, kind, Path("x"))))
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + WORDS.encode("utf-16-be")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_both_records_are_read_back(kind: str, tmp_path: Path) -> None:
    data = encode_image(PIXELS, RECORD | {"prompt": "🍎 b\\ö"}, kind, Path("x"))
    (tmp_path / "x").write_bytes(data)
    assert read_parameters(tmp_path / "x")["prompt"] == parse_parameters(read_text(data))["Prompt"] == "🍎 b\\ö"
    assert read_text(tmp_path / "x") == read_text(data)
    without = encode_image(PIXELS, {"images": []}, kind, Path("x"))  # the record of a grid
    assert read_text(without) == "" and text_of({"images": []}) is None


def test_a_long_jpeg_keeps_our_own_record(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encode_image(PIXELS, {"prompt": "a" * 59_000}, "jpeg", Path("x")))
    assert read_text(tmp_path / "x") == "" and read_parameters(tmp_path / "x") == {"prompt": "a" * 59_000}
    assert len(read_text(encode_image(PIXELS, {"prompt": "a" * 20_000}, "jpeg", Path("x")))) > 20_000


#: parameter texts of shared images, and the expected result of parsing them
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
    text, expected = SHARED[name]
    assert parse_parameters(text) == expected


def test_images_of_other_programs_are_read() -> None:
    text = SHARED["old"][0]
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    for comment in (b"UNICODE\0" + text.encode("utf-16-be"), b"UNICODE\0" + text.encode("utf-16-le"),
                    b"ASCII\0\0\0" + text.encode(), b"\0" * 8 + text.encode()):  # fmt: skip
        exif = Image.Exif()
        exif[0x8769] = {0x9286: comment}
        buffer = io.BytesIO()
        Image.fromarray(PIXELS).save(buffer, "JPEG", exif=exif)
        assert read_text(buffer.getvalue()) == text
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG", pnginfo=info)
    assert read_text(buffer.getvalue()) == text
    with pytest.raises(InputError, match="the image cannot be read .*; give a PNG, JPEG or WebP image"):
        read_text(b"GIF89a, or not")


LINE = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=30).filter(
    lambda line: not line.startswith("Negative prompt:")
)


@settings(max_examples=60)
@given(prompt=st.lists(LINE, min_size=1, max_size=3), negative=st.lists(LINE, max_size=3), engine=LINE)
def test_written_texts_are_parsed_back(prompt: list[str], negative: list[str], engine: str) -> None:
    record = RECORD | {"prompt": "\n".join(prompt), "negative": "\n".join(negative), "engine": engine}
    parsed = parse_parameters(str(text_of(record)))
    assert parsed["Prompt"] == record["prompt"] and parsed["Negative prompt"] == record["negative"]
    assert parsed["Model"] == engine and parsed["Sampler"] == "DPM++ 2M" and parsed["Size-1"] == "96"
