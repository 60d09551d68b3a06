"""The validation of requests against the served models; a :class:`CheckedRequest` comes out.

HTTP's and gRPC's are read by the same models (:mod:`router.gateway.input.request`), so that both
accept and refuse the same. An error names the field as the models have it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cluster.errors import InvalidRequestError, UnknownModelError, shown
from router.config.deployment import GatewayConfig
from router.gateway.input.chat_request import AnswerFormat, CheckedChat, check_chat
from router.gateway.input.grammar import check_grammar
from router.gateway.input.request import base
from router.gateway.input.request.base import Kind, read
from router.gateway.input.request.model import ChatRequest, Generation, OfPrompt, within
from router.gateway.input.routed import check_routed
from router.gateway.input.tokenizer import GatewayModel
from router.gateway.input.tokens import RULE_FIELDS, check_ids, check_prompt, check_rules
from router.messages.request import GenerationRequest, Received, SamplingParams
from router.messages.routed import RoutedExperts
from router.security.keys import Caller

DEFAULT_MAX_TOKENS = 16
_FEATURES = RULE_FIELDS | {
    "response_format", "structured_outputs", "routed_experts", "return_routed_experts",
}  # fmt: skip
"""Fields of which a plain request has none; their checks are left out then."""
_SLOW = ("response_format", "routed_experts", "structured_outputs", "tools")
Checked = TypeVar("Checked")
TOKEN_BYTES = 32
"""Rows of experts count towards the memory of a request as so many bytes a token."""


def is_slow(body: Mapping[str, object]) -> bool:
    """Return whether a body's check may take long: of a form, schemas, experts, or many calls."""
    if any(body.get(name) is not None for name in _SLOW):
        return True
    messages = body.get("messages")
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("tool_calls") for message in messages
    )


