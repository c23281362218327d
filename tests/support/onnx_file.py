"""ONNX files of a network without weights, written by hand so that the tests need no exporter."""

from __future__ import annotations

from pathlib import Path


def write_pooling(path: Path, side: int = 112, batch: int | str = "B", cell: int = 16) -> Path:
    """(B, 3, side, side) -> (B, 3 (side / cell)^2): means over cells of the image, flattened."""
    width = 3 * (side // cell) ** 2
    cells = _text(1, "kernel_shape") + _ints(cell, cell), _text(1, "strides") + _ints(cell, cell)
    pool = _text(1, "x") + _text(2, "m") + _text(4, "AveragePool") + b"".join(_part(5, each) for each in cells)
    flatten = _text(1, "m") + _text(2, "y") + _text(4, "Flatten")
    graph = _part(1, pool) + _part(1, flatten) + _text(2, "pooling")
    graph += _part(11, _values("x", batch, 3, side, side)) + _part(12, _values("y", batch, width))
    model = _number(1, 8) + _part(7, graph) + _part(8, _text(1, "") + _number(2, 13))
    path.write_bytes(model)
    return path


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def _number(tag: int, value: int) -> bytes:
    return _varint(tag << 3) + _varint(value)


def _part(tag: int, content: bytes) -> bytes:
    return _varint(tag << 3 | 2) + _varint(len(content)) + content


def _text(tag: int, text: str) -> bytes:
    return _part(tag, text.encode())


def _ints(*values: int) -> bytes:
    return b"".join(_number(8, value) for value in values) + _number(20, 7)  # of an AttributeProto of type INTS


def _values(name: str, *shape: int | str) -> bytes:
    sizes = (_number(1, size) if isinstance(size, int) else _text(2, size) for size in shape)
    tensor = _number(1, 1) + _part(2, b"".join(_part(1, size) for size in sizes))  # float32
    return _text(1, name) + _part(2, _part(1, tensor))
