"""The check of the form that a client wants an answer in; a grammar for the router comes out.

OpenAI's ``response_format`` and vLLM's ``structured_outputs``; llguidance reads both as grammars.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.errors import InvalidRequestError
from router.gateway import checks
from router.gateway.form_costs import MAX_REPEATS, most_repeats, schema_fault
from router.gateway.lark_costs import lark_fault
from router.gateway.schemas import has_instance
from router.grammar_limits import grammar_pool, parser_limits

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

GRAMMAR_FIELDS = ("response_format", "structured_outputs")
KINDS = ("json", "regex", "choice", "grammar", "json_object")
"""The forms of ``structured_outputs``, of which one is given."""
WHITESPACE_FIELDS = ("disable_any_whitespace", "whitespace_pattern")
WHITESPACE = r" |\n {0,16}"
"""Between JSON's tokens: nothing, a space, or a new line with its indentation. With any whitespace,
as llguidance has it, some models never come to an end."""
MAX_GRAMMAR_BYTES = 64 << 10
MAX_CHOICES = 1024
Checked = TypeVar("Checked")
_OF_JSON_SCHEMA: Mapping[str, Callable[[object, str], object]] = {
    "name": checks.text,
    "description": checks.text,
    "strict": checks.boolean,
}
"""The checks of what changes no answer: every answer has the schema's form."""
_OF_TREE = re.compile(r"^[ \t]*[?!]+(?=[a-z_]\w*\s*:(?!:))", re.MULTILINE)
"""Lark's marks before a rule's name, which shape its trees and not the text; llguidance takes a
grammar with one before ``start`` for GBNF."""
MAX_DEPTH = 100
"""How deep a schema may be nested."""


def asks_form(given: Mapping[str, object]) -> bool:
    """Return whether any field asks for a form, or has schemas, whose check may take long."""
    return any(given.get(name) is not None for name in (*GRAMMAR_FIELDS, "tools"))


async def checked(is_slow: bool, check: Callable[[], Checked]) -> Checked:
    """Return what a check returns; a slow one runs beside the event loop."""
    return await asyncio.to_thread(check) if is_slow else check()


def check_grammar(
    given: Mapping[str, object], path: Callable[[str], str], eos_token_ids: Sequence[int]
) -> str:
    """Return the grammar among a client's sampling fields, empty where there is none.

    ``path`` gives the client's name of a field. Raises :class:`InvalidRequestError` for a form that
    is unknown, too large or not supported, with the keyword at fault.
    """
    names = [name for name in GRAMMAR_FIELDS if name in given]
    if len(names) > 1:
        raise InvalidRequestError(f"cannot be given together with {path(names[0])}", path(names[1]))
    if not names:
        return ""
    name, where = names[0], path(names[0])
    grammar = _OF_FIELD[name](_mapping(given[name], where), where)
    if grammar and not eos_token_ids:
        raise InvalidRequestError("this model has no token that ends an answer", where)
    if grammar and given.get("ignore_eos"):
        raise InvalidRequestError("must be false where an answer has a form", path("ignore_eos"))
    return grammar


def check_schema(schema: object, where: str) -> str:
    """Return the grammar of a JSON schema; refuses one as :func:`check_grammar` does."""
    return _of_schema(schema, {}, where)


def check_whole(grammar: str, where: str) -> str:
    """Return a grammar that llguidance can follow, within its limits."""
    _check_size(grammar, where)
    if reason := _fault_of(grammar):
        raise InvalidRequestError(_line(reason), where)
    return grammar


def _of_response_format(given: Mapping[str, Any], where: str) -> str:
    kind = given.get("type")
    if kind in ("text", "json_object"):
        _check_names(given, ("type",), where)
        return "" if kind == "text" else _of_schema({"type": "object"}, {}, where)
    if kind != "json_schema":
        allowed = "text, json_object or json_schema"
        raise InvalidRequestError(checks.wrong(kind, allowed), f"{where}.type")
    _check_names(given, ("type", "json_schema"), where)
    inner = f"{where}.json_schema"
    spec = _mapping(given.get("json_schema"), inner)
    _check_names(spec, ("name", "description", "schema", "strict"), inner)
    for name, check in _OF_JSON_SCHEMA.items():
        if spec.get(name) is not None:
            check(spec[name], f"{inner}.{name}")
    return _of_schema(spec.get("schema"), {}, f"{inner}.schema")