async def checked(is_slow: bool, check: Callable[[], Checked]) -> Checked:
    """Return what a check returns; a slow one runs beside the event loop."""
    return await asyncio.to_thread(check) if is_slow else check()


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request for a router, with the model and stop strings that its gateway needs.

    ``echo`` is the text to put before that of each choice. ``answer`` is how its text is parsed;
    ``None`` where all of it is content.
    """

    request: GenerationRequest
    model: GatewayModel
    stops: tuple[str, ...]
    echo: str = ""
    answer: AnswerFormat | None = None

    @property
    def most_tokens(self) -> int:
        """The most tokens that are computed for it: its prompt, and the output of all choices."""
        sampling = self.request.sampling
        return len(self.request.prompt_token_ids) + sampling.n * sampling.max_tokens

    @property
    def size_tokens(self) -> int:
        """The memory that it may take, in tokens as ``GatewayConfig.max_request_tokens`` counts."""
        sampling = self.request.sampling
        output = sampling.max_tokens * (1 + (sampling.logprobs or 0))
        of_prompt = 0 if sampling.prompt_logprobs is None else 1 + sampling.prompt_logprobs
        prompt_len = len(self.request.prompt_token_ids)
        total = sampling.n * (prompt_len * (1 + of_prompt) + output)
        return total + -(-self._routed_bytes(prompt_len + sampling.max_tokens) // TOKEN_BYTES)

    def _routed_bytes(self, length: int) -> int:
        """Return the size of all rows of experts, of choices of at most so many tokens."""
        routed = self.request.routed
        if routed is None:
            return 0
        returned = self.request.sampling.n * length * routed.row_bytes if routed.returned else 0
        return returned + len(routed.forced)

    def of(self, caller: Caller) -> CheckedRequest:
        """Return it as this caller's, no more urgent than the caller's keys allow."""
        priority, least = self.request.priority, caller.limits.priority
        if least is None and not caller.name:
            return self
        if least is not None:
            priority = max(priority, least)
        return replace(self, request=replace(self.request, priority=priority, tenant=caller.name))


class Validator:
    """Checks requests against the served models and the deployment's limits."""

    def __init__(
        self,
        models: Mapping[str, GatewayModel],
        limits: GatewayConfig,
        mixtures: Collection[str] = (),
    ) -> None:
        """``mixtures`` are the ids of models that are no language models."""
        self._models = models
        self._limits = limits
        self._mixtures = mixtures

    def model(self, model_id: object) -> GatewayModel:
        """Return a language model.

        Raises :class:`UnknownModelError` with the ids of all of them, and
        :class:`InvalidRequestError` with the right API for a mixture.
        """
        if not isinstance(model_id, str):
            raise InvalidRequestError(base.wrong(model_id, "the id of a model"), "model")
        if model_id in self._mixtures:
            raise InvalidRequestError(
                f"{model_id} is a mixture, which generates no text; get its predictions with "
                f"POST /v2/models/{model_id}/infer or inference.GRPCInferenceService/ModelInfer",
                "model",
            )
        served = ", ".join(self._models) or "no language model"
        if not model_id:
            raise InvalidRequestError(f"is missing; served: {served}", "model")
        if model_id not in self._models:
            raise UnknownModelError(
                f"{shown(model_id)} is not served here; served: {served}", "model"
            )
        return self._models[model_id]

    def read(self, kind: type[Kind], given: Mapping[str, Any]) -> Kind:
        """Return a client's fields as a request, within the deployment's limits.

        Raises :class:`InvalidRequestError`.
        """
        return read(within(kind, self._limits), given)

    def check(
        self,
        asked: OfPrompt | ChatRequest,
        prompt: object,
        where: str = "prompt",
        streamed: bool = False,
        resume: Sequence[Received] = (),
    ) -> CheckedRequest:
        """Check against the model, tokenise, draw a missing seed, and set the deadline.

        ``prompt`` is a text or a sequence of token ids, or messages that have been read; the last
        where ``where``, its field, is ``messages``. Then the answer may fill the context, and that
        of a :class:`ChatRequest` is parsed for calls and reasoning. ``streamed`` asks for the
        answer in pieces. ``resume`` has the tokens so far of each choice of a request that goes on.

        Raises :class:`InvalidRequestError` or :class:`UnknownModelError`.
        """
        model, is_chat = self.model(asked.model), where == "messages"
        numbers = _num_logprobs(asked)
        has_echo = isinstance(asked, OfPrompt) and asked.echo
        is_of_prompt = has_echo or asked.return_routed_experts
        least_new = 0 if is_of_prompt or numbers["prompt_logprobs"] is not None else 1
        chat = check_chat(asked, model) if isinstance(asked, ChatRequest) else None
        needed = 0 if asked.max_tokens == least_new == 0 else 1
        shown_chat = (chat or CheckedChat()) if is_chat else None
        input_ = check_prompt(prompt, where, shown_chat, model, needed)
        length = len(input_.token_ids)
        max_tokens = _check_max_tokens(asked, model, length, is_chat, least_new)
        has_features = not _FEATURES.isdisjoint(asked.model_fields_set)
        numbers = {"max_tokens": max_tokens, **numbers}
        sampling = _check_sampling(asked, model, numbers, has_features)
        answer = None
        if chat is not None:
            text = input_.text or ""
            answer = chat.answer(model, text, bool(sampling.grammar), not streamed)
            sampling = chat.constrained(sampling, model, text)
        routed = check_routed(asked, model.info, length, max_tokens) if has_features else None
        contract = asked.on_expert_loss or self._limits.on_expert_loss
        # The gateway must see tokens early where their text may end a choice.
        may_end_early = bool(asked.stop) or (answer is not None and answer.may_end_early)
        own: dict[str, Any] = {
            "request_id": uuid.uuid4().hex,
            "model": model.info.id,
            "prompt_token_ids": input_.token_ids,
            "sampling": sampling,
            "deadline_s": time.monotonic() + (asked.timeout_s or self._limits.default_timeout_s),
            "on_expert_loss": "strict" if routed is not None and routed.forced else contract,
            "streamed": streamed or may_end_early,
            "received": _check_resume(asked, model, sampling, length, routed, resume),
            "text_identity": model.info.text_identity,
            "routed": routed,
        }
        request = GenerationRequest(**(asked.shared(GenerationRequest) | own))
        echo = input_.echo(model.tokenizer) if has_echo else ""
        stops = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        checked = CheckedRequest(request, model, stops, echo, answer)
        self.check_together([checked], "max_tokens")
        return checked

    def check_together(self, checked: Sequence[CheckedRequest], where: str = "prompt") -> None:
        """Check the memory that the requests of one call may take together.

        Raises :class:`InvalidRequestError` for the field ``where``.
        """
        total = sum(request.size_tokens for request in checked)
        limit = max(self._limits.max_request_tokens, checked[0].model.info.max_model_len)
        if total > limit:
            raise InvalidRequestError(
                "prompts, max_tokens, log probabilities and experts of all choices add up to "
                f"{total} tokens; at most {limit}",
                where,
            )


