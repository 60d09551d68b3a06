"""The fields of OpenAI's requests: those that are supported, and the harmless values of others.

Any other field is refused by name, so that no wish of a client is dropped silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import InvalidRequestError, shown
from router.gateway import checks
from router.gateway.chat_request import CHAT_FIELDS
from router.gateway.grammar import GRAMMAR_FIELDS
from router.gateway.routed import ROUTED_FIELDS
from router.gateway.token_rules import RULE_FIELDS

ANY = None
"""In a table of harmless values: every value is harmless, since the field changes no output."""

SAMPLING_FIELDS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "ignore_eos",
    *RULE_FIELDS, *GRAMMAR_FIELDS, *ROUTED_FIELDS,
)  # fmt: skip
OPTION_FIELDS = ("timeout_s", "on_expert_loss", "priority", "cache_salt")
_COMMON_FIELDS = frozenset(
    {"model", "stream", "stream_options", "return_token_ids", *SAMPLING_FIELDS, *OPTION_FIELDS}
)
_COMMON_HARMLESS: dict[str, tuple[object, ...] | None] = {
    "metadata": ANY,
    "moderation": (),
    "prompt_cache_key": ANY,
    "prompt_cache_options": ANY,
    "prompt_cache_retention": ANY,
    "safety_identifier": ANY,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "user": ANY,
}
_VLLM_HARMLESS: dict[str, tuple[object, ...] | None] = {
    "allowed_token_ids": (),
    "ec_transfer_params": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1.0, 1),
    "logprob_token_ids": (),
    "repetition_detection": (),
    "request_id": (),
    "return_mm_kwargs": ANY,
    "return_token_offsets": ANY,
    "return_tokens_as_token_ids": (False,),
    "session_id": ANY,
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
"""vLLM's fields of both endpoints with the values that change nothing in vLLM either."""
REPLACED = {
    "guided_choice": "structured_outputs.choice",
    "guided_decoding_backend": "",
    "guided_grammar": "structured_outputs.grammar",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_whitespace_pattern": "structured_outputs.whitespace_pattern",
}
"""Fields that vLLM took until 0.12, and what takes their place."""


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one endpoint; ``harmless`` fields are accepted with these values only."""

    supported: frozenset[str]
    harmless: Mapping[str, tuple[object, ...] | None]


COMPLETION = Fields(
    _COMMON_FIELDS | {"prompt", "logprobs", "echo", "prompt_logprobs"},
    {
        **_COMMON_HARMLESS,
        **_VLLM_HARMLESS,
        "add_special_tokens": (True,),
        "best_of": (1,),
        "prompt_embeds": (),
        "suffix": ("",),
    },
)
CHAT = Fields(
    _COMMON_FIELDS
    | {"messages", "logprobs", "top_logprobs", "max_completion_tokens", *CHAT_FIELDS},
    {
        **_COMMON_HARMLESS,
        **_VLLM_HARMLESS,
        "add_generation_prompt": (True,),
        "add_special_tokens": (False,),
        "audio": (),
        "chat_template": (),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "modalities": (["text"],),
        "prediction": (),
        "return_prompt_text": (False,),
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
            raise InvalidRequestError(_unknown(name, fields), name or shown(name))
        harmless = fields.harmless[name]
        # By type too: to Python, 0 is false and 1 is true.
        if harmless is not None and not any(
            type(value) is type(each) and value == each for each in harmless
        ):
            only = " or ".join(map(json.dumps, (*harmless, None)))
            raise InvalidRequestError(
                f"given {shown(value)}, which is not supported; only {only}", name
            )
    return {name: value for name, value in given.items() if name in fields.supported}


def _unknown(name: str, fields: Fields) -> str:
    """Return why a field that is not known is refused, and what is allowed."""
    allowed = f"allowed: {', '.join(sorted(fields.supported))}"
    if name not in REPLACED:
        return f"unknown field; {allowed}"
    instead = f"give {REPLACED[name]}" if REPLACED[name] else "leave it out"
    return f"removed in vLLM 0.12, {instead}; {allowed}"


@dataclass(frozen=True, slots=True)
class Streaming:
    """Whether an answer comes in pieces, and the pieces that have the usage.

    Those are the last one, or each, with the usage so far (vLLM's ``continuous_usage_stats``).
    """

    is_on: bool = False
    usage_at_end: bool = False
    usage_so_far: bool = False


USAGE_FIELDS = ("include_usage", "continuous_usage_stats")
STREAM_OPTIONS = (*USAGE_FIELDS, "include_obfuscation")
"""Streams are not padded, so the last one changes nothing."""


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
    unknown = sorted(set(options) - {*STREAM_OPTIONS})
    if unknown:
        allowed = ", ".join(USAGE_FIELDS)
        raise InvalidRequestError(
            f"unknown field; allowed: {allowed}", f"stream_options.{unknown[0]}"
        )
    at_end, so_far, _ = (
        options.get(name) is not None and checks.boolean(options[name], f"stream_options.{name}")
        for name in STREAM_OPTIONS
    )
    if so_far and not at_end:
        raise InvalidRequestError(
            "is allowed only with include_usage true, as in vLLM",
            "stream_options.continuous_usage_stats",
        )
    return Streaming(stream, at_end, so_far)
