"""The reader of image files, checked against numpy: depth, rotation, transparency, colour models, and refusals."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pnp_trt.errors import InputError
from pnp_trt.io.image_files import MAX_PIXELS, ImageError, decode_rgb, read_rgb
from pnp_trt.runtime.images import read_image, save_image

GREY = 0
RGB = 2
GREY_ALPHA = 4
RGBA = 6


def packed(row: np.ndarray, bits: int) -> bytes:
    """Pack a row of grey values, most significant bit first, padded to whole bytes."""
    digits = "".join(f"{v:0{bits}b}" for v in row)
    return int(digits.ljust(-(-len(digits) // 8) * 8, "0"), 2).to_bytes(-(-len(digits) // 8), "big")


def png(
    values: np.ndarray, kind: int, bits: int = 16, key: tuple[int, ...] = (), size: tuple[int, int] | None = None
) -> bytes:
    """Write a PNG by the specification, with values of 16 bits, or packed grey values of fewer."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = size or values.shape[:2]
    rows = b"".join(b"\0" + (row.astype(">u2").tobytes() if bits == 16 else packed(row, bits)) for row in values)
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))]
    chunks += [chunk(b"tRNS", b"".join(struct.pack(">H", k) for k in key))] if key else []
    chunks += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(data: bytes) -> np.ndarray:
    return decode_rgb(io.BytesIO(data), "x")


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64).round()
EIGHT = np.round(RAMP / 65535 * 255)
NOISE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("data", "grey"),
    [
        (png(RAMP, GREY), EIGHT),
        (encoded(Image.fromarray(RAMP.astype(np.uint16)), "PNG"), EIGHT),
        (encoded(Image.fromarray(RAMP.astype(np.uint16)), "TIFF"), EIGHT),
        (encoded(Image.fromarray(RAMP.astype(np.uint16)), "TIFF", tiffinfo={262: 0}), 255 - EIGHT),
        (encoded(Image.fromarray(RAMP.astype(np.uint16)), "TIFF", compression="tiff_deflate"), EIGHT),
        (encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"), EIGHT),
        (png(np.stack([RAMP] * 3, -1), RGB), RAMP // 256),
        (png(np.stack([RAMP, np.full_like(RAMP, 65535)], -1), GREY_ALPHA), RAMP // 256),
        (png(np.arange(16).reshape(4, 4), GREY, 4), np.arange(16).reshape(4, 4) * 17.0),
        (png(np.arange(4).reshape(1, 4), GREY, 2), np.arange(4).reshape(1, 4) * 85.0),
        (png(np.arange(2).reshape(1, 2), GREY, 1), np.arange(2).reshape(1, 2) * 255.0),
        (encoded(Image.fromarray(np.arange(2).reshape(1, 2) == 1), "TIFF"), np.arange(2).reshape(1, 2) * 255.0),
    ],
    ids=["png16", "png16-pillow", "tiff16", "tiff16-white-is-zero", "tiff16-deflate", "tiff-float", "png48",
         "png16-grey-alpha", "png4", "png2", "png1", "tiff1"],
)  # fmt: skip
def test_depths_are_scaled_to_eight_bits(data: bytes, grey: np.ndarray) -> None:
    pixels = read(data)
    assert pixels.dtype == np.uint8 and pixels.shape == (*grey.shape, 3)
    assert np.abs(pixels - grey[..., None]).max() <= 1


def test_a_sixteen_bit_ramp_keeps_its_mean() -> None:
    assert read(png(RAMP, GREY)).mean() == pytest.approx(127.5, abs=0.1)


@pytest.mark.parametrize("bits", [12])
def test_white_in_a_twelve_bit_tiff_is_4095(bits: int) -> None:
    values = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
    digits = "".join(f"{v:012b}" for v in values.ravel())
    body = int(digits, 2).to_bytes(len(digits) // 8, "big")
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(body)}
    head = struct.pack("<2sHI", b"II", 42, 8 + len(body))
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, v) for tag, v in tags.items())
    data = head + body + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    assert np.abs(read(data)[..., 0] - np.round(values / 4095 * 255)).max() <= 1


@pytest.mark.parametrize(
    "values",
    [np.array([[0.0, 2.0]]), np.array([[-0.1, 0.5]]), np.array([[0.0, np.nan]]), np.array([[0.0, np.inf]])],
)
def test_floating_point_images_outside_0_to_1_are_refused_with_the_range(values: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"x has floating-point pixels from \S+ to \S+; scale them to 0 to 1"):
        read(encoded(Image.fromarray(values.astype(np.float32)), "TIFF"))


def test_integers_without_a_known_white_level_are_refused() -> None:
    with pytest.raises(ImageError, match="32-bit or signed integer pixels"):
        read(encoded(Image.fromarray(np.arange(4, dtype=np.int32).reshape(2, 2)), "TIFF"))


#: EXIF orientation → the upright image of stored pixels, from the EXIF standard's table
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_honoured(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} | ({"lossless": True} if kind == "WEBP" else {})
    np.testing.assert_array_equal(read(encoded(Image.fromarray(NOISE), kind, **options)), UPRIGHT[orientation](NOISE))
    if kind != "WEBP":
        deep = RAMP[:6, :9].astype(np.uint16)
        got = read(encoded(Image.fromarray(deep), kind, exif=exif))[..., 0]
        np.testing.assert_array_equal(got, UPRIGHT[orientation](np.round(deep / 257)))


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(rgb * share + 255 * (1 - share))