def _num_logprobs(asked: OfPrompt | ChatRequest) -> dict[str, int | None]:
    """Return how many likeliest tokens are wanted beside each of the answer's and the prompt's.

    An echo wants as many of the prompt as of the answer. ``None`` is no log probabilities at all.
    """
    if isinstance(asked, ChatRequest):
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        return {"logprobs": logprobs, "prompt_logprobs": None}
    wanted = (asked.prompt_logprobs, asked.logprobs if asked.echo else None)
    of_prompt = max((number for number in wanted if number is not None), default=None)
    return {"logprobs": asked.logprobs, "prompt_logprobs": of_prompt}


def _check_sampling(
    asked: Generation, model: GatewayModel, numbers: Mapping[str, Any], has_features: bool
) -> SamplingParams:
    vocab_size = model.info.vocab_size
    for name in ("logprobs", "prompt_logprobs"):
        if numbers[name] is not None:
            base.integer(numbers[name], name, 0, vocab_size)
    own: dict[str, Any] = {
        **numbers,
        # 0 is off, and so is vLLM's -1; more than the vocabulary is the vocabulary.
        "top_k": min(max(asked.top_k, 0), vocab_size),
        "seed": secrets.randbits(63) if asked.seed is None else asked.seed,
    }
    if has_features:
        own["rules"] = check_rules(asked, model, numbers["max_tokens"])
        own["grammar"] = check_grammar(asked, model.info.eos_token_ids)
    return SamplingParams(**(asked.shared(SamplingParams) | own))


def _check_max_tokens(
    asked: Generation, model: GatewayModel, prompt_len: int, is_chat: bool, least_new: int
) -> int:
    context = model.info.max_model_len
    left = context - prompt_len
    if asked.max_tokens is None:
        return left if is_chat else min(DEFAULT_MAX_TOKENS, left)
    max_tokens = base.integer(asked.max_tokens, "max_tokens", least_new, context)
    if max_tokens > left:
        raise InvalidRequestError(
            f"{max_tokens} plus {prompt_len} prompt tokens exceeds the context of {context}; "
            f"use at most {left}",
            "max_tokens",
        )
    return max_tokens


def _check_resume(
    asked: Generation,
    model: GatewayModel,
    sampling: SamplingParams,
    prompt_len: int,
    routed: RoutedExperts | None,
    resume: Sequence[Received],
) -> tuple[Received, ...]:
    if not resume:
        return ()
    if len(resume) != sampling.n:
        raise InvalidRequestError(
            f"has {len(resume)} choices; must have {sampling.n}, as the request has",
            "resume",
        )
    if asked.seed is None:
        raise InvalidRequestError("is missing; to resume, send the original request's seed", "seed")
    if all(received.finished for received in resume):
        raise InvalidRequestError("every choice is already finished", "resume")
    for index, received in enumerate(resume):
        where = f"resume[{index}].token_ids"
        ids = received.token_ids
        if len(ids) > sampling.max_tokens:
            raise InvalidRequestError(
                f"has {len(ids)} tokens; at most max_tokens, {sampling.max_tokens}", where
            )
        check_ids(ids, model.info.vocab_size, where)
        ends = () if received.finished else sampling.ends(model.info.eos_token_ids)
        if any(token_id in ends for token_id in ids[:-1]):
            raise InvalidRequestError("has tokens after one that ends the choice", where)
        most = 0 if sampling.prompt_logprobs is None else prompt_len - 1
        where = f"resume[{index}].prompt_logprobs"
        base.integer(received.num_prompt_logprobs, where, 0, most)
        most = prompt_len if routed is not None and routed.returned else 0
        where = f"resume[{index}].routed_experts"
        base.integer(received.num_routed, where, 0, most)
        if received.is_begun and not received.identity:
            raise InvalidRequestError(
                "is missing; only the model that generated the tokens can resume them. Send the "
                "choice's identity.",
                f"resume[{index}].identity",
            )
    return tuple(resume)
