"""Small models of every family: real tokenizers with the family's marks, and short templates.

The templates are laid out as the published ones: who writes calls how, what is read of messages,
and what they refuse.
"""

from __future__ import annotations

import asyncio
import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import openai
from fastapi import FastAPI
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from cluster.spec import ModelExperts, ModelSource
from router.gateway.input.tokenizer import GatewayModel, Tokenizer
from router.messages.request import GenerationRequest, TokenEvent
from router.served import ServedModel
from tests.unit.gateway_fakes import FakeUpstream, Script, http_app
from tests.unit.router.gateway.input.tools.answers import DEEPSEEK, HARMONY, LATER

EOS = 0
CONTEXT = 65_536
QWEN = """
{%- if tools %}{{ '<|im_start|>system\\n' }}# Tools
<tools>{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
</tools>
Return <tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.reasoning_content is defined %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}{{ '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- if enable_thinking is defined and enable_thinking == 'always' %}{{ '<think>\\n' }}{% endif %}{% endif %}
"""  # noqa: E501
MISTRAL = """
{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}[TOOL_CALLS] [
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}
{{- call.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]</s>
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}
{%- else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}
"""
MISTRAL_V11 = """
{%- for m in messages %}
{%- if m.role == 'user' %}{% if tools and m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{{ '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ m.content }}
{%- for call in m.tool_calls or [] %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}
{%- set arguments = call.function.arguments %}{% if arguments is not string %}{% set arguments = arguments | tojson %}{% endif %}
{{- '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id + '[ARGS]' + arguments }}{% endfor %}</s>
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.tool_call_id + '[TOOL_CONTENT]' + m.content + '[/TOOL_RESULTS]' }}
{%- endif %}{% endfor %}
"""  # noqa: E501
MISTRAL_V13 = MISTRAL_V11.replace("'[CALL_ID]' + call.id + ", "")
CODER = """
{%- macro shown(value) %}{{ value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}{% endmacro %}
{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{% set function = tool.function %}{{ '\\n<function>\\n<name>' + function.name + '</name>\\n<parameters>' }}
{%- for name, fields in (function.parameters.properties or {}) | items %}{{ '\\n<name>' + name + '</name><type>' + fields.type | string + '</type>' }}{% endfor %}
{{- '\\n</parameters>\\n</function>' }}{% endfor %}
</tools>
<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n</function>\n</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response>\\n<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{{ '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for name, value in call.function.arguments | items %}{{ '<parameter=' + name + '>\\n' + shown(value) + '\\n</parameter>\\n' }}{% endfor %}
{{- '</function>\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""  # noqa: E501
V3 = """
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}
{%- elif m['role'] == 'assistant' and m['content'] is none %}{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
{%- for c in m['tool_calls'] %}{{ '<｜tool▁call▁begin｜>' + c['type'] + '<｜tool▁sep｜>' + c['function']['name'] + '\\n```json\\n' + c['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}
{{- '<｜tool▁calls▁end｜>' }}
{%- elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] }}
{%- else %}{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% if thinking %}{{ '<think>\\n' }}{% endif %}{% endif %}
"""  # noqa: E501
V3_1 = """
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}
{%- elif m['role'] == 'assistant' and m['tool_calls'] %}{{ '<｜Assistant｜></think>' + (m['content'] or '') + '<｜tool▁calls▁begin｜>' }}
{%- for c in m['tool_calls'] %}{{ '<｜tool▁call▁begin｜>' + c['function']['name'] + '<｜tool▁sep｜>' + c['function']['arguments'] + '<｜tool▁call▁end｜>' }}{% endfor %}
{{- '<｜tool▁calls▁end｜>' }}
{%- elif m['role'] == 'assistant' %}{{ '<｜Assistant｜></think>' + m['content'] }}
{%- else %}{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}
"""  # noqa: E501
GPT_OSS = """
{%- if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}
{{- '<|start|>system<|message|>Reasoning: ' + reasoning_effort + '<|end|>' }}
{%- if tools %}{{ '<|start|>developer<|message|>' + (tools | tojson) + '<|end|>' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{%- if m.tool_calls %}{{ '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{ '<|call|>' }}
{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- elif m.role == 'tool' %}{{ '<|start|>functions.' + m.name + ' to=assistant<|channel|>commentary<|message|>' + m.content + '<|end|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""  # noqa: E501
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SPECIAL = {
    "qwen": (
        QWEN,
        ("<|im_start|>", "<|im_end|>"),
        ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    ),
    "qwen3-coder": (CODER, ("<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>")),
    "mixtral": (MISTRAL, ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]"), ()),
    "mistral-v11": (MISTRAL_V11, LATER, ()),
    "mistral-v13": (MISTRAL_V13, LATER, ()),
    "deepseek-v3": (V3, DEEPSEEK, ("<think>", "</think>")),
    "deepseek-v3.1": (V3_1, DEEPSEEK, ("<think>", "</think>")),
    "gpt-oss": (GPT_OSS, HARMONY, ()),
    "plain": (PLAIN, (), ()),
}
"""The template of each model, its special marks, and others that are tokens of their own."""
KINDS = {
    "qwen": "tool_call", "qwen3-coder": "qwen3_coder", "mixtral": "mistral",
    "mistral-v11": "mistral_v11", "mistral-v13": "mistral_v13", "deepseek-v3": "deepseek_v3",
    "deepseek-v3.1": "deepseek_v3_1", "gpt-oss": "harmony", "plain": "",
}  # fmt: skip
"""How each model writes calls."""
TEXT = ['{"name": "get_weather", "arguments": {"city": "Paris"}}', "in the beginning was the word"]


def save_tokenizer(folder: Path, name: str, response_template: Any = None) -> None:
    template, special, others = SPECIAL[name]
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(TEXT * 4, trainer)
    raw.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in others])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    fast.chat_template = template
    fast.response_template = response_template
    fast.save_pretrained(folder)


@functools.cache
def model(name: str) -> GatewayModel:
    """A model of which only the tokenizer is real."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), name)
        return model_in(folder, name)


def model_in(folder: str, name: str) -> GatewayModel:
    """The model of a folder with a tokenizer alone."""
    source = ModelSource("unused", "float32", ModelExperts(name, (0, 1), 8, 0), "unused")
    info = ServedModel(source, "mixtral", 320, CONTEXT, 2, (EOS,))
    return GatewayModel(info, Tokenizer.load(folder, (EOS,)))


def says(name: str, text: str, finish_reason: str = "stop") -> Script:
    """A script in which each choice of a model says a text with marks, one token an event."""

    def script(request: GenerationRequest) -> Iterable[TokenEvent]:
        ids = model(name).tokenizer.encode(text, add_special_tokens=False)
        for place, token_id in enumerate(ids):
            reason = finish_reason if place == len(ids) - 1 else None
            for index in range(request.sampling.n):
                yield TokenEvent(index, (token_id,), (), reason)

    return script


def ask(
    upstream: FakeUpstream, asking: Callable[[openai.AsyncOpenAI], Any], *served: GatewayModel
) -> Any:
    """What a coroutine makes of the real client, over an app with all models, or with these."""
    known = served or tuple(model(name) for name in SPECIAL)
    return ask_app(http_app(upstream, models={each.info.id: each for each in known}), asking)


def ask_app(app: FastAPI, asking: Callable[[openai.AsyncOpenAI], Any]) -> Any:
    """What a coroutine makes of the real client over an app."""

    async def run() -> Any:
        async with openai.AsyncOpenAI(
            api_key="none",
            base_url="http://test/v1",
            max_retries=0,
            timeout=60,
            http_client=httpx.AsyncClient(transport=httpx.ASGITransport(app)),
        ) as client:
            return await asking(client)

    return asyncio.run(asyncio.wait_for(run(), 90))
