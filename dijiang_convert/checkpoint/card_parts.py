"""A model card in parts, so that a new version of it leaves alone what a person wrote or changed.

Parts are the keys of the metadata and the sections of the text. A comment at the end of a card has the hash of every
part as it was written; a part that differs from its hash, or has none, is a person's. One that a person took over to
another card keeps a hash with a + there, and one that was removed by hand keeps it as a sign not to come back.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import DijiangError
from ..files import read_yaml

MARKS = re.compile(r"\n*<!-- dijiang-convert wrote these parts, and leaves alone what was edited: (\{.*\}) -->\s*\Z")
FRONT = re.compile(r"\A---\n(.*?)\n---\n?", re.DOTALL)
YOURS = "+"


@dataclass
class Card:
    """parts: metadata by "key:", sections by their heading, the text before the first one by ""; in their order.

    marks: the hash of each part when it was last written; with `YOURS` at its end where a person had written it.
    """

    parts: dict[str, Any]
    marks: dict[str, str] = field(default_factory=dict)

    def is_yours(self, name: str) -> bool:
        """Whether a person wrote, changed or removed this part."""
        mark = self.marks.get(name, "")
        return (name in self.parts or mark != "") and mark != _hash(self.parts.get(name))

    def is_as_written(self, name: str) -> bool:
        return self.marks.get(name, "").removesuffix(YOURS) == _hash(self.parts.get(name))

    def text(self) -> str:
        metadata = {name[:-1]: value for name, value in self.parts.items() if name.endswith(":")}
        head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1 << 20).strip()
        sections = "\n\n".join(value for name, value in self.parts.items() if not name.endswith(":") and value)
        marks = json.dumps(self.marks, ensure_ascii=True).replace("--", "-\\u002d")
        comment = f"<!-- dijiang-convert wrote these parts, and leaves alone what was edited: {marks} -->"
        return f"---\n{head}\n---\n\n{sections}\n\n{comment}\n"


def written(parts: Mapping[str, Any]) -> Card:
    """A card of which nothing is a person's."""
    return Card(dict(parts), {name: _hash(value) for name, value in parts.items()})


def parse(text: str) -> Card:
    """Raises yaml.YAMLError where the metadata is none."""
    text = text.replace("\r\n", "\n")
    marks: dict[str, str] = {}
    if found := MARKS.search(text):
        marks, text = json.loads(found[1]), text[: found.start()]
    metadata: Any = {}
    if front := FRONT.match(text):
        metadata, text = read_yaml(front[1]), text[front.end() :]
    parts: dict[str, Any] = {f"{key}:": value for key, value in metadata.items()} if isinstance(metadata, dict) else {}
    heading, fenced = "", False
    sections: dict[str, list[str]] = {heading: []}
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            heading = line.strip()
            while heading in sections:  # a space tells two equal headings apart
                heading += " "
            sections[heading] = []
        sections[heading].append(line)
    for heading, lines in sections.items():
        if content := "\n".join(lines).strip():
            parts[heading] = content
    return Card(parts, marks)


def merge(new: Card, old: Card, where: str) -> Card:
    """`new`, with those parts of `old` that are a person's and, where both are, the one changed since the last merge.

    Raises DijiangError, about the card at `where`, for a part that was edited in both.
    """
    merged = Card({})
    order = list(new.parts)
    for before, name in zip(["", *old.parts], old.parts, strict=False):  # parts that a person wrote keep their place
        if name not in order:
            order.insert(order.index(before) + 1 if before in order else len(order), name)
    for name in [*order, *(name for name in old.marks if name not in order)]:
        mine, theirs = new.is_yours(name), old.is_yours(name)
        chosen, yours = new, mine
        if theirs and new.parts.get(name) != old.parts.get(name):
            yours = True
            if not mine or not old.is_as_written(name):
                chosen = old
                if mine and _hash(new.parts.get(name)) != old.marks.get(name, "").removesuffix(YOURS):
                    part = name.rstrip(":").removeprefix("## ") or "the text at its top"
                    raise DijiangError(f"README.md: {part} was edited here and {where}: make both the same")
        elif theirs:
            yours = True
        if name in chosen.parts:
            merged.parts[name] = chosen.parts[name]
        if name in merged.parts or yours:
            merged.marks[name] = _hash(merged.parts.get(name)) + (YOURS if yours else "")
    return merged


def _hash(value: Any) -> str:
    """The hash of a part. None stands for a part that does not exist; its hash is that of no part."""
    content = json.dumps(value, ensure_ascii=True, sort_keys=True, default=str) if value is not None else ""
    return hashlib.sha256(content.encode()).hexdigest()[:12]