def _of_structured_outputs(given: Mapping[str, Any], where: str) -> str:
    given = {name: value for name, value in given.items() if value is not None}
    _check_names(given, (*KINDS, *WHITESPACE_FIELDS), where)
    kinds = [kind for kind in KINDS if kind in given]
    if len(kinds) != 1:
        raise InvalidRequestError(f"must have one of {', '.join(KINDS)}", where)
    [kind] = kinds
    value, inner = given[kind], f"{where}.{kind}"
    options = _whitespace(given, where)
    if options and kind not in ("json", "json_object"):
        raise InvalidRequestError("is allowed only with json or json_object", f"{where}.{kind}")
    if kind == "json_object":
        is_wanted = checks.boolean(value, inner)
        return _of_schema({"type": "object"}, options, inner) if is_wanted else ""
    if kind == "json":
        return _of_schema(_parsed(value, inner), options, inner)
    if kind == "choice":
        return check_whole(_of_choices(value, inner), inner)
    text = checks.text(value, inner)
    if not text:
        raise InvalidRequestError("is empty", inner)
    if kind == "regex":
        from llguidance import LLMatcher

        _check_repeats(text, inner)
        return check_whole(LLMatcher.grammar_from_regex(text), inner)
    return check_whole(_of_grammar(text, inner), inner)


_OF_FIELD: Mapping[str, Callable[[Mapping[str, Any], str], str]] = {
    "response_format": _of_response_format,
    "structured_outputs": _of_structured_outputs,
}


def _whitespace(given: Mapping[str, Any], where: str) -> JsonCompileOptions:
    """Return llguidance's options of the whitespace between JSON's tokens that a client wants."""
    options: JsonCompileOptions = {}
    name = "disable_any_whitespace"
    if given.get(name) is not None and checks.boolean(given[name], f"{where}.{name}"):
        options["whitespace_flexible"] = False
    if given.get("whitespace_pattern") is not None:
        name = "whitespace_pattern"
        pattern = checks.text(given[name], f"{where}.{name}")
        _check_repeats(pattern, f"{where}.{name}")
        options["whitespace_pattern"] = pattern
    return options


def _of_schema(schema: object, options: JsonCompileOptions, where: str) -> str:
    from llguidance import LLMatcher

    if not isinstance(schema, dict):
        raise InvalidRequestError(checks.wrong(schema, "a JSON schema, a mapping"), where)
    if "x-guidance" in schema:
        raise InvalidRequestError("is not supported", f"{where}.x-guidance")
    options = options or {"whitespace_pattern": WHITESPACE}
    try:
        checks.text(json.dumps(schema, ensure_ascii=False), where)
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except (ValueError, RecursionError) as error:  # a very large number, a very deep schema
        raise InvalidRequestError(_line(str(error)), where) from None
    _check_size(grammar, where)
    if fault := schema_fault(schema):
        raise InvalidRequestError(fault, where)
    if not has_instance(schema, MAX_DEPTH):
        raise InvalidRequestError(
            f"has no finite instance, or is nested deeper than {MAX_DEPTH} levels", where
        )
    return check_whole(grammar, where)


def _parsed(value: object, where: str) -> object:
    """Return a schema that is given as JSON or as its text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InvalidRequestError("is not JSON", where) from None


def _of_choices(value: object, where: str) -> str:
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(checks.wrong(value, "a list of at least one text"), where)
    if len(value) > MAX_CHOICES:
        raise InvalidRequestError(f"has {len(value)} texts; at most {MAX_CHOICES}", where)
    texts = [checks.text(each, f"{where}[{place}]") for place, each in enumerate(value)]
    if "" in texts:
        raise InvalidRequestError("is empty", f"{where}[{texts.index('')}]")
    quoted = (json.dumps(text, ensure_ascii=False) for text in texts)
    return "start: " + " | ".join(quoted).replace("\x7f", "\\u007f")


def _of_grammar(text: str, where: str) -> str:
    """Return a grammar of Lark or of GBNF (llama.cpp) as one of Lark."""
    from llguidance import grammar_from

    _check_size(text, where)
    if "%json" in text:  # llguidance's own; its schemas would not be looked at
        raise InvalidRequestError("%json is not supported; use the form json", where)
    try:
        grammar = grammar_from("grammar", _OF_TREE.sub("", text))
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(_line(str(error)), where) from None
    if fault := lark_fault(grammar):
        raise InvalidRequestError(fault, where)
    return grammar


def _check_repeats(text: str, where: str) -> None:
    if most_repeats(text) > MAX_REPEATS:
        raise InvalidRequestError(f"repeats a part more than {MAX_REPEATS} times", where)


def _check_size(grammar: str, where: str) -> None:
    if len(grammar.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidRequestError(f"is larger than {MAX_GRAMMAR_BYTES} bytes", where)


@functools.lru_cache(maxsize=256)
def _fault_of(grammar: str) -> str:
    """Return why a grammar cannot be followed, empty where it can."""
    from llguidance import LLMatcher

    with grammar_pool() as pool:
        checked = pool.submit(
            LLMatcher.validate_grammar_with_warnings, grammar, limits=parser_limits()
        )
        is_error, told = checked.result()
    return (told[0] or "it is not supported") if is_error else ""


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(checks.wrong(value, "a mapping"), where)
    return value


def _check_names(given: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for name in given:
        if name not in allowed:
            raise InvalidRequestError(
                f"unknown field; allowed: {', '.join(allowed)}", f"{where}.{name}"
            )
