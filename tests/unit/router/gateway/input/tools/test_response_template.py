"""Answers parsed by a checkpoint's response template, as transformers parses the whole."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers.utils.chat_parsing import parse_response

from cluster.errors import CheckpointError
from router.gateway.input.tools.definitions import ToolUse
from router.gateway.input.tools.formats import ChatFormat
from tests.unit.gateway_fakes import FakeUpstream
from tests.unit.router.gateway.input.tools.answers import TOOLS as CHECKED
from tests.unit.router.gateway.input.tools.answers import Whole, parsed
from tests.unit.router.gateway.input.tools.chat_models import ask, model_in, save_tokenizer, says
from tests.unit.router.gateway.input.tools.test_openai_tools import ASKED, TOOLS
from tests.unit.router.gateway.input.tools.test_parsers import PARIS, QWEN_CALL, cuts

PREFIX = "<|im_start|>assistant\n"
TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": PREFIX,
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "content": {"close": "<|im_end|>"},
        "tool_calls": {
            "open": "<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}  # fmt: skip
TEXT = f"<think>\nHm.\n</think>\n\nI look.\n{QWEN_CALL}{QWEN_CALL}"


def whole_of(pieces: list[str], prefix: str = PREFIX, hidden: tuple[str, ...] = ()) -> Whole:
    special = {mark: place for place, mark in enumerate(hidden)}
    chat_format = ChatFormat(special=special, response_template=TEMPLATE)
    whole = parsed(chat_format, pieces, False, ToolUse(CHECKED, CHECKED[:1]), prefix)
    return replace(whole, finish_reason=None)


def test_pieces_are_what_transformers_makes_of_the_whole() -> None:
    expected = parse_response(TEXT, TEMPLATE, prefix=PREFIX)
    for pieces in cuts(TEXT):
        whole = whole_of(pieces)
        calls = [(call["function"]["name"], PARIS) for call in expected["tool_calls"]]
        assert whole == Whole(expected["content"], expected["reasoning_content"], calls)


BROKEN = "<tool_call>\n{broken\n</tool_call>"
UNKNOWN = QWEN_CALL.replace("get_weather", "rm")
CUT_SHORT = QWEN_CALL[:-20]
INFINITE = QWEN_CALL.replace('"Paris"', "1e999")
CALL, HALF = ("get_weather", PARIS), ("get_weather", r'{"city": "\ud800"}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(
            (text, Whole(text))
            for text in (
                f"So \n{BROKEN}",
                f"{BROKEN} on\n{QWEN_CALL}\n",
                f"So:\n{UNKNOWN}\n{UNKNOWN} <end\n",
                f"So {CUT_SHORT}",
                "So <tool_call>",
                "So <tool_call></tool_call> on",
                INFINITE,
            )
        ),
        (QWEN_CALL.replace("Paris", r"\ud800"), Whole("", "", [HALF])),
        (f"<think>\nHm.\n</think>\n\nSo {BROKEN}", Whole(f"So {BROKEN}", "Hm.")),
        (f"So:\n{UNKNOWN}\n{QWEN_CALL}\n", Whole(f"So:\n{UNKNOWN}", "", [CALL])),
        (f"<think>Hm. </think>{QWEN_CALL}\n{BROKEN}", Whole(BROKEN, "Hm.", [CALL])),
    ],
)
def test_what_is_no_call_stays_content_with_its_marks(text: str, expected: Whole) -> None:
    for pieces in cuts(text):
        assert whole_of(pieces) == expected, pieces


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think><|x|> Hm<|x|>.<|x</think><|x|>So<|x|>", Whole("So", "Hm.<|x")),
        ("So<|<|x|>", Whole("So<|")),
        (f"So{BROKEN}<|x|> on<|x", Whole(f"So{BROKEN} on<|x")),
        (f"{UNKNOWN}<|x|>on", Whole(f"{UNKNOWN}on")),
    ],
)
def test_marks_that_are_hidden_are_shown_at_no_cut(text: str, expected: Whole) -> None:
    for pieces in cuts(text):
        assert whole_of(pieces, hidden=("<|x|>",)) == expected, pieces


def test_the_prompt_may_open_a_part_whose_mark_is_not_shown() -> None:
    assert whole_of(["Hm.</think>Yes"], f"{PREFIX}<think>") == Whole("Yes", "Hm.")
    for pieces in cuts("{broken</tool_call> on"):
        assert whole_of(pieces, f"{PREFIX}<tool_call>") == Whole("{broken</tool_call> on")


def test_the_time_of_long_answers_is_linear() -> None:
    begun_s = time.process_time()
    whole = whole_of(["<think>", *["word "] * 20_000, "</think>", *["< x"] * 20_000])
    assert len(whole.content) + len(whole.reasoning) > 150_000
    assert time.process_time() - begun_s < 5


def test_a_template_that_is_wrong_is_refused_at_loading(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "qwen", {"fields": {"content": {"close": "<|im_end|>"}}})
    with pytest.raises(CheckpointError, match="start_anchor"):
        model_in(str(tmp_path), "qwen")


def test_a_checkpoints_own_template_comes_first(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "qwen", TEMPLATE)
    served = model_in(str(tmp_path), "qwen")
    assert served.tokenizer.chat_format.response_template == TEMPLATE

    async def asking(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(model="qwen", messages=ASKED, tools=TOOLS)

    [choice] = ask(FakeUpstream(says("qwen", f"{TEXT}<|im_end|>")), asking, served).choices
    assert choice.message.content == "I look."
    assert choice.message.reasoning_content == "Hm."
    assert [call.function.arguments for call in choice.message.tool_calls] == [PARIS, PARIS]
    assert choice.finish_reason == "tool_calls"
