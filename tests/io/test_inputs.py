"""Text inputs: byte order marks, line ends, encodings, damaged JSON, and prompts that no tokenizer can take."""

from __future__ import annotations

import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from pnp_trt.bench import results, suites
from pnp_trt.cli.sample import read_prompts as read_arguments
from pnp_trt.errors import InputError
from pnp_trt.io import inputs
from pnp_trt.models.prompts import find_images, read_prompts
from pnp_trt.precision.int8.record import Record

PROMPTS = ["a red apple", "déjà vu 日本"]
TEXT = "a red apple\n\n  déjà vu 日本  \n"
ENCODINGS = {
    "plain": TEXT.encode(),
    "mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "two marks": b"\xef\xbb\xbf\xef\xbb\xbf" + TEXT.encode(),
    "CRLF": TEXT.replace("\n", "\r\n").encode(),
    "mark, CRLF": b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode(),
    "CR": TEXT.replace("\n", "\r").encode(),
    "UTF-16 LE": b"\xff\xfe" + TEXT.encode("utf-16-le"),
    "UTF-16 BE": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "UTF-32": TEXT.encode("utf-32"),
    "joined files": b"\xef\xbb\xbfa red apple\r\n\xef\xbb\xbf" + "déjà vu 日本".encode(),
}


