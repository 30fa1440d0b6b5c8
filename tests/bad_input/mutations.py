"""Strategies that spoil good input: values of JSON and YAML, bytes of files, and the header of a safetensors file."""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

NUMBERS = (
    0, 1, -1, 2, 3, 7, 100, 257, 10**6, 10**7, 10**9, 10**12, 2**63, 10**30, -(10**12), 0.5, -0.5, 1e-300, 1e300,
    math.nan, math.inf, -math.inf,
)  # fmt: skip
TEXTS = (
    "", " ", "a", "0", "1e999", "none", "true", "llama", "gpt2", "LlamaModel", "a" * 100_000, "\x1b[31mred\x1b[0m",
    "\x00", "line\nline\r\n", "\x85\u2028\u202e", "\ud800", "../../outside", "/etc/passwd", "~nobody/here", "{{ a }}",
    "{% for %}", "%s", "é" * 300, "[/bold]",
)  # fmt: skip


def nested(depth: int, kind: type) -> Any:
    """A list of a list of …, or an object of an object of …, so many levels deep."""
    value: Any = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


OTHERS = (
    None, True, False, [], {}, [None], [0], ["a"], [[]], {"": None}, {"a": 1}, [1, 2, 3], ["a", 1, None, {}],
    nested(50, list), nested(50, dict), nested(400, list), list(range(1000)),
)  # fmt: skip
LAST: Any = object()  # in place of a value that is removed

values = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.sampled_from(OTHERS))


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within objects and lists, from the top; at most five of a list or a large object."""
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    pairs = pairs if len(pairs) < 40 else pairs[:5]
    return [path for key, each in pairs for path in [(*above, key), *places(each, (*above, key))]]


def replacements(old: Any) -> st.SearchStrategy[Any]:
    """What takes the place of a value: a hostile one, one near the old value, or the old value in another form."""
    near = [[old], {"value": old}, json.dumps(old), LAST]
    if type(old) in (int, float):
        near += [old + 1, old - 1, old * 2, -old, old // 2, float(old), old / 2]
    if isinstance(old, str):
        near += [old.upper(), old + " ", old[:-1], old * 2]
    if isinstance(old, list):
        near += [old[:-1], old + old, old[::-1]]
    return st.one_of(st.sampled_from(near), values)


@st.composite
def spoiled(draw: Any, content: Any) -> Any:
    """JSON or YAML content in which one to three values were removed, replaced or added."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        found = places(content)
        if not found:
            break
        *above, key = draw(st.sampled_from(found))
        holder = content
        for each in above:
            holder = holder[each]
        value = draw(replacements(holder[key]))
        if value is not LAST:
            holder[key] = copy.deepcopy(value)  # the next change may be within it
        else:
            del holder[key]
        if isinstance(holder, dict) and draw(st.integers(0, 7)) == 0:
            holder[draw(st.sampled_from([text for text in TEXTS if text.isprintable()]))] = copy.deepcopy(draw(values))
    return content


def twice(text: str) -> str:
    """The text of a JSON object in which the first key comes once more, with null."""
    first = next(iter(json.loads(text)), None) if text.lstrip().startswith("{") else None
    return text if first is None else f"{text.rstrip()[:-1]}, {json.dumps(first)}: null}}"


@st.composite
def broken_bytes(draw: Any, content: bytes) -> bytes:
    """The bytes of a file that was cut, flipped, repeated, encoded otherwise, or is another one."""
    how = draw(st.sampled_from(("cut", "flip", "insert", "repeat", "drop", "other", "encoded")))
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    if how == "cut":
        return content[:at]
    if how == "flip":
        changed = bytearray(content or b"\0")
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(changed) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=12)) + content[at:]
    if how == "repeat":
        return content + content[at:]
    if how == "drop":
        return content[:at] + content[at + draw(st.integers(1, 30)) :]
    if how == "encoded":
        text = content.decode("utf-8", "replace")
        return draw(st.sampled_from((b"\xef\xbb\xbf" + content, text.encode("utf-16"), text.encode("utf-32-le"))))
    others = (
        b"", b"{}", b"[]", b"null", b"0", b'"text"', b"<html>404</html>", b"\0" * 64, b"[" * 100_000, b'{"a":' * 50_000,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", b"1" * 5000, b"NaN", b"\xff\xfe",
    )  # fmt: skip
    return draw(st.sampled_from(others))


@st.composite
def broken_json(draw: Any, content: Any) -> bytes:
    """The bytes of a JSON file: mostly of spoiled values, sometimes of a file that is no JSON."""
    text = json.dumps(content)
    how = draw(st.sampled_from(("values", "values", "values", "values", "bytes", "twice")))
    if how == "bytes":
        return draw(broken_bytes(text.encode()))
    text = json.dumps(draw(spoiled(content)))
    return (twice(text) if how == "twice" else text).encode()


# ------------------------------------------------------------------------------------------------------- safetensors


def split_shard(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_shard(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; length: what it says of its header, by default the truth."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@st.composite
def broken_shard(draw: Any, content: bytes) -> bytes:
    """The bytes of a safetensors file: with another header, another length of it, other numbers, or cut and flipped."""
    header, data = split_shard(content)
    how = draw(st.sampled_from(("header", "header", "header bytes", "length", "numbers", "data", "bytes", "renamed")))
    if how == "bytes":
        return draw(broken_bytes(content))
    encoded = json.dumps(header).encode()
    if how == "header":
        return join_shard(json.dumps(draw(spoiled(header))).encode(), data)
    if how == "header bytes":
        return join_shard(draw(broken_bytes(encoded)), data)
    if how == "length":
        lengths = (0, 1, 8, len(encoded) - 1, len(encoded) + 1, len(content), 2**31, 2**63, 2**64 - 1)
        return join_shard(encoded, data, draw(st.sampled_from(lengths)))
    if how == "renamed":
        name = draw(st.sampled_from([name for name in header if name != "__metadata__"]))
        texts = [text for text in TEXTS if text.isascii()]
        header[draw(st.sampled_from([name + "x", f"module.{name}", *texts]))] = header.pop(name)
        return join_shard(json.dumps(header).encode(), data)
    changed = bytearray(data)
    if how == "numbers":
        numbers = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, 0.0)
        at = 4 * draw(st.integers(0, len(data) // 4 - 1))
        changed[at : at + 4] = struct.pack("<f", draw(st.sampled_from(numbers)))
        return join_shard(encoded, bytes(changed))
    return join_shard(encoded, draw(broken_bytes(data)))


def one_of_files(files: dict[str, Callable[[bytes], st.SearchStrategy[bytes]]], contents: dict[str, bytes]) -> Any:
    """A file's name, and its spoiled bytes."""
    return st.one_of([st.tuples(st.just(name), spoil(contents[name])) for name, spoil in files.items()])
