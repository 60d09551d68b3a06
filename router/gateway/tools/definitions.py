"""The check of a request's tools, and of how they may be called."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import InvalidRequestError
from router.gateway import checks
from router.gateway.grammar import check_schema

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 << 10
"""Of all tools together, as JSON."""
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
_MODES = ("none", "auto", "required")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A checked tool; ``given`` is what the chat template shows."""

    name: str
    parameters: dict[str, Any]
    is_strict: bool
    given: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, those that may be called, and whether one must be."""

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    is_required: bool = False
    is_parallel: bool = True

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar makes sure of the calls."""
        is_limited = len(self.callable) < len(self.tools)
        return self.is_required or is_limited or any(tool.is_strict for tool in self.callable)

    @property
    def given(self) -> list[dict[str, Any]]:
        """The tools as a chat template shows them."""
        return [tool.given for tool in self.tools]


def check_tool_use(given: Mapping[str, object]) -> ToolUse | None:
    """Return the tools among a client's fields, ``None`` where none is given, or may be called.

    Raises :class:`InvalidRequestError` with the place of the part at fault.
    """
    is_parallel = checks.boolean(given.get("parallel_tool_calls", True), "parallel_tool_calls")
    choice = given.get("tool_choice", "auto")
    tools = _tools(given.get("tools", []))
    if not tools:
        if choice not in ("none", "auto"):
            raise InvalidRequestError("is allowed only with tools", "tool_choice")
        return None
    if isinstance(choice, str):
        if choice not in _MODES:
            allowed = f"one of {', '.join(_MODES)}, or a mapping"
            raise InvalidRequestError(checks.wrong(choice, allowed), "tool_choice")
        if choice == "none":
            return None
        return ToolUse(tools, tools, choice == "required", is_parallel)
    return _limited(choice, tools, is_parallel)


def _limited(choice: object, tools: tuple[Tool, ...], is_parallel: bool) -> ToolUse:
    """Return the use of some of the tools, by OpenAI's forms of a choice."""
    spec = mapping(choice, "tool_choice")
    kind = spec.get("type")
    by_name = {tool.name: tool for tool in tools}
    if kind == "function":
        check_names(spec, ("type", "function"), "tool_choice")
        tool = _named(spec.get("function"), by_name, "tool_choice.function")
        return ToolUse(tools, (tool,), True, is_parallel)
    if kind != "allowed_tools":
        raise InvalidRequestError(
            checks.wrong(kind, "function or allowed_tools"), "tool_choice.type"
        )
    check_names(spec, ("type", "allowed_tools"), "tool_choice")
    where = "tool_choice.allowed_tools"
    allowed = mapping(spec.get("allowed_tools"), where)
    check_names(allowed, ("mode", "tools"), where)
    mode, entries = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequestError(checks.wrong(mode, "auto or required"), f"{where}.mode")
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_TOOLS:
        allowed_text = f"a list of 1 to {MAX_TOOLS} tools"
        raise InvalidRequestError(checks.wrong(entries, allowed_text), f"{where}.tools")
    chosen: dict[str, Tool] = {}
    for place, entry in enumerate(entries):
        inner = f"{where}.tools[{place}]"
        function = mapping(entry, inner)
        check_names(function, ("type", "function"), inner)
        check_kind(function.get("type"), f"{inner}.type")
        tool = _named(function.get("function"), by_name, f"{inner}.function")
        chosen[tool.name] = tool
    return ToolUse(tools, tuple(chosen.values()), mode == "required", is_parallel)


def _named(function: object, by_name: Mapping[str, Tool], where: str) -> Tool:
    spec = mapping(function, where)
    check_names(spec, ("name",), where)
    name = spec.get("name")
    if not isinstance(name, str) or name not in by_name:
        raise InvalidRequestError(checks.wrong(name, "the name of a tool"), f"{where}.name")
    return by_name[name]


def _tools(given: object) -> tuple[Tool, ...]:
    if not isinstance(given, list):
        raise InvalidRequestError(checks.wrong(given, "a list of tools"), "tools")
    if len(given) > MAX_TOOLS:
        raise InvalidRequestError(f"has {len(given)} tools; at most {MAX_TOOLS}", "tools")
    try:
        size = len(json.dumps(given))
    except RecursionError:
        raise InvalidRequestError("is nested too deep", "tools") from None
    if size > MAX_TOOLS_BYTES:
        raise InvalidRequestError(f"is larger than {MAX_TOOLS_BYTES} bytes", "tools")
    names: set[str] = set()
    tools: list[Tool] = []
    for place, entry in enumerate(given):
        tool = _tool(entry, f"tools[{place}]")
        if tool.name in names:
            raise InvalidRequestError(
                f"{tool.name} is the name of an earlier tool too", f"tools[{place}].function.name"
            )
        names.add(tool.name)
        tools.append(tool)
    return tuple(tools)


def _tool(entry: object, where: str) -> Tool:
    tool = mapping(entry, where)
    check_names(tool, ("type", "function"), where)
    check_kind(tool.get("type"), f"{where}.type")
    where = f"{where}.function"
    spec = mapping(tool.get("function"), where)
    spec = {name: value for name, value in spec.items() if value is not None}
    check_names(spec, ("name", "description", "parameters", "strict"), where)
    function: dict[str, Any] = {"name": check_name(spec.get("name"), f"{where}.name")}
    if "description" in spec:
        function["description"] = checks.text(spec["description"], f"{where}.description")
    parameters = spec.get("parameters", _NO_PARAMETERS)
    check_schema(parameters, f"{where}.parameters")
    if parameters.get("type", "object") != "object":
        raise InvalidRequestError(
            checks.wrong(parameters["type"], "object"), f"{where}.parameters.type"
        )
    function["parameters"] = parameters
    is_strict = checks.boolean(spec.get("strict", False), f"{where}.strict")
    return Tool(function["name"], parameters, is_strict, {"type": "function", "function": function})


def check_kind(value: object, where: str) -> None:
    """Refuse a type that is not ``function``."""
    if value != "function":
        raise InvalidRequestError(checks.wrong(value, "function"), where)


def check_name(value: object, where: str) -> str:
    """Return the name of a function, by OpenAI's pattern."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        allowed = "a name of 1 to 64 letters, digits, _ and -"
        raise InvalidRequestError(checks.wrong(value, allowed), where)
    return value


def mapping(value: object, where: str) -> Mapping[str, Any]:
    """Return a mapping."""
    if not isinstance(value, Mapping):
        raise InvalidRequestError(checks.wrong(value, "a mapping"), where)
    return value


def check_names(given: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    """Refuse an unknown field."""
    for name in given:
        if name not in allowed:
            raise InvalidRequestError(
                f"unknown field; allowed: {', '.join(allowed)}", f"{where}.{name}"
            )
