"""Ways to spoil a file: bytes, JSON, tables, TOML, NIfTI headers, tensors, bundles."""

from __future__ import annotations

import copy
import gzip
import io
import json
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

Random = np.random.Generator

WORDS = [
    "", " ", "n/a", "NaN", "inf", "-1", "0", "1e999", "89+", "9" * 400, "9" * 5000, "1.5.2",
    "<script>alert(1)</script>", "=cmd|' /C calc'!A0", "@SUM(1)", "../../../etc/passwd", "\x00",
    "\u202e", "\ud83e\udde0", '"', "'", "\\", "\r", "{{7*7}}", "%s%n", "x" * 70_000, "true", "[]",
    "null", "sub-01", "sub-../x", "2020-13-45T99:99:99", "40w pma", "\ufeff", "´", "1_000", "0x10",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, -(2**63), 2**70, 1e308, -0.0, 1e-320, "", "n/a", [], {},
    [[]], [None], {"": {}}, [1, "a", {}], "<img src=x onerror=alert(1)>", "x" * 5000, ["T1w"],
    "../../x", "\x00", float("nan"), float("inf"),
]  # fmt: skip
RAW = [
    b'{"a":' * 20_000, b"[" * 100_000, b"\xff\xfe", b"\x00" * 100, b"", b'{"a": ' + b"9" * 5000
    + b"}",
    "a\tb\n".encode("utf-16"), b"\xef\xbb\xbf", b'"', b"a = " + b"[" * 3000 + b"]" * 3000,
]  # fmt: skip


