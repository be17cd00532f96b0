"""Image files for ``--init``, ``--images`` and ``--real``: bombs, false headers, other formats, damaged files."""

from __future__ import annotations

import functools
import io
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..case import HERE, PLAIN, Case, Outcome, Place, Surroundings
from .common import ANY, PROMPTS, bench, guidance, sample, share, with_prompts, without

AREA = "images"
FOLDER = HERE / "images"
LIMITS = Surroundings(limits=((resource.RLIMIT_AS, 24 << 30),), cpu=60)


@functools.cache
def _noise() -> Any:
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


def _encoded(image: Any, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header states a large size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _exif(value: int) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = value
    return _encoded(_noise(), "JPEG", exif=exif)


def _text_bomb() -> bytes:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("x", "y" * 10_000_000, zip=True)
    return _encoded(_noise(), "PNG", pnginfo=info)


def _sixteen() -> bytes:
    from PIL import Image

    return _encoded(Image.fromarray(np.full((64, 64), 40_000, np.uint16)), "PNG")


def _float(value: float) -> bytes:
    from PIL import Image

    return _encoded(Image.fromarray(np.full((64, 64), value, np.float32)), "TIFF")


def _blank(mode: str, size: tuple[int, int], colour: Any = 0) -> Any:
    from PIL import Image

    return Image.new(mode, size, colour)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) run\nshowpage\n"
FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty": ("a.png", lambda: b""),
    "cut PNG": ("a.png", lambda: _encoded(_noise(), "PNG")[:500]),
    "cut JPEG": ("a.jpg", lambda: _encoded(_noise(), "JPEG")[:700]),
    "header of a PNG": ("a.png", lambda: _encoded(_noise(), "PNG")[:33]),
    "bomb of 50,000 x 50,000": ("a.png", lambda: _bomb(50_000, 50_000)),
    "bomb of 13,000 x 13,000": ("a.png", lambda: _bomb(13_000, 13_000)),
    "20,000 x 8,000 that lies": ("a.png", lambda: _bomb(20_000, 8000)),
    "0 x 0": ("a.png", lambda: _bomb(0, 0)),
    "1 x 1": ("a.png", lambda: _encoded(_noise().resize((1, 1)), "PNG")),
    "1 x 5,000": ("a.png", lambda: _encoded(_noise().resize((1, 5000)), "PNG")),
    "CMYK": ("a.jpg", lambda: _encoded(_noise().convert("CMYK"), "JPEG")),
    "16 bits": ("a.png", _sixteen),
    "animated GIF": ("a.gif", lambda: _encoded(_noise(), "GIF", save_all=True, append_images=[_noise().rotate(9)] * 5)),
    "animated WEBP": ("a.webp", lambda: _encoded(_noise(), "WEBP", save_all=True, append_images=[_noise()])),
    "turned by EXIF": ("a.jpg", lambda: _exif(6)),
    "wrong EXIF": ("a.jpg", lambda: _exif(99)),
    "transparent": ("a.png", lambda: _encoded(_blank("RGBA", (64, 64), (1, 2, 3, 0)), "PNG")),
    "palette with transparency": ("a.png", lambda: _encoded(_noise().convert("P"), "PNG", transparency=0)),
    "1 bit": ("a.png", lambda: _encoded(_noise().convert("1"), "PNG")),
    "grey with alpha": ("a.png", lambda: _encoded(_noise().convert("LA"), "PNG")),
    "float TIFF": ("a.tiff", lambda: _float(0.5)),
    "NaN TIFF": ("a.tiff", lambda: _float(float("nan"))),
    "text bomb": ("a.png", _text_bomb),
    "text": ("a.png", lambda: b"hello"),
    "SVG": ("a.png", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>"),
    "EPS": ("a.png", lambda: EPS),
    "EPS by its name": ("a.eps", lambda: EPS),
    "PDF": ("a.pdf", lambda: b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>"),
    "wrong checksum": ("a.png", lambda: _encoded(_noise(), "PNG").replace(b"IDAT", b"IDAU", 1)),
    "pickle": ("a.png", lambda: b"\x80\x04cos\nsystem\n."),
    "JPEG by another name": ("a.png", lambda: _encoded(_noise(), "JPEG")),
    "BMP": ("a.bmp", lambda: _encoded(_noise(), "BMP")),
    "20,000 x 20,000": ("a.png", lambda: _encoded(_blank("L", (20_000, 20_000)), "PNG")),
}  # fmt: skip
SLOW = ("20,000 x 20,000", "bomb of 13,000 x 13,000", "20,000 x 8,000 that lies")


def _no_program(outcome: Outcome, place: Place) -> str | None:
    """Fail if a program was run: Pillow passes PostScript to Ghostscript, whatever the file's name."""
    programs = [p for p in outcome.of("program") if "gs" in p.split("/")[-1] or "'gs'" in p]
    return f"a program was run: {programs[0][:60]}" if programs or "Ghostscript" in outcome.said else None


def _put(name: str, make: Callable[[], bytes], caption: bool = True) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None  # for the image that is created here
        folder = place.path(FOLDER)
        folder.mkdir()
        (folder / name).write_bytes(make())
        if caption:
            (folder / "a.txt").write_text("a cat")
            (folder / "good.png").write_bytes(_encoded(_noise(), "PNG"))
            (folder / "good.txt").write_text("a dog")
        Image.MAX_IMAGE_PIXELS = 89_478_485

    return prepare


DISTILL = without(guidance("--images", FOLDER), "--prompts")
METADATA: dict[str, bytes] = {
    "climbs": b'{"file_name": "../../../../etc/passwd", "text": "x"}',
    "is absolute": b'{"file_name": "/etc/passwd", "text": "x"}',
    "has no text": b'{"file_name": "good.png"}',
    "is null": b"null",
    "is a list": b"[]",
    "is cut": b'{"file_name"',
    "is of numbers": b'{"file_name": 3, "text": 4}',
    "names a file that is missing": b'{"file_name": "gone.png", "text": "x"}',
    "has a lone surrogate": b'{"file_name": "good.png", "text": "\\ud800"}',
    "is binary": b"\0\xff",
    "is nested": b"[" * 100_000,
    "has a BOM": b'\xef\xbb\xbf{"file_name": "good.png", "text": "x"}',
    "names one file twice": b'{"file_name": "good.png", "text": "x"}\n' * 2,
    "is of 5,000 digits": b'{"file_name": ' + b"9" * 5000 + b"}",
}


def _metadata(text: bytes) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        folder = place.path(FOLDER)
        folder.mkdir()
        (folder / "good.png").write_bytes(_encoded(_noise(), "PNG"))
        (folder / "metadata.jsonl").write_bytes(text)

    return prepare


def cases() -> Iterator[Case]:
    """All cases."""
    for turn, (label, (name, make)) in enumerate(FILES.items()):
        words = sample(PLAIN, "--steps", 2, "--init", FOLDER / name)
        yield Case(AREA, f"sample --init, {label}", words, ANY, _put(name, make), _no_program, surroundings=LIMITS,
                   slow=label in SLOW)  # fmt: skip
        folders = {
            "distill --images": (DISTILL, _put(name, make)),
            "bench --real": (bench("--real", FOLDER, "--prompts", PROMPTS), with_prompts(_put(name, make, False))),
        }
        for command, (arguments, prepare) in share(folders, turn, 1 if turn % 3 else 2).items():
            yield Case(
                AREA, f"{command}, {label}", arguments, ANY, prepare, _no_program, surroundings=LIMITS, slow=True
            )
    for label, text in METADATA.items():
        allowed = ANY if label in ("has a lone surrogate", "has a BOM", "names one file twice") else (1, 2)
        yield Case(AREA, f"distill, metadata.jsonl {label}", DISTILL, allowed, _metadata(text), slow="BOM" in label)
    for label, path in {"is missing": HERE / "nope.png", "is a folder": HERE, "is a device": "/dev/null"}.items():
        yield Case(AREA, f"sample --init {label}", sample(PLAIN, "--init", path), (2,))
