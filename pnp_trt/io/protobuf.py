"""Read and write the fields of protocol buffer messages without the protobuf library.

Fields that are not understood are copied unchanged, so that a single field of a message can be edited.  The wire format
is described at protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (number, value) of a message's fields: integers, and the bytes of strings and messages.

    Raises:
        ValueError: if the bytes are not a message.
    """
    for number, value, _ in split(data):
        if value is not None:
            yield number, value


def split(data: memoryview) -> Iterator[tuple[int, int | memoryview | None, memoryview]]:
    """Yield (number, value, all its bytes) of a message's fields in order; floating-point fields have the value None.

    Raises:
        ValueError: if the bytes are not a message.
    """
    at, end = 0, len(data)
    while at < end:
        start = at
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value, data[start:at]
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError("it is not made of protocol buffers")
        if at + length > end:
            raise ValueError("it is truncated")
        at += length
        yield tag >> 3, data[at - length : at] if kind == _BYTES else None, data[start:at]


def message(value: int | memoryview) -> memoryview:
    """Return a field's value, which must be a message.

    Raises:
        ValueError: if it is a number.
    """
    if isinstance(value, int):
        raise ValueError("it has a number where a message is expected")
    return value


def text(value: int | memoryview) -> str:
    """Return a field's value as a string.

    Raises:
        ValueError: if it is a number, or not UTF-8.
    """
    return bytes(message(value)).decode()  # UnicodeDecodeError is a ValueError


def encode(number: int, value: int | bytes | str) -> bytes:
    """Encode a field whose value is a non-negative integer, a string or a message."""
    if isinstance(value, int):
        return _written(number << 3 | _VARINT) + _written(value)
    content = value.encode() if isinstance(value, str) else value
    return _written(number << 3 | _BYTES) + _written(len(content)) + content


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    out = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("it is truncated, or not made of protocol buffers")
        byte = data[at]
        at += 1
        out |= (byte & 127) << shift
        if byte < 128:
            return out, at
        shift += 7


def _written(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])
