"""Fields of OpenAI and vLLM that are not served, with the values that change nothing.

Any other value, and any other field, is refused by name: no wish of a client is dropped silently.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from cluster.errors import InvalidRequestError, shown

ANY = None
"""Every value is harmless, since the field changes no output."""
Values = Mapping[str, tuple[object, ...] | None]


def _each(values: tuple[object, ...] | None, names: str) -> Values:
    return dict.fromkeys(names.split(), values)


_OF_BOTH: Values = {
    **_each(ANY, "metadata prompt_cache_key prompt_cache_options prompt_cache_retention"),
    **_each(ANY, "return_mm_kwargs return_token_offsets safety_identifier session_id user"),
    **_each((), "allowed_token_ids ec_transfer_params kv_transfer_params logprob_token_ids"),
    **_each((), "moderation repetition_detection request_id truncate_prompt_tokens"),
    **_each((True,), "skip_special_tokens spaces_between_special_tokens"),
    **_each((False,), "include_stop_str_in_output return_tokens_as_token_ids store"),
    **_each((False,), "use_beam_search watermarking"),
    "length_penalty": (1.0, 1),
    "service_tier": ("auto", "default"),
    "stream_interval": (1,),
    "truncation_side": ("left", "right"),
    "vllm_xargs": ({},),
}
OF_COMPLETIONS: Values = {
    **_OF_BOTH,
    **_each((), "prompt_embeds"),
    "add_special_tokens": (True,),
    "best_of": (1,),
    "suffix": ("",),
}
OF_TOKENIZE: Values = {
    **_each((), "chat_template"),
    **_each((False,), "continue_final_message"),
    **_each(({},), "media_io_kwargs mm_processor_kwargs"),
}
OF_CHATS: Values = {
    **_OF_BOTH,
    **OF_TOKENIZE,
    **_each((), "audio prediction verbosity web_search_options"),
    **_each((False,), "add_special_tokens echo return_prompt_text"),
    **_each(([],), "documents functions"),
    "add_generation_prompt": (True,),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}
_REPLACED = {
    "guided_choice": "give structured_outputs.choice",
    "guided_decoding_backend": "leave it out",
    "guided_grammar": "give structured_outputs.grammar",
    "guided_json": "give structured_outputs.json",
    "guided_regex": "give structured_outputs.regex",
    "guided_whitespace_pattern": "give structured_outputs.whitespace_pattern",
}
"""Fields that vLLM took until 0.12, and what to do instead."""


def check_harmless(name: str, value: object, known: Values, served: Collection[str]) -> None:
    """Raise :class:`InvalidRequestError` for a field that is neither served nor harmless."""
    if name not in known:
        told = f"removed in vLLM 0.12; {_REPLACED[name]}" if name in _REPLACED else "unknown field"
        raise InvalidRequestError(f"{told}; allowed: {', '.join(sorted(served))}", name or "''")
    harmless = known[name]
    # By type too: to Python, 0 is false and 1 is true.
    if harmless is not None and (type(value), value) not in [(type(one), one) for one in harmless]:
        only = " or ".join(map(json.dumps, (*harmless, None)))
        raise InvalidRequestError(f"{shown(value)} is not supported; only {only} is", name)
