"""Grammars of tool calls in a model's own format, as llguidance reads them (its Lark notation).

Qwen3-Coder's calls have a schema's values as plain text between marks; all others have JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from cluster.errors import InvalidRequestError, shown
from router.gateway.input.form_costs import MAX_REPEATS, mappings
from router.gateway.input.grammar import WHITESPACE
from router.gateway.input.request.parts import Function
from router.gateway.input.schemas import target
from router.gateway.input.tools import formats
from router.gateway.input.tools.definitions import ToolUse
from router.gateway.input.tools.formats import FAMILIES, ChatFormat, Family
from router.gateway.input.tools.xml_values import CONSTANTS, TEXT, is_of, json_of, kinds_of


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


def grammar_of(format_: ChatFormat, use: ToolUse, prompt: str, form: str) -> str:
    """Return the grammar of an answer that may call tools, or must.

    ``form`` is the grammar of an answer without calls, or empty for any text. Reasoning may come
    before all else, and does where the prompt opens it. Raises :class:`InvalidRequestError` for a
    schema that the model's format of calls cannot be held to.
    """
    rules, family = Rules(format_.tokens), FAMILIES[format_.calls]
    if "{id}" in family.written:
        rules.add("ID", "/[a-zA-Z0-9]{9}/")
    calls = [_call(rules, family, use, number) for number in range(len(use.callable))]
    if format_.calls == "harmony":
        start = _channels(rules, use, calls, bool(form))
    else:
        rules.add("call", " | ".join(calls))
        thought = _thought(rules, format_.is_opened(prompt)) if format_.thinks else ""
        start = _between_marks(rules, family, use, bool(form), thought)
    lark = "\n".join([f"start: {start}", *rules.lines])
    if not form or use.is_required:
        return lark
    [own] = json.loads(form)["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**own, "name": "form"}]})


def _call(rules: Rules, family: Family, use: ToolUse, number: int) -> str:
    """Add a rule for a call of a tool, without the marks around it; returns its name."""
    tool = use.callable[number]
    if family.is_xml:
        where = f"tools[{use.tools.index(tool)}].function.parameters"
        arguments = parameters_rule(rules, number, tool, where)
    else:
        arguments = json_rule({"type": "object", **tool.parameters})
    written = family.written.replace("{name}", tool.name)
    return rules.add(f"call_{number}", rules.text(written, arguments))


def _thought(rules: Rules, is_opened: bool) -> str:
    rest = rules.up_to("thought_rest", formats.THINK_ENDS)
    opens = "" if is_opened else rules.text(formats.THINK)
    return rules.add("thought", f"{opens} {rest} BLANKS") + ("" if is_opened else "?")


def _between_marks(rules: Rules, family: Family, use: ToolUse, has_form: bool, thought: str) -> str:
    first = family.around[0] if family.around else family.opens
    before, between, after = (rules.text(part) for part in family.listed)
    call = f"call {rules.text(family.closes)}"
    is_repeated = use.is_parallel and (use.is_required or has_form or rules.has(first))
    more = f"({between} {call})*" if is_repeated else ""
    rest = rules.add("calls_rest", " ".join(filter(None, (before, call, more, after))))
    calls = f"{rules.text(first)} {rest}"
    if use.is_required:
        return f"{thought} {calls}"
    if has_form:
        return f"{thought} ({calls} | @form)"
    if rules.has(first):
        text = rules.text_without("TEXT", first, family.opens)
        return f"{thought} {text}? ({calls} {text}?)?"
    # The text before a call is that of reasoning too.
    lead = rules.up_to("lead", first)
    rules.add("TEXT", r"/(.|\n)+/")
    return f"({lead} {rest}){'*' if use.is_parallel else '?'} TEXT?"


def _channels(rules: Rules, use: ToolUse, calls: list[str], has_form: bool) -> str:
    """Return the messages of gpt-oss: reasoning, and then one call or the answer."""
    text = rules.text_without("TEXT", *formats.HARMONY)
    opens = rules.text(f"{formats.CHANNEL}analysis{formats.MESSAGE}")
    ends = rules.text(f"{formats.END}{formats.START}assistant")
    analysis = rules.add("analysis", f"{opens} {text}? {ends}")
    choices = [f"{rules.text(formats.CHANNEL)} {call}" for call in calls]
    if not use.is_required:
        final, answer = f"{formats.CHANNEL}final{formats.MESSAGE}", f"{text}?"
        choices.append(f"{rules.text(final)} {'@form' if has_form else answer}")
    return f"{analysis}? ({' | '.join(choices)})"


MAX_PARTS = 256
"""The most schemas that a parameter's schema is made of, each counted for every reference to it."""
_MAX_NESTED = 250
"""How deep groups of a pattern are followed; llguidance takes none that are as deep."""
VALUE_ENDS = "</parameter>"
_ENDS = f"\n{VALUE_ENDS}"
_SHARED = ("$defs", "definitions")
"""The schemas that a tool's parameters refer to."""
_TO_SHARED = tuple(f"#/{name}/" for name in _SHARED)
_ANY = r"(.|\n)*"
_NO_MARK_WITHIN = rf"~/{_ANY}{escaped(VALUE_ENDS)}(.|\n)+/"
_CONSTANT = "|".join("".join(f"[{c}{c.upper()}]" for c in word) for word in CONSTANTS)
_NUMBERS_AND_BRACKETS = frozenset({"number", "integer", "array", "object"})
_NOTES = {
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default",
    "examples", "deprecated", "readOnly", "writeOnly",
}  # fmt: skip
"""Keywords that hold a value to nothing."""
_OF_TOOL = {"type", "properties", "required", "additionalProperties"}
_OF_TYPED = {
    *_OF_TOOL, "minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf", "items", "prefixItems", "minItems", "maxItems", "uniqueItems",
    "patternProperties", "minProperties", "maxProperties",
}  # fmt: skip
"""Those that hold a text, and those that hold only values of other kinds."""


