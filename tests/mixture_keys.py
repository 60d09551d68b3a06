"""The keys of ``mixture.yaml`` in ``docs/models.md``, made from the classes that read them.

    python -m tests.mixture_keys [--write]

Prints the tables; with ``--write`` they take the place of those in the document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experts.mixture.spec import MixtureSpec

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- mixture keys: begin -->\n", "<!-- mixture keys: end -->\n"
_WHOLE = "`mixture.yaml`"
_PARTS = {"inputs": "`inputs[]`", "gates": "`gates.NAME`", "experts": "`experts.NAME`",
          "combine": "`combine`", "outputs": "`outputs[]`"}  # fmt: skip
_TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
Schema = Mapping[str, Any]


def tables() -> str:
    """Return a heading, the kinds and a table of keys for the file and for each of its parts."""
    schema = MixtureSpec.model_json_schema()
    definitions = schema["$defs"]
    parts = [_section(_WHOLE, {"": schema}, definitions)]
    for name, heading in _PARTS.items():
        kinds = dict(_kinds(schema["properties"][name], definitions))
        parts.append(_section(heading, kinds, definitions))
    return "\n".join(parts)


def document_with(keys: str, document: str) -> str:
    """Return the document with ``keys`` between its markers."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{keys}\n{END}{after}"


def _kinds(key: Schema, definitions: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield the kinds of a part with their schemas; the only kind of others is empty."""
    inner = key.get("items", key.get("additionalProperties", key))
    if "oneOf" not in inner:
        yield "", _resolved(inner, definitions)
        return
    for option in inner["oneOf"]:
        section = _resolved(option, definitions)
        yield section["properties"]["kind"]["const"], section


def _resolved(schema: Schema, definitions: Schema) -> Schema:
    return definitions[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


def _section(heading: str, kinds: Mapping[str, Schema], definitions: Schema) -> str:
    lines = [f"#### {heading}", ""]
    if len(kinds) == 1:
        [only] = kinds.values()
        lines += [_sentence(only["description"]), ""]
    else:
        lines += ["| `kind` | |", "|---|---|"]
        lines += [f"| `{kind}` | {_sentence(s['description'])} |" for kind, s in kinds.items()]
        lines.append("")
    lines += ["| Key | Kinds | Value | Default | Meaning |", "|---|---|---|---|---|"]
    if len(kinds) == 1:
        lines[-2:] = ["| Key | Value | Default | Meaning |", "|---|---|---|---|"]
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for kind, section in kinds.items():
        for name, key in section["properties"].items():
            if name != "kind":
                row = _row(name, key, section, definitions)
                rows.setdefault(row, []).append(kind)
    for (name, value, default, meaning), having in rows.items():
        which = [] if len(kinds) == 1 else ["all" if len(having) == len(kinds) else _list(having)]
        lines.append(f"| {' | '.join([f'`{name}`', *which, value, default, meaning])} |")
    return "\n".join(lines) + "\n"


def _row(name: str, key: Schema, section: Schema, definitions: Schema) -> tuple[str, str, str, str]:
    default = "required" if name in section.get("required", ()) else _default(key.get("default"))
    return name, _value(key, definitions), default, _sentence(key.get("description", ""))


def _value(key: Schema, definitions: Schema) -> str:
    """Return the allowed values of a key, in words."""
    if "$ref" in key or "oneOf" in key:
        return "section"
    if "anyOf" in key:
        kinds = (_value(one, definitions) for one in key["anyOf"] if one.get("type") != "null")
        return " or ".join(dict.fromkeys(kinds))
    if "const" in key:
        return f"`{key['const']}`"
    if "enum" in key:
        return _list(key["enum"])
    if key["type"] == "array":
        inner = _value(key["items"], definitions)
        return "list of sections" if inner == "section" else f"list of {inner}s"
    if key["type"] == "object":
        return "sections by name"
    bounds = [
        text.format(key[name])
        for name, text in (
            ("minimum", "at least {}"), ("exclusiveMinimum", "above {:g}"),
            ("maximum", "at most {:,}"),
        )
        if name in key
    ]  # fmt: skip
    return ", ".join([_TYPES[key["type"]], *bounds])


def _list(values: list[Any]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _sentence(text: str) -> str:
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def _default(value: Any) -> str:
    if value in (None, "", []):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


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
