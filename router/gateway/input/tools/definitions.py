"""The check of a request's tools, and of how they may be called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import InvalidRequestError
from router.gateway.input.grammar import check_schema
from router.gateway.input.request import base, parts
from router.gateway.input.request.parts import Function


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, those that may be called, and whether one must be."""

    tools: tuple[Function, ...]
    callable: tuple[Function, ...]
    is_required: bool = False
    is_parallel: bool = True

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar makes sure of the calls."""
        is_limited = len(self.callable) < len(self.tools)
        return self.is_required or is_limited or any(tool.strict for tool in self.callable)

    @property
    def given(self) -> list[dict[str, Any]]:
        """The tools as a chat template shows them."""
        return [{"type": "function", "function": _shown(tool)} for tool in self.tools]


def _shown(tool: Function) -> dict[str, Any]:
    fields = ((name, getattr(tool, name)) for name in ("name", "description", "parameters"))
    return {name: value for name, value in fields if value is not None}


def check_tool_use(
    given: Sequence[parts.Tool], choice: parts.ToolChoice = "auto", is_parallel: bool = True
) -> ToolUse | None:
    """Return the tools of a request, ``None`` where none is given, or may be called.

    Raises :class:`InvalidRequestError` with the place of the part at fault.
    """
    if not given and choice not in ("none", "auto"):
        raise InvalidRequestError("is allowed only with tools", "tool_choice")
    tools = _tools(given)
    if not tools or choice == "none":
        return None
    if isinstance(choice, str):
        return ToolUse(tools, tools, choice == "required", is_parallel)
    by_name = {tool.name: tool for tool in tools}
    if isinstance(choice, parts.NamedTool):
        tool = _named(choice, by_name, "tool_choice")
        return ToolUse(tools, (tool,), True, is_parallel)
    allowed, where = choice.allowed_tools, "tool_choice.allowed_tools.tools"
    found = (_named(one, by_name, f"{where}[{i}]") for i, one in enumerate(allowed.tools))
    chosen = tuple(dict.fromkeys(tool.name for tool in found))
    callable_ = tuple(by_name[name] for name in chosen)
    return ToolUse(tools, callable_, allowed.mode == "required", is_parallel)


def _named(choice: parts.NamedTool, by_name: Mapping[str, Function], where: str) -> Function:
    name = choice.function.name
    if name not in by_name:
        told = base.wrong(name, "the name of a tool")
        raise InvalidRequestError(told, f"{where}.function.name")
    return by_name[name]


def _tools(given: Sequence[parts.Tool]) -> tuple[Function, ...]:
    found: dict[str, Function] = {}
    for place, entry in enumerate(given):
        spec, where = entry.function, f"tools[{place}].function"
        if spec.name in found:
            told = f"{spec.name} is already the name of another tool"
            raise InvalidRequestError(told, f"{where}.name")
        check_schema(spec.parameters, f"{where}.parameters")
        kind = spec.parameters.get("type", "object")
        if kind != "object":
            raise InvalidRequestError(base.wrong(kind, "object"), f"{where}.parameters.type")
        found[spec.name] = spec
    return tuple(found.values())