class Stream:
    """Standard input that holds bytes."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


@pytest.mark.parametrize("data", ENCODINGS.values(), ids=ENCODINGS.keys())
def test_prompts_are_the_same_in_every_encoding(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_bytes(data)
    assert read_prompts(tmp_path / "p.txt") == PROMPTS
    monkeypatch.setattr(sys, "stdin", Stream(data))
    assert read_arguments(["-"]) == PROMPTS


def test_arguments_are_utf8_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert read_arguments(["süß".encode().decode("ascii", "surrogateescape"), "a\udcff"]) == ["süß", "a\udcff"]


def test_a_mark_in_an_argument_is_not_part_of_the_prompt() -> None:
    assert read_arguments(["\ufeffa red apple", "b"]) == ["a red apple", "b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a cat\r\ncaf\xe9\n", r"not UTF-8 text \(line 2, byte 10 is 0xe9\); save it as UTF-8"),
        (b"\xef\xbb\xbfcaf\xe9\n", r"line 1, byte 6 is 0xe9"),
        (b"\xed\xa0\x80\n", r"line 1, byte 0 is 0xed"),
        (b"\xff\xfea", "not UTF-16 text"),
        ("a\nb cat".encode("utf-16-le"), "a NUL character in line 1"),
        (b"\x80\x04cos\nsystem\n.", "byte 0 is 0x80"),
        (b"", "no prompt"),
        (b"\xef\xbb\xbf \r\n", "no prompt"),
    ],
)
def test_what_is_not_text_is_refused_with_its_place(
    data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / "p.txt")
    monkeypatch.setattr(sys, "stdin", Stream(data))
    with pytest.raises(InputError, match=message):
        read_arguments(["-"])


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none", tmp_path, tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(InputError, match="one prompt per line"):
            read_prompts(path)
    monkeypatch.setattr(inputs, "MAX_BYTES", 1 << 20)
    with pytest.raises(InputError, match="/dev/zero is larger than 1 MiB"):
        read_prompts(Path("/dev/zero"))
    for stream in (None, io.StringIO(), Stream(b"x")):
        if isinstance(stream, Stream):
            stream.buffer.close()
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(InputError, match="standard input"):
            read_arguments(["-"])


@pytest.mark.parametrize(
    "text",
    ['{"a": 1', "", '{"a": NaN}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": Infinity}', "\ufeff{"],
)
def test_json_that_is_not_usable_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    for read in (inputs.read_json, results.read, Record.read):
        with pytest.raises(InputError, match="x.json") as e:
            read(path)
        assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_marks_do_not_spoil_json_and_toml(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert inputs.read_json(tmp_path / "x.json") == {"a": 1}
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbfrounds = 3\r\n")
    assert suites.load(str(tmp_path / "x.toml")) == {"rounds": 3}
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe" + "rounds = 3\r\n".encode("utf-16-le"))
    assert suites.load(str(tmp_path / "x.toml")) == {"rounds": 3}


@pytest.mark.parametrize("data", [b"rounds = \xff", b"a = " + b"[" * 3000, b"a = " + b"9" * 5000, b"rounds = 3\0"])
def test_damaged_suites_are_one_sentence(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(data)
    with pytest.raises(InputError, match="suite .*x.toml"):
        suites.load(str(tmp_path / "x.toml"))


def test_captions_are_read_like_prompts(tmp_path: Path) -> None:
    from PIL import Image

    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa red\r\napple\r\n")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "c.png", "text": "a cat"}\r\n')
    with pytest.warns(UserWarning, match=r"b.png \(its caption .*b.txt is not UTF-8 text \(line 1, byte 3 is 0xe9\)"):
        captioned = find_images(tmp_path)
    assert captioned.captions == ["a red apple", "a cat"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("null", "line 2: it is null, not an object"),
        ('{"file_name": "a.png"}', "line 2: it lacks 'text'"),
        ('{"file_name": 3, "text": "x"}', "'file_name' is a number"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "line 2: the caption is not UTF-8 text: the code U\\+D800"),
        ("{", "line 2 is not complete JSON"),
    ],
)
def test_rows_of_metadata_are_checked(row: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + row)
    with pytest.raises(InputError, match=message):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a \udcff cat", r"not UTF-8 text: the byte 0xff after “a ”"),
        ("\ud83d", r"the code U\+D83D"),
        ("x" * 1_000_001, "has 1,000,001 characters"),
        (3, "is int, not text"),
    ],
)
def test_prompts_that_no_tokenizer_takes(prompt: Any, message: str) -> None:
    from pnp_trt.runtime.pipeline import check_request

    with pytest.raises(InputError, match=message):
        check_request([prompt], [0], [2.0], 4)


@pytest.mark.parametrize(
    "prompt",
    ["a (red:1.5) apple", "a <lora:sepia:1>", "a BREAK b", "((red)) apple", "[cat:dog:0.5]", "(a b : .7)"],
)
def test_syntax_of_other_programs_is_warned_of_once(prompt: str) -> None:
    with pytest.warns(UserWarning, match="in a prompt is read as plain words") as said:
        inputs.warn_of_syntax(["plain", prompt, prompt])
    assert len(said) == 1


@pytest.mark.parametrize("prompt", ["a red apple (small)", "a break", "A CAT (RED) BREAK", "3:2", "[x]", "a: b", "<3"])
def test_plain_prompts_are_not_warned_of(prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs.warn_of_syntax([prompt])


def test_an_excerpt_is_short_and_printable() -> None:
    assert inputs.excerpt("a\x1b[2J\nb") == "“a\\x1b[2J\\nb”"
    assert inputs.excerpt("x" * 100_000) == "“" + "x" * 59 + "…”"


LINEAR = {"kind": "linear", "macs": 1, "amax": {"max": 1.0}, "by_timestep": [1.0], "channels": [1.0]}


def shaped(**changes: Any) -> dict[str, Any]:
    layer = {"kind": "conv", "macs": 1, "amax": {"max": 1.0}, "by_timestep": [1.0], "channels": []}
    record: dict[str, Any] = {
        "schema": "pnp-trt/calibration/1", "base": {"name": "a", "sha256": "b"}, "guide": None, "settings": {},
        "layers": {"unet.x": layer}, "sweep": {}, "decision": {"conv": "max", "float": []}, "versions": {},
    }  # fmt: skip
    return record | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"base": None}, {"base": {"name": "a"}}, {"guide": []}, {"settings": 1}, {"layers": []}, {"layers": {"x": 1}},
        {"layers": {"x": shaped()["layers"]["unet.x"] | {"amax": {"max": "1"}}}},
        {"layers": {"x": shaped()["layers"]["unet.x"] | {"kind": "attention"}}},
        {"layers": {"x": shaped()["layers"]["unet.x"] | {"more": 1}}},
        {"layers": {"x": shaped()["layers"]["unet.x"] | {"amax": {"max": 1e999}}}},
        {"sweep": 1}, {"decision": {}}, {"decision": {"conv": 3, "float": []}}, {"decision": {"float": []}},
        {"decision": {"conv": "max", "float": [1]}},
        {"decision": {"linear": "smoothquant-x", "float": []}, "layers": {"x": LINEAR}},
        {"versions": []},
    ],
)  # fmt: skip
def test_calibration_records_of_another_shape_are_one_sentence(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(shaped()))
    assert Record.read(path).share() == 1.0
    path.write_text(json.dumps(shaped(**changes)))
    with pytest.raises(InputError, match="record.json.*pnp-trt calibrate"):
        Record.read(path)