def parameters_rule(rules: Rules, number: int, tool: Function, where: str) -> str:
    """Return the grammar of the parameters of a call, which is the ``number``-th.

    They come in the order of the schema. Raises :class:`InvalidRequestError` with the place of a
    keyword to which plain text between marks cannot be held.
    """
    schema = tool.parameters
    _check_keywords(schema, _NOTES | _OF_TOOL, where)
    properties, required = schema.get("properties", {}), schema.get("required", ())
    for name in required:
        if name not in properties:
            _refuse(f"names {name}, which is not a property", f"{where}.required")
    body = []
    for place, (key, value) in enumerate(properties.items()):
        if value is False:
            continue
        inner = f"{where}.properties.{key}"
        if not re.fullmatch(r"[^<>\n]{1,256}", key):
            _refuse("is not a name that an XML tag can hold", inner)
        values = _Values(rules, f"{number}_{place}", schema, kinds_of(value, schema), inner)
        alternatives = " | ".join(values.of(value, inner))
        opens = quoted(f"<parameter={key}>\n")
        rule = rules.add(f"parameter_{number}_{place}", f'{opens} ({alternatives}) "\\n"')
        body.append(rule if key in required else f"{rule}?")
    return " ".join(body)


@dataclass
class _Values:
    """The alternatives of one parameter's value, each up to the mark behind it.

    ``kinds`` are those of the whole schema: what reads as another kind is no text.
    """

    rules: Rules
    name: str
    root: Mapping[str, Any]
    kinds: frozenset[str]
    where: str
    num_texts: int = 0
    num_parts: int = 0

    def of(self, schema: Any, where: str) -> list[str]:
        """Return the alternatives of a schema."""
        self.num_parts += 1
        if self.num_parts > MAX_PARTS:
            reason = f"refers to itself, or to over {MAX_PARTS} schemas, in XML tool calls"
            _refuse(reason, self.where)
        if schema is False:
            _refuse("allows nothing, which is not supported in XML tool calls", where)
        if not isinstance(schema, Mapping):
            schema = {}
        if self.kinds.isdisjoint(TEXT):
            return [self._json(schema)]
        if "$ref" in schema:
            _check_keywords(schema, _NOTES | {"$ref"}, where)
            return self._referred(schema["$ref"], where)
        for name in ("enum", "const"):
            if name in schema:
                _check_keywords(schema, _NOTES | {name, "type"}, where)
                return self._listed(schema, f"{where}.{name}")
        for name in ("anyOf", "oneOf"):  # of which llguidance takes those of disjoint branches
            if name in schema:
                _check_keywords(schema, _NOTES | {name}, where)
                branches = enumerate(schema[name])
                inner = [self.of(each, f"{where}.{name}[{place}]") for place, each in branches]
                return [alternative for found in inner for alternative in found]
        return self._typed(schema, where)

    def _referred(self, reference: object, where: str) -> list[str]:
        found = target(reference, self.root)
        if found is None:  # an anchor, which llguidance knows
            reason = f"refers to {shown(reference)}, which XML tool calls cannot resolve"
            _refuse(reason, f"{where}.$ref")
        return self.of(found, where)

    def _typed(self, schema: Mapping[str, Any], where: str) -> list[str]:
        kinds = kinds_of(schema, self.root)
        words = [word for word, kind in CONSTANTS.items() if kind in kinds and word != "none"]
        found = [quoted(f"{word}{_ENDS}") for word in words]
        if others := sorted(kinds & _NUMBERS_AND_BRACKETS):
            found.append(self._json({**schema, "type": others}))
        if not kinds.isdisjoint(TEXT):
            _check_keywords(schema, _NOTES | _OF_TYPED, where)
            found.append(self._text(schema, where))
        return found

    def _json(self, schema: Mapping[str, Any]) -> str:
        own = {name: part for name, part in schema.items() if name not in _SHARED}
        shared = {name: self.root[name] for name in _SHARED if name in self.root}
        for part in mappings([own, shared]):
            reference = part.get("$ref")
            if isinstance(reference, str) and not unquote(reference).startswith(_TO_SHARED):
                # The rule has the shared schemas, and not the whole of which this is a part.
                reason = f"refers to {shown(reference)}, not to {_TO_SHARED[0]}…"
                _refuse(f"{reason}, which is not supported in XML tool calls", self.where)
        return f"{json_rule({**own, **shared})} {quoted(_ENDS)}"

    def _listed(self, schema: Mapping[str, Any], where: str) -> list[str]:
        """Return alternatives of values, of which each must read as itself."""
        allowed = kinds_of({"type": schema["type"]}, {}) if "type" in schema else None
        found = []
        for value in schema.get("enum", [schema.get("const")]):
            text = value if isinstance(value, str) else json.dumps(value)
            is_read = VALUE_ENDS not in text and (allowed is None or is_of(value, allowed))
            if is_read and json.loads(json_of(text, self.kinds)) == value:
                found.append(quoted(f"{text}{_ENDS}"))
        if not found:
            _refuse("has no value that an XML tag can hold", where)
        return found

    def _text(self, schema: Mapping[str, Any], where: str) -> str:
        """Add a rule for a text up to its mark; returns its name."""
        ends = rf"\n{escaped(VALUE_ENDS)}"
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        for name, bound in (("minLength", least), ("maxLength", most or 0)):
            if bound > MAX_REPEATS:
                reason = f"is {bound}; at most {MAX_REPEATS} in XML tool calls"
                _refuse(reason, f"{where}.{name}")
        parts = [rf"/(.|\n){{{least},{most}}}{ends}/", _NO_MARK_WITHIN]
        if "pattern" in schema:
            parts.append(f"/{_whole(schema['pattern'], f'{where}.pattern')}{ends}/")
        if self.kinds & _NUMBERS_AND_BRACKETS:
            parts.append(rf"~/[ \t\n]*[-0-9\[\{{]{_ANY}/")
        if self.kinds != TEXT:
            parts.append(rf"~/[ \t\n]*({_CONSTANT})[ \t\n]*{ends}/")
        self.num_texts += 1
        return self.rules.add(f"TEXT_{self.name}_{self.num_texts}", " & ".join(parts))


def _whole(pattern: str, where: str) -> str:
    """Return a schema's pattern, which a text has anywhere, as one of the whole text."""
    bare = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "x", pattern)
    begin, end = bare.startswith("^"), bare.endswith("$")
    inner = bare.removeprefix("^").removesuffix("$")
    flat = inner
    for _ in range(_MAX_NESTED):
        flat, num_found = re.subn(r"\([^()]*\)", "x", flat)
        if not num_found:
            break
    if "^" in inner or "$" in inner or ("|" in flat and (begin or end)):
        _refuse("has ^ or $ within it, which is not supported in XML tool calls", where)
    core = pattern[int(begin) : len(pattern) - int(end)].replace("\n", r"\n")
    core = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", core)
    return f"{'' if begin else _ANY}({core}){'' if end else _ANY}"


def _check_keywords(schema: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in schema:
        if name not in known:
            _refuse("is not supported in XML tool calls that have a grammar", f"{where}.{name}")


def _refuse(reason: str, where: str) -> None:
    raise InvalidRequestError(reason, where)