def test_transparent_parts_are_blended_with_white() -> None:
    alpha = np.arange(54, dtype=np.uint8).reshape(6, 9) * 4
    rgba = Image.fromarray(np.dstack([NOISE, alpha]))
    assert np.abs(read(encoded(rgba, "PNG")) - over_white(NOISE, alpha)).max() <= 1
    grey = np.dstack([NOISE[..., 0], alpha])
    rgb = np.dstack([NOISE[..., 0]] * 3)
    assert np.abs(read(encoded(Image.fromarray(grey, "LA"), "PNG")) - over_white(rgb, alpha)).max() <= 1
    deep = png(np.dstack([NOISE * 257.0, alpha * 257.0]), RGBA)
    assert np.abs(read(deep) - over_white(NOISE, alpha)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(kind: str) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    pixels = read(encoded(image, kind, transparency=1))
    assert pixels[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_a_palette_with_partial_transparency_is_blended() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([0, 0, 0, 100, 100, 100])
    pixels = read(encoded(image, "PNG", transparency=bytes([0, 51])))
    assert pixels[0].tolist() == [[255] * 3, [224] * 3]  # 100 / 5 + 255 · 4 / 5


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (png(np.array([[0, 300, 65535]]), GREY, 16, (300,)), [0, 255, 255]),
        (png(np.array([[[0] * 3, [65535] * 3, [257] * 3]]), RGB, 16, (257,) * 3), [0, 255, 255]),
        (png(np.array([[0, 1, 2]]), GREY, 2, (1,)), [0, 255, 170]),
        (png(np.array([[0, 5, 14]]), GREY, 4, (5,)), [0, 255, 238]),
        (png(np.array([[0, 1]]), GREY, 1, (0,)), [255, 255]),
        (png(np.array([[0, 1]]), GREY, 1, (1,)), [0, 255]),
        (encoded(Image.fromarray(np.array([[3, 9, 20]], np.uint8)), "PNG", transparency=9), [3, 255, 20]),
        (encoded(Image.fromarray(np.array([[[1] * 3, [4] * 3]], np.uint8)), "PNG", transparency=(4, 4, 4)), [1, 255]),
    ],
    ids=["grey16", "rgb48", "grey2", "grey4", "grey1-black", "grey1-white", "grey8", "rgb24"],
)  # fmt: skip
def test_a_transparent_colour_is_white(data: bytes, pixels: list[int]) -> None:
    assert read(data)[0].tolist() == [[v] * 3 for v in pixels]


def test_cmyk_and_other_colour_models() -> None:
    ink = Image.fromarray(np.full((16, 16, 4), (0, 255, 255, 0), np.uint8), "CMYK")
    assert np.abs(read(encoded(ink, "JPEG"))[8, 8] - np.array([255.0, 0, 0])).max() <= 3
    assert np.abs(read(encoded(ink, "TIFF"))[8, 8] - np.array([255.0, 0, 0])).max() <= 3
    np.testing.assert_array_equal(read(encoded(Image.fromarray(NOISE), "BMP")), NOISE)


def test_the_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.fromarray(np.full((4, 4, 3), v, np.uint8)) for v in (10, 200)]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        assert read(encoded(frames[0], kind, save_all=True, append_images=frames[1:])).mean() == pytest.approx(
            10, abs=2
        )
    assert read(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])).mean() == pytest.approx(10, abs=2)


BOMB = png(np.zeros((1, 1)), GREY, 16, size=(60_000, 60_000))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello", "is not an image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "is not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image that can be read"),
        (encoded(Image.fromarray(NOISE), "PPM"), "is not an image that can be read"),
        (encoded(Image.fromarray(NOISE), "PNG")[:150], "cannot be read"),
        (encoded(Image.fromarray(np.tile(NOISE, (9, 9, 1))), "JPEG")[:700], "cannot be read"),
        (encoded(Image.fromarray(NOISE), "PNG")[:33], "is not an image"),
        (encoded(Image.fromarray(NOISE), "TIFF")[:40], ""),
        (BOMB, "pixels"),
    ],
    ids=["empty", "text", "eps", "svg", "ppm", "cut-png", "cut-jpeg", "header", "cut-tiff", "bomb"],
)  # fmt: skip
def test_unusable_images_are_refused_in_one_sentence(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match=message) as e:
            read_rgb(tmp_path / "x.png")
    assert str(e.value).startswith(str(tmp_path / "x.png")) and "\n" not in str(e.value)


def test_the_pixel_limit_does_not_depend_on_that_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=f"is 60000 × 60000, more than {MAX_PIXELS:,} pixels"):
        read(BOMB)


def test_missing_files_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="does not exist; name an image file"):
        read_rgb(tmp_path / "none.png")
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ImageError, match="is not a file"):
            read_rgb(other)


def test_a_starting_image_of_16_bits_is_scaled(tmp_path: Path) -> None:
    (tmp_path / "ramp.png").write_bytes(png(RAMP, GREY))
    pixels, name = read_image(tmp_path / "ramp.png", (64, 64))
    assert pixels.mean() == pytest.approx(127.5, abs=0.1) and name == str(tmp_path / "ramp.png")
    with pytest.warns(UserWarning, match="is 64 × 64 and was resized to the engine's 32 × 16"):
        assert read_image(tmp_path / "ramp.png", (16, 32))[0].shape == (16, 32, 3)
    with pytest.raises(InputError, match="a list; pass a path or uint8"):
        read_image([1], (8, 8))  # type: ignore[arg-type]


def test_a_file_created_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "g.png").write_text("another process's")
    with pytest.raises(InputError, match="g.png exists and is not overwritten; name another file"):
        save_image(np.zeros((8, 8, 3), np.uint8), {}, tmp_path / "g.png")
    assert (tmp_path / "g.png").read_text() == "another process's"