def bytes_of(content: bytes, rng: Random) -> bytes:
    """Some bytes changed, cut, doubled or put in."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(0, max(1, len(data))))
        way = int(rng.integers(0, 6))
        if way == 0 and data:
            data[at % len(data)] = int(rng.integers(0, 256))
        elif way == 1:
            del data[at : at + int(rng.integers(1, 40))]
        elif way == 2:
            data[at:at] = data[at : at + int(rng.integers(1, 60))]
        elif way == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif way == 4:
            data[at:at] = str(rng.choice(WORDS)).encode("utf-8", "surrogatepass")
        elif rng.random() < 0.2:
            del data[at:]
    if rng.random() < 0.02:
        return RAW[int(rng.integers(0, len(RAW)))]
    return bytes(data)


def json_of(content: bytes, rng: Random) -> bytes:
    """Values of a JSON tree replaced by others, keys dropped or renamed; or its bytes changed."""
    if rng.random() < 0.35:
        return bytes_of(content, rng)
    tree = json.loads(content)
    for _ in range(int(rng.integers(1, 4))):
        holders = list(_holders(tree))
        if not holders:
            break
        holder = holders[int(rng.integers(0, len(holders)))]
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            continue
        key = keys[int(rng.integers(0, len(keys)))]
        way = rng.random()
        if way < 0.7:
            holder[key] = _any(VALUES, rng)
        elif way < 0.85:
            del holder[key]
        elif isinstance(holder, dict):
            holder[str(_any(WORDS, rng))] = holder.pop(key)
    if rng.random() < 0.03:
        tree = _any(VALUES, rng)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _holders(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        yield tree
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _holders(item)


def _any(values: list[Any], rng: Random) -> Any:
    return copy.deepcopy(values[int(rng.integers(0, len(values)))])


def table_of(content: bytes, rng: Random) -> bytes:
    """Cells of a TSV replaced, rows and columns doubled, dropped or shortened; or its bytes."""
    if rng.random() < 0.35:
        return bytes_of(content, rng)
    lines = [line.split("\t") for line in content.decode().split("\n")]
    for _ in range(int(rng.integers(1, 5))):
        row = int(rng.integers(0, len(lines)))
        cell = int(rng.integers(0, len(lines[row]))) if lines[row] else 0
        way = int(rng.integers(0, 10))
        if way < 6 and lines[row]:
            lines[row][cell] = str(_any(WORDS, rng))
        elif way == 6:
            lines.insert(row, list(lines[row]))
        elif way == 7 and len(lines) > 1:
            del lines[row]
        elif way == 8:
            lines[row] = lines[row][:cell]
        else:
            lines[row].insert(cell, str(_any(WORDS, rng)))
    ending = str(rng.choice(["\n", "\n", "\n", "\r\n", "\r"]))
    return ending.join("\t".join(line) for line in lines).encode("utf-8", "surrogatepass")


def toml_of(content: bytes, rng: Random) -> bytes:
    """Values of TOML lines replaced, lines doubled or dropped; or its bytes changed."""
    if rng.random() < 0.3:
        return bytes_of(content, rng)
    lines = content.decode().split("\n")
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, len(lines)))
        way = rng.random()
        key, equals, _ = lines[at].partition(" = ")
        if way < 0.7 and equals:
            value = _any(VALUES, rng)
            written = "nan" if value != value else json.dumps(value).replace("Infinity", "inf")
            lines[at] = f"{key} = {written.replace('null', '{}').replace(': ', ' = ')}"
        elif way < 0.85:
            del lines[at]
        else:
            lines.insert(at, lines[at])
        if not lines:
            break
    return "\n".join(lines).encode("utf-8", "surrogatepass")


FIELDS: dict[str, tuple[int, str]] = {
    "sizeof_hdr": (0, "i"), "dim_info": (39, "b"),
    **{f"dim{n}": (40 + 2 * n, "h") for n in range(8)},
    "intent": (68, "h"), "datatype": (70, "h"), "bitpix": (72, "h"),
    **{f"pixdim{n}": (76 + 4 * n, "f") for n in range(8)}, "vox_offset": (108, "f"),
    "slope": (112, "f"), "inter": (116, "f"), "units": (123, "b"), "cal_max": (124, "f"),
    "qform_code": (252, "h"), "sform_code": (254, "h"),
    **{f"quatern{n}": (256 + 4 * n, "f") for n in range(6)},
    **{f"srow{n}": (280 + 4 * n, "f") for n in range(12)}, "magic": (344, "i"),
}  # fmt: skip
NUMBERS = [0, 1, 2, -1, 3, 7, 8, 64, 127, 255, 1024, 32767, -32768, 1e-30, 1e30, 1e-3, 0.5,
           -0.5, float("nan"), float("inf"), -float("inf"), 2.0**31, 128, 256, 2304]  # fmt: skip


def nifti_of(content: bytes, rng: Random) -> bytes:
    """Header fields set to odd values; bytes changed; the file cut or packed."""
    data = bytearray(content)
    way = rng.random()
    if way < 0.7:
        names = list(FIELDS)
        for _ in range(int(rng.integers(1, 4))):
            offset, kind = FIELDS[names[int(rng.integers(0, len(names)))]]
            value = _any(NUMBERS, rng)
            if kind != "f":
                size = {"b": 8, "h": 16, "i": 32}[kind]
                value = 0 if value != value or abs(value) > 2**40 else int(value)
                value = (value + 2 ** (size - 1)) % 2**size - 2 ** (size - 1)
            with np.errstate(over="ignore"):
                data[offset : offset + struct.calcsize(kind)] = struct.pack(f"<{kind}", value)
    elif way < 0.8:
        for _ in range(int(rng.integers(1, 8))):
            data[int(rng.integers(0, 352))] = int(rng.integers(0, 256))
    elif way < 0.9:
        data = data[: int(rng.integers(0, len(data)))]
    else:
        at = int(rng.integers(352, len(data) - 64))
        data[at : at + 64] = rng.bytes(64)
    if rng.random() < 0.3:
        packed = bytearray(gzip.compress(bytes(data), 1, mtime=0))
        if rng.random() < 0.5:
            packed = bytearray(bytes_of(bytes(packed), rng))
        return bytes(packed)
    return bytes(data)


def tensors_of(content: bytes, rng: Random) -> bytes:
    """The JSON header of safetensors changed, its length field too, or the bytes behind it."""
    size = struct.unpack("<Q", content[:8])[0]
    head, rest = content[8 : 8 + size], content[8 + size :]
    way = rng.random()
    if way < 0.6:
        head = json_of(head, rng)
    elif way < 0.8:
        rest = bytes_of(rest, rng)
    length = len(head) if rng.random() < 0.9 else int(_any([0, 1, 2**63, 2**40, 7], rng))
    return struct.pack("<Q", length) + head + rest


def bundle_of(content: bytes, rng: Random) -> bytes:
    """The zip's bytes changed, or the card and the names inside it."""
    if rng.random() < 0.5:
        return bytes_of(content, rng)
    out = io.BytesIO()
    names = ["../x.toml", "/tmp/x.safetensors", "a/b.tsv", "card.toml", ".hidden.tsv", "x.py"]
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith(".toml"):
                data = toml_of(data, rng)
            name = str(rng.choice(names)) if rng.random() < 0.2 else entry.filename
            new.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()
