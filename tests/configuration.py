"""The table of keys in ``docs/configuration.md``, made from the classes that read them.

    python -m tests.configuration [--write]

Prints the tables; with ``--write`` they take the place of those in the document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from router.config.deployment import AppConfig

DOCUMENT = Path(__file__).parent.parent / "docs" / "configuration.md"
BEGIN, END = "<!-- keys: begin -->\n", "<!-- keys: end -->\n"
_KINDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "mapping",
}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "minLength": "",  # an empty text names nothing, which needs no word
}

Schema = Mapping[str, Any]


def tables() -> str:
    """Return a heading, a sentence and a table of keys for each section, outer sections first."""
    schema = AppConfig.model_json_schema()
    definitions = schema["$defs"]
    paths: dict[str, list[str]] = {}
    for path, section in _sections("", schema, definitions):
        paths.setdefault(section["title"], []).append(path)
    parts = []
    for path, section in _sections("", schema, definitions):
        first, *others = sorted(paths[section["title"]], key=len)
        if path == first:  # a section that stands in several places is told of once
            places = f" It stands at {_listed([first, *others])}." if others else ""
            table = _table(path, section, definitions, paths)
            parts.append(f"### {path or 'args'}\n\n{_sentence(section)}{places}\n\n{table}")
    return "\n".join(parts)


def document_with(keys: str, document: str) -> str:
    """Return the document with ``keys`` between its markers."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{keys}\n{END}{after}"


def _sections(path: str, section: Schema, definitions: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield (path, section) of a section and of all that are below it."""
    yield path, section
    for name, key in section["properties"].items():
        found = _section_of(key, definitions)
        if found is not None:
            suffix = "[]" if _is_list(key) else ""
            yield from _sections(f"{path}.{name}{suffix}".strip("."), found, definitions)


def _section_of(key: Schema, definitions: Schema) -> Schema | None:
    shape = _shape(key)
    shape = shape.get("items", shape)
    reference = shape.get("$ref")
    return None if reference is None else definitions[reference.rsplit("/", 1)[1]]


def _shape(key: Schema) -> Schema:
    """Return what a key may be other than absent, or a word that its section's sentence tells."""
    given = [
        one for one in key.get("anyOf", [key]) if one.get("type") != "null" and "const" not in one
    ]
    assert len(given) == 1, f"a key of two kinds: {key}"
    return given[0] | {name: value for name, value in key.items() if name in _BOUNDS}


def _is_list(key: Schema) -> bool:
    return bool(_shape(key).get("type") == "array")


def _sentence(section: Schema) -> str:
    return " ".join(section["description"].replace("``", "`").split())


def _listed(paths: Sequence[str]) -> str:
    return " and ".join(f"`{path}`" for path in paths)


def _table(
    path: str, section: Schema, definitions: Schema, paths: Mapping[str, Sequence[str]]
) -> str:
    lines = ["| Key | Value | Default | Meaning |", "|---|---|---|---|"]
    required = section.get("required", ())
    for name, key in section["properties"].items():
        inner = _section_of(key, definitions)
        if inner is None:
            suffix, kind, default = "", _kind(key), _default(key.get("default"))
            meaning = key["description"]
        else:
            suffix, default = "[]" if _is_list(key) else "", ""
            kind = f"[section](#{_anchor(min(paths[inner['title']], key=len))})"
            meaning = key.get("description") or _sentence(inner)
        if name in required:
            default = "required"
        lines.append(f"| `{name}{suffix}` | {kind} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _anchor(path: str) -> str:
    """Return what GitHub makes of a heading."""
    return "".join(letter for letter in path if letter.isalnum() or letter in "-_")


def _kind(key: Schema) -> str:
    shape = _shape(key)
    if "enum" in shape:
        return ", ".join(f"`{value}`" for value in shape["enum"])
    if shape["type"] == "array":
        return f"list of {_kind(shape['items'])}s"
    least, most = shape.get("minimum"), shape.get("maximum")
    kind = _KINDS[shape["type"]]
    if least is not None and most is not None:
        return f"{kind}, {_number(least)} to {_number(most)}"
    bounds = [text.format(_number(shape[name])) for name, text in _BOUNDS.items() if name in shape]
    return ", ".join([kind, *filter(None, bounds)])


def _number(value: float) -> str:
    return f"{value:,.10g}"


def _default(value: Any) -> str:
    if value is None or value in ({}, []):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value}`" if isinstance(value, str) else _number(value)


def main() -> int:
    """Parse the command line, and print or write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    if parser.parse_args().write:
        before = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(document_with(tables(), before), encoding="utf-8")
    else:
        sys.stdout.write(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
