"""A fact of a model.onnx that onnxruntime does not give, read from the protobuf itself.

The package `onnx` reads it too, but what serves does not need that package.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

GRAPH = 7
"""Field of a ModelProto."""
NODE, INITIALIZER = 1, 5
"""Fields of a GraphProto."""
INPUT, OP_TYPE = 1, 4
"""Fields of a NodeProto."""
DIMS, NAME = 1, 8
"""Fields of a TensorProto."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf."""


def vocabulary(graph_file: Path) -> int | None:
    """Number of token ids of a model.onnx: rows of the tables in which it looks up `input_ids`.

    None if the file has no such table.
    """
    try:
        [graph] = _values(memoryview(graph_file.read_bytes()), GRAPH)
        tables = {_table(node) for node in _values(graph, NODE)}
        return min(
            _rows(tensor)
            for tensor in _values(graph, INITIALIZER)
            if _texts(tensor, NAME)[0] in tables
        )
    except (ValueError, LookupError, TypeError, OSError):  # another format
        return None


def _table(node: memoryview) -> bytes | None:
    """The tensor in which a node looks up `input_ids`, or None."""
    inputs = _texts(node, INPUT)
    is_lookup = _texts(node, OP_TYPE) == [b"Gather"] and inputs[1] == b"input_ids"
    return inputs[0] if is_lookup else None


def _rows(tensor: memoryview) -> int:
    """The first dimension of a tensor. Its dimensions are a field each, or packed in one."""
    first = next(value for number, value in _fields(tensor) if number == DIMS)
    return first if isinstance(first, int) else _varint(first, 0)[0]


def _texts(message: memoryview, field: int) -> list[bytes]:
    return [bytes(value) for value in _values(message, field)]


def _values(message: memoryview, field: int) -> Iterator[memoryview]:
    """The values of a field that is a message or a text."""
    for number, value in _fields(message):
        if number == field and isinstance(value, memoryview):
            yield value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message. Values are not copied."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        wire_type = key & 7
        if wire_type == VARINT:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if wire_type == BYTES:
            size, position = _varint(message, position)
        else:
            size = {FIXED64: 8, FIXED32: 4}[wire_type]
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        position += 1
        if byte < 128:
            return value, position
        shift += 7
