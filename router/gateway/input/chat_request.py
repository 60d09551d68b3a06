"""A chat request's tools and options: checked, and what follows for prompt, grammar and answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.errors import InvalidRequestError
from router.gateway.input.grammar import check_whole
from router.gateway.input.request.model import ChatRequest, TokenizeRequest
from router.gateway.input.tokenizer import GatewayModel
from router.gateway.input.tools.definitions import ToolUse, check_tool_use
from router.gateway.input.tools.formats import ChatFormat
from router.gateway.input.tools.grammars import grammar_of
from router.gateway.input.tools.parser import FamilyParser, HarmonyParser
from router.gateway.input.tools.reader import Calls, ChoiceParser
from router.gateway.input.tools.response_template import TemplateParser
from router.messages.request import SamplingParams


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the choices of a request are parsed after its ``prompt``.

    With ``is_held`` calls come when they are whole.
    """

    format: ChatFormat
    prompt: str
    use: ToolUse | None
    is_held: bool

    @property
    def shown(self) -> Mapping[int, str]:
        """The special tokens that the parser must see, with their text."""
        return {token_id: mark for mark, token_id in self.format.special.items()}

    @property
    def may_end_early(self) -> bool:
        """Whether a call may end a choice, however the model would go on."""
        return self.use is not None and not self.use.is_parallel

    def begin(self) -> ChoiceParser:
        """Return the parser of one choice."""
        names = () if self.use is None else tuple(tool.name for tool in self.use.callable)
        calls = Calls(names, self.is_held, 1 if self.may_end_early else None)
        tools = None if self.use is None else self.use.given
        if self.format.response_template is not None:
            return TemplateParser(self.format, self.prompt, calls, tools)
        kind = HarmonyParser if self.format.calls == "harmony" else FamilyParser
        return kind(self.format, self.prompt, calls, tools)


@dataclass(frozen=True, slots=True)
class CheckedChat:
    """The checked tools of a request, and the options of its template."""

    use: ToolUse | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The tools for the template."""
        return None if self.use is None else self.use.given

    def constrained(
        self, sampling: SamplingParams, model: GatewayModel, prompt: str
    ) -> SamplingParams:
        """Return the sampling with the grammar of calls beside that of ``response_format``.

        Raises :class:`InvalidRequestError` for tools whose grammar is too large together.
        """
        if self.use is None or not (self.use.is_constrained or sampling.grammar):
            return sampling
        format_ = model.tokenizer.chat_format
        grammar = check_whole(grammar_of(format_, self.use, prompt, sampling.grammar), "tools")
        marks = tuple(sorted(format_.tokens.values()))
        return replace(sampling, grammar=grammar, grammar_marks=marks)

    def answer(
        self, model: GatewayModel, prompt: str, has_form: bool, is_held: bool
    ) -> AnswerFormat | None:
        """Return how the answer is to be parsed, ``None`` where all of it is content."""
        format_ = model.tokenizer.chat_format
        if self.use is None and (format_.is_plain or has_form):
            return None
        return AnswerFormat(format_, prompt, self.use, is_held)


def check_chat(asked: ChatRequest | TokenizeRequest, model: GatewayModel) -> CheckedChat:
    """Check a client's tools and options of the template.

    Raises :class:`InvalidRequestError` with the place of the part at fault, and for a model that
    cannot show tools, or whose format of calls is not known.
    """
    template = model.tokenizer.template
    if asked.tools:
        if not template.shows_tools:
            raise InvalidRequestError("this model's chat template does not support tools", "tools")
        format_ = model.tokenizer.chat_format
        if not format_.calls and format_.response_template is None:
            raise InvalidRequestError(f"{model.info.id}: {format_.reason}", "tools")
    tools = asked.tools or ()
    if isinstance(asked, TokenizeRequest):
        use = check_tool_use(tools)
    else:
        use = check_tool_use(tools, asked.tool_choice, asked.parallel_tool_calls)
        if use is not None:
            _check_constrained(use, asked, model)
    effort = getattr(asked, "reasoning_effort", None)
    return CheckedChat(use, template.check_options(asked.chat_template_kwargs or {}, effort))


def _check_constrained(use: ToolUse, asked: ChatRequest, model: GatewayModel) -> None:
    if asked.structured_outputs is not None:
        raise InvalidRequestError(
            "cannot be given together with tools; use response_format", "structured_outputs"
        )
    if not (use.is_constrained or asked.response_format is not None):
        return
    where = "tool_choice" if use.is_required else "tools"
    if not model.tokenizer.chat_format.calls:
        raise InvalidRequestError(
            "needs a grammar for calls, which this model's response template does not provide; "
            "use tool_choice auto with tools that are not strict",
            where,
        )
    if not model.info.eos_token_ids:
        raise InvalidRequestError("this model has no end-of-text token", where)
    if asked.ignore_eos:
        raise InvalidRequestError("must be false when a grammar enforces tool calls", "ignore_eos")


def call_id(request_id: str, choice: int, index: int, is_short: bool) -> str:
    """Return the id of a call, the same for the same place in the same request.

    Mistral's templates want nine letters and digits.
    """
    digest = hashlib.sha256(f"{request_id}/{choice}/{index}".encode()).hexdigest()
    return digest[:9] if is_short else f"call_{digest[:24]}"
