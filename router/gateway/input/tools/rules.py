"""Rules of grammars as llguidance reads them (its Lark notation)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from router.gateway.input.grammar import WHITESPACE


class Rules:
    """The rules of a grammar; those in capitals are texts.

    A mark that is a token of its own is that token, which a text cannot have. A text is not to
    spell it either, since parsers see only text.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        self.lines = [r"BLANKS: /[ \n]{0,4}/"]

    def has(self, mark: str) -> bool:
        """Return whether a mark is a token of its own."""
        return mark in self._tokens

    def text(self, written: str, arguments: str = "") -> str:
        """Return a text, in which marks may be tokens, and names in braces stand for rules."""
        known = {mark: f"<[{token_id}]>" for mark, token_id in self._tokens.items()}
        known |= {"{blanks}": "BLANKS", "{id}": "ID", "{space}": '" "?', "{arguments}": arguments}
        parts = re.split(f"({'|'.join(map(re.escape, known))})", written)
        return " ".join(known.get(part, quoted(part)) for part in parts if part)

    def add(self, name: str, body: str) -> str:
        """Add a rule; returns its name without its options."""
        self.lines.append(f"{name}: {body}")
        return name.partition("[")[0]

    def text_without(self, name: str, *marks: str) -> str:
        """Add a rule for any text that does not spell a mark; returns its name."""
        spelled = "|".join(map(escaped, marks))
        return self.add(name, rf"/(.|\n)+/ & ~/(.|\n)*({spelled})(.|\n)*/")

    def up_to(self, name: str, mark: str) -> str:
        """Add a rule for any text up to a mark, and the mark; returns its name."""
        if self.has(mark):
            return self.add(name, f"{self.text_without(name.upper(), mark)}? {self.text(mark)}")
        return self.add(f"{name}[lazy]", rf"/(.|\n)*{escaped(mark)}/")


def escaped(mark: str) -> str:
    """Return a text as a part of a regular expression."""
    return re.escape(mark).replace("/", r"\/")


def quoted(text: str) -> str:
    """Return a text as a string of a grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the grammar of JSON of a schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': WHITESPACE}})}"
