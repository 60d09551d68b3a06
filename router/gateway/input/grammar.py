"""The check of the form that a client wants an answer in; a grammar for the router comes out.

OpenAI's ``response_format`` and vLLM's ``structured_outputs``; llguidance reads both as grammars.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.errors import InvalidRequestError
from router.config.grammar_limits import grammar_pool, parser_limits
from router.gateway.input.form_costs import MAX_REPEATS, lark_fault, most_repeats, schema_fault
from router.gateway.input.request import base
from router.gateway.input.request.model import Generation, OpenAiRequest
from router.gateway.input.request.parts import (
    KINDS,
    ResponseFormat,
    SchemaFormat,
    StructuredOutputs,
)
from router.gateway.input.schemas import has_instance

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

WHITESPACE = r" |\n {0,16}"
"""Between JSON's tokens: nothing, a space, or a new line with its indentation. With any whitespace,
as llguidance has it, some models never come to an end."""
MAX_GRAMMAR_BYTES = 64 << 10
_OF_TREE = re.compile(r"^[ \t]*[?!]+(?=[a-z_]\w*\s*:(?!:))", re.MULTILINE)
"""Lark's marks before a rule's name, which shape its trees and not the text; llguidance takes a
grammar with one before ``start`` for GBNF."""
MAX_DEPTH = 100
"""How deep a schema may be nested."""


def check_grammar(asked: Generation, eos_token_ids: Sequence[int]) -> str:
    """Return the grammar of the form that a client asks for, empty where there is none.

    Raises :class:`InvalidRequestError` for a form that is too large or not supported, with the
    keyword at fault.
    """
    form = asked.structured_outputs
    format_ = asked.response_format if isinstance(asked, OpenAiRequest) else None
    where = "response_format" if form is None else "structured_outputs"
    if form is not None and format_ is not None:
        raise InvalidRequestError("cannot be given together with response_format", where)
    grammar = _of_structured_outputs(form) if form is not None else _of_response_format(format_)
    if grammar and not eos_token_ids:
        raise InvalidRequestError("this model has no end-of-text token", where)
    if grammar and asked.ignore_eos:
        raise InvalidRequestError("must be false when the output is constrained", "ignore_eos")
    return grammar


def check_whole(grammar: str, where: str) -> str:
    """Return a grammar that llguidance can follow, within its limits."""
    _check_size(grammar, where)
    if reason := _fault_of(grammar):
        raise InvalidRequestError(_line(reason), where)
    return grammar


def _of_response_format(given: ResponseFormat | None) -> str:
    if isinstance(given, SchemaFormat):
        return check_schema(given.json_schema.schema_, "response_format.json_schema.schema")
    is_text = given is None or given.type == "text"
    return "" if is_text else check_schema({"type": "object"}, "response_format")


def _of_structured_outputs(given: StructuredOutputs) -> str:
    where = "structured_outputs"
    forms = {kind: getattr(given, "json_" if kind == "json" else kind) for kind in KINDS}
    kinds = [kind for kind, form in forms.items() if form is not None]
    if len(kinds) != 1:
        raise InvalidRequestError(f"must have exactly one of {', '.join(KINDS)}", where)
    [kind] = kinds
    inner = f"{where}.{kind}"
    options = _whitespace(given, where)
    if options and kind not in ("json", "json_object"):
        raise InvalidRequestError("is allowed only with json or json_object", inner)
    if given.json_object is not None:
        return check_schema({"type": "object"}, inner, options) if given.json_object else ""
    if given.json_ is not None:
        return check_schema(_parsed(given.json_, inner), inner, options)
    if given.choice is not None:
        quoted = (json.dumps(text, ensure_ascii=False) for text in given.choice)
        return check_whole("start: " + " | ".join(quoted).replace("\x7f", "\\u007f"), inner)
    if given.regex is not None:
        from llguidance import LLMatcher

        _check_repeats(given.regex, inner)
        return check_whole(LLMatcher.grammar_from_regex(given.regex), inner)
    return check_whole(_of_grammar(given.grammar or "", inner), inner)


def _whitespace(given: StructuredOutputs, where: str) -> JsonCompileOptions:
    """Return llguidance's options of the whitespace between JSON's tokens that a client wants."""
    options: JsonCompileOptions = {}
    if given.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if given.whitespace_pattern is not None:
        _check_repeats(given.whitespace_pattern, f"{where}.whitespace_pattern")
        options["whitespace_pattern"] = given.whitespace_pattern
    return options


def check_schema(schema: object, where: str, options: JsonCompileOptions | None = None) -> str:
    """Return the grammar of a JSON schema; refuses one as :func:`check_grammar` does."""
    from llguidance import LLMatcher

    if not isinstance(schema, dict):
        raise InvalidRequestError(base.wrong(schema, "a JSON schema, a mapping"), where)
    if "x-guidance" in schema:
        raise InvalidRequestError("is not supported", f"{where}.x-guidance")
    options = options or {"whitespace_pattern": WHITESPACE}
    try:
        base.text(json.dumps(schema, ensure_ascii=False), where)
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


def _of_grammar(text: str, where: str) -> str:
    """Return a grammar of Lark or of GBNF (llama.cpp) as one of Lark."""
    from llguidance import grammar_from

    _check_size(text, where)
    if "%json" in text:  # llguidance's own; its schemas would not be looked at
        raise InvalidRequestError("%json is not supported; use the kind json", where)
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
