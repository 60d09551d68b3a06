"""The fields of OpenAI's requests: those that are supported, and the harmless values of others.

Any other field is refused by name, so that no wish of a client is dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import InvalidRequestError, shown
from router.gateway import checks
from router.gateway.grammar import GRAMMAR_FIELDS
from router.gateway.token_rules import RULE_FIELDS

ANY = None
"""In a table of harmless values: every value is harmless, since the field changes no output."""

SAMPLING_FIELDS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "ignore_eos",
    *RULE_FIELDS, *GRAMMAR_FIELDS,
)  # fmt: skip
OPTION_FIELDS = ("timeout_s", "on_expert_loss", "priority", "cache_salt")
_COMMON_FIELDS = frozenset(
    {"model", "stream", "stream_options", "return_token_ids", *SAMPLING_FIELDS, *OPTION_FIELDS}
)
_COMMON_HARMLESS: dict[str, tuple[object, ...] | None] = {
    "metadata": ANY,
    "prompt_cache_key": ANY,
    "safety_identifier": ANY,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "user": ANY,
}


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one endpoint; ``harmless`` fields are accepted with these values only."""

    supported: frozenset[str]
    harmless: Mapping[str, tuple[object, ...] | None]


COMPLETION = Fields(
    _COMMON_FIELDS | {"prompt", "logprobs", "echo", "prompt_logprobs"},
    {**_COMMON_HARMLESS, "best_of": (1,), "suffix": ("",)},
)
CHAT = Fields(
    _COMMON_FIELDS | {"messages", "logprobs", "top_logprobs", "max_completion_tokens"},
    {
        **_COMMON_HARMLESS,
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": (),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    },
)


def known_fields(body: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Return the supported fields that are set; ``null`` is not set, as with OpenAI.

    Raises :class:`InvalidRequestError` for an unknown field or an unsupported value.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in fields.supported:
            continue
        if name not in fields.harmless:
            allowed = ", ".join(sorted(fields.supported))
            raise InvalidRequestError(f"unknown field; allowed: {allowed}", name)
        harmless = fields.harmless[name]
        if harmless is not None and value not in harmless:
            only = " or ".join(map(str, (*harmless, "null")))
            raise InvalidRequestError(
                f"given {shown(value)}, which is not supported; only {only}", name
            )
    return {name: value for name, value in given.items() if name in fields.supported}


@dataclass(frozen=True, slots=True)
class Streaming:
    """Whether an answer comes in pieces, and the pieces that have the usage.

    Those are the last one, or each, with the usage so far (vLLM's ``continuous_usage_stats``).
    """

    is_on: bool = False
    usage_at_end: bool = False
    usage_so_far: bool = False


_USAGE_FIELDS = ("include_usage", "continuous_usage_stats")


def streaming_of(given: Mapping[str, Any]) -> Streaming:
    """Return how the answer is to come, by the given fields."""
    stream = checks.boolean(given.get("stream", False), "stream")
    options = given.get("stream_options")
    if options is None:
        return Streaming(stream)
    if not stream:
        raise InvalidRequestError("is allowed only with stream true", "stream_options")
    if not isinstance(options, dict):
        raise InvalidRequestError(checks.wrong(options, "a mapping"), "stream_options")
    unknown = sorted(set(options) - {*_USAGE_FIELDS, "include_obfuscation"})
    if unknown:
        allowed = ", ".join(_USAGE_FIELDS)
        raise InvalidRequestError(
            f"unknown field; allowed: {allowed}", f"stream_options.{unknown[0]}"
        )
    at_end, so_far = (
        options.get(name) is not None and checks.boolean(options[name], f"stream_options.{name}")
        for name in _USAGE_FIELDS
    )
    if so_far and not at_end:
        raise InvalidRequestError(
            "is allowed only with include_usage true, as in vLLM",
            "stream_options.continuous_usage_stats",
        )
    return Streaming(stream, at_end, so_far)
