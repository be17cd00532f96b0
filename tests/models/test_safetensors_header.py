"""Safetensors headers compared with the library's reader, and errors for files of other formats."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pnp_trt.errors import InputError
from pnp_trt.models.safetensors_header import read_header


def raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def test_the_header_equals_that_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b.c": torch.zeros(4, dtype=torch.float16), "empty": torch.zeros(0)}
    save_file(tensors, path, {"modelspec.title": "x"})
    header = read_header(path)
    with safe_open(path, "pt") as f:
        assert header.metadata == f.metadata()
        assert header.shapes == {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118
        assert header.dtypes == {k: f.get_slice(k).get_dtype() for k in f.keys()}  # noqa: SIM118


def _zip() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, out)
    assert zipfile.is_zipfile(out)
    return out.getvalue()


def _entry(**changes: object) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"\xef\xbb\xbf\r\n<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
        (_zip(), "is a zip archive .* pickled weights are not read"),
        (b"\x80\x02}q\x00.", "is a pickle; pickled weights are not read"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        (b"no weights here, only text", "its header would be"),
        (b"abc", "it has 3 bytes"),
        (raw(_entry())[:30], "was cut short: it has 30 bytes, but its header alone"),
        (raw(_entry(), bytes(4)), "was cut short: it has .* bytes, but its header describes"),
        (raw(_entry(), bytes(9)), "is damaged: it has .* bytes, but its header describes"),
        (raw(b"[1, 2]"), "its header is a list, not an object"),
        (raw(b"[" * 100_000 + b"]" * 100_000), "its header is not JSON"),
        (raw(b'{"a": ' * 100_000), "its header is not JSON"),
        (raw(b'{"a": ' + b"9" * 5000 + b"}"), "its header is not JSON"),
        (raw(b'{"a"'), "its header is not JSON"),
        (raw(b"\xff\xfe{}"), "its header is not JSON"),
        (raw(b'{"a": 3}'), "the header's entry of 'a' has no dtype"),
        (raw(_entry(shape="two")), "the shape of 'a' is not a list of integers"),
        (raw(_entry(data_offsets=[0, -8])), "the data_offsets of 'a' is not a list of integers"),
        (raw(_entry(data_offsets=[8])), "'a' does not have two data_offsets"),
        (raw(b'{"__metadata__": [1]}'), "the safetensors metadata is a list"),
    ],
)
def test_errors_state_what_a_file_is_instead(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_header(path)


def test_a_pickle_suffix_is_reported_if_the_bytes_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match="pickled weights are not read, because loading them can run code"):
        read_header(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="cannot be read \\(No such file"):
        read_header(tmp_path / "none.safetensors")
