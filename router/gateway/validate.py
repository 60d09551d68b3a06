"""The validation of HTTP's and gRPC's requests: raw values in, a :class:`CheckedRequest` out.

Both hand over the client's values unchecked, so both accept and refuse the same. An error names the
client's own field, the given value and the allowed values.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.errors import InvalidRequestError, UnknownModelError, shown
from cluster.spec import ON_EXPERT_LOSS
from router.config import GatewayConfig
from router.gateway import checks
from router.gateway.chat_request import check_chat
from router.gateway.grammar import check_grammar
from router.gateway.models import GatewayModel
from router.gateway.prompts import check_ids, check_prompt
from router.gateway.routed import check_contract, check_routed
from router.gateway.token_rules import check_rules
from router.gateway.tools.answer import AnswerFormat
from router.messages.request import GenerationRequest, Received, SamplingParams
from router.messages.routed import RoutedExperts
from router.security.keys import Caller

MAX_TEMPERATURE = 100.0
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_SALT_CHARS = 256
DEFAULT_MAX_TOKENS = 16
PRIORITIES = -(2**63), 2**63 - 1
"""The lowest and the highest priority, as in vLLM; the lower a request's, the earlier it is."""
TOKEN_BYTES = 32
"""Rows of experts count towards the memory of a request as so many bytes a token."""


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A client's request, unchecked.

    ``prompt`` is a text or a sequence of token ids. With ``is_chat`` it is a list of messages,
    which the model's chat template renders, and the answer may fill the context. ``sampling`` and
    ``options`` hold only the fields that the client set: those of ``SamplingParams`` and of its
    rules, ``stop``, ``echo``, and the form of the answer; ``timeout_s``, ``on_expert_loss``,
    ``priority`` and ``cache_salt``. ``prompt_field`` and ``field_names`` are the client's names of
    fields, and ``sampling_prefix`` stands before the names of ``sampling``. ``streamed`` asks for
    the answer in pieces. ``chat`` has the fields of tools and of the template's options; where it
    is not ``None``, the answer's calls and reasoning are parsed. ``resume`` has the tokens so far
    of each choice of a request that goes on.
    """

    model: object
    prompt: object
    sampling: Mapping[str, object]
    options: Mapping[str, object] = field(default_factory=dict)
    is_chat: bool = False
    prompt_field: str = "prompt"
    sampling_prefix: str = ""
    field_names: Mapping[str, str] = field(default_factory=dict)
    streamed: bool = False
    chat: Mapping[str, object] | None = None
    resume: Sequence[Received] = ()

    def path(self, name: str) -> str:
        """Return the client's name of the sampling field ``name``."""
        return self.sampling_prefix + self.field_names.get(name, name)

    @property
    def least_new(self) -> int:
        """The fewest tokens that it may ask for: none where the answer is about the prompt."""
        given = self.sampling
        of_prompt = given.get("echo") or given.get("return_routed_experts")
        return 0 if of_prompt or "prompt_logprobs" in given else 1

    @property
    def wants_no_tokens(self) -> bool:
        """Whether it asks for no more than its prompt."""
        return self.least_new == 0 and self.sampling.get("max_tokens") == 0


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
            raise InvalidRequestError(checks.wrong(model_id, "the id of a model"), "model")
        if model_id in self._mixtures:
            raise InvalidRequestError(
                f"{model_id} is a mixture, which generates no text; ask for its predictions by "
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

    def check(self, raw: RawRequest) -> CheckedRequest:
        """Check, tokenise, fill in defaults and a seed, and set the deadline.

        Raises :class:`InvalidRequestError` or :class:`UnknownModelError`.
        """
        model = self.model(raw.model)
        stops = _check_stops(raw)
        timeout_s = self._check_timeout(raw)
        least_new = 0 if raw.wants_no_tokens else 1
        chat = check_chat(raw.chat or {}, raw.sampling, model) if raw.is_chat else None
        prompt = check_prompt(raw.prompt, raw.prompt_field, chat, model, least_new)
        length = len(prompt.token_ids)
        sampling = self._check_sampling(raw, model, length)
        answer = None
        if chat is not None and raw.chat is not None:
            text = prompt.text or ""
            answer = chat.answer(model, text, bool(sampling.grammar), not raw.streamed)
            sampling = chat.constrained(sampling, model, text)
        routed = check_routed(raw.sampling, raw.path, model.info, length, sampling.max_tokens)
        has_echo = checks.boolean(raw.sampling.get("echo", False), raw.path("echo"))
        request = GenerationRequest(
            request_id=uuid.uuid4().hex,
            model=model.info.id,
            prompt_token_ids=prompt.token_ids,
            sampling=sampling,
            deadline_s=time.monotonic() + timeout_s,
            on_expert_loss=self._check_on_expert_loss(raw, routed),
            # The gateway must see tokens early where their text may end a choice.
            streamed=raw.streamed or bool(stops) or (answer is not None and answer.may_end_early),
            received=_check_resume(raw, model, sampling, length, routed),
            text_identity=model.info.text_identity,
            priority=checks.integer(raw.options.get("priority", 0), "priority", *PRIORITIES),
            cache_salt=_check_salt(raw),
            routed=routed,
        )
        echo = prompt.echo(model.tokenizer) if has_echo else ""
        checked = CheckedRequest(request, model, stops, echo, answer)
        self.check_together([checked], raw.path("max_tokens"))
        return checked

    def check_together(self, checked: Sequence[CheckedRequest], where: str = "prompt") -> None:
        """Check the memory that the requests of one call may take together.

        Raises :class:`InvalidRequestError` for the field ``where``.
        """
        total = sum(request.size_tokens for request in checked)
        limit = max(self._limits.max_request_tokens, checked[0].model.info.max_model_len)
        if total > limit:
            raise InvalidRequestError(
                "prompts and max_tokens of all choices, log probabilities and experts of tokens, "
                f"come to {total} tokens; at most {limit}",
                where,
            )

    def _check_timeout(self, raw: RawRequest) -> float:
        if "timeout_s" not in raw.options:
            return self._limits.default_timeout_s
        limit = self._limits.max_timeout_s
        return checks.number(raw.options["timeout_s"], "timeout_s", 0.0, limit, above=True)

    def _check_on_expert_loss(self, raw: RawRequest, routed: RoutedExperts | None) -> str:
        value = raw.options.get("on_expert_loss", self._limits.on_expert_loss)
        if value not in ON_EXPERT_LOSS:
            raise InvalidRequestError(
                checks.wrong(value, f"one of {', '.join(ON_EXPERT_LOSS)}"), "on_expert_loss"
            )
        check_contract(raw.options.get("on_expert_loss"), routed)
        return "strict" if routed is not None and routed.forced else str(value)

    def _check_sampling(
        self, raw: RawRequest, model: GatewayModel, prompt_len: int
    ) -> SamplingParams:
        given, path, vocab_size = raw.sampling, raw.path, model.info.vocab_size
        max_choices = self._limits.max_choices
        # 0 is off, and so is vLLM's -1; more than the vocabulary is the vocabulary.
        top_k = checks.integer(given.get("top_k", 0), path("top_k"), -1, 2**31 - 1)
        max_tokens = _check_max_tokens(raw, model, prompt_len)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=checks.number(
                given.get("temperature", 1.0), path("temperature"), 0.0, MAX_TEMPERATURE
            ),
            top_k=min(max(top_k, 0), vocab_size),
            top_p=checks.number(given.get("top_p", 1.0), path("top_p"), 0.0, 1.0, above=True),
            min_p=checks.number(given.get("min_p", 0.0), path("min_p"), 0.0, 1.0),
            seed=checks.integer(
                given.get("seed", secrets.randbits(63)), path("seed"), -(2**63), 2**63 - 1
            ),
            ignore_eos=checks.boolean(given.get("ignore_eos", False), path("ignore_eos")),
            logprobs=self._check_logprobs(raw, "logprobs", vocab_size),
            n=checks.integer(given.get("n", 1), path("n"), 1, max_choices),
            prompt_logprobs=self._check_prompt_logprobs(raw, vocab_size),
            rules=check_rules(given, path, model, max_tokens),
            grammar=check_grammar(given, path, model.info.eos_token_ids),
        )

    def _check_logprobs(self, raw: RawRequest, name: str, vocab_size: int) -> int | None:
        if name not in raw.sampling:
            return None
        limit = min(self._limits.max_logprobs, vocab_size)
        return checks.integer(raw.sampling[name], raw.path(name), 0, limit)

    def _check_prompt_logprobs(self, raw: RawRequest, vocab_size: int) -> int | None:
        """Return how many likeliest tokens are wanted beside each of the prompt's, if any are.

        An echo with ``logprobs`` wants those of the prompt too.
        """
        wanted = [self._check_logprobs(raw, "prompt_logprobs", vocab_size)]
        if raw.sampling.get("echo"):
            wanted.append(self._check_logprobs(raw, "logprobs", vocab_size))
        return max((number for number in wanted if number is not None), default=None)


def _check_max_tokens(raw: RawRequest, model: GatewayModel, prompt_len: int) -> int:
    context = model.info.max_model_len
    left = context - prompt_len
    if "max_tokens" not in raw.sampling:
        return left if raw.is_chat else min(DEFAULT_MAX_TOKENS, left)
    where = raw.path("max_tokens")
    max_tokens = checks.integer(raw.sampling["max_tokens"], where, raw.least_new, context)
    if max_tokens > left:
        raise InvalidRequestError(
            f"{max_tokens} and the prompt's {prompt_len} tokens are more than the context of "
            f"{context}; at most {left} here",
            where,
        )
    return max_tokens


def _check_resume(
    raw: RawRequest,
    model: GatewayModel,
    sampling: SamplingParams,
    prompt_len: int,
    routed: RoutedExperts | None,
) -> tuple[Received, ...]:
    if not raw.resume:
        return ()
    if len(raw.resume) != sampling.n:
        raise InvalidRequestError(
            f"has {len(raw.resume)} choices, must have {sampling.n}, the number of choices",
            "resume",
        )
    if "seed" not in raw.sampling:
        raise InvalidRequestError(
            "is missing; a request goes on only with the seed that it began with",
            raw.path("seed"),
        )
    if all(received.finished for received in raw.resume):
        raise InvalidRequestError("every choice is finished already", "resume")
    for index, received in enumerate(raw.resume):
        where = f"resume[{index}].token_ids"
        ids = received.token_ids
        if len(ids) > sampling.max_tokens:
            raise InvalidRequestError(
                f"has {len(ids)} tokens; at most max_tokens, {sampling.max_tokens}", where
            )
        check_ids(ids, model.info.vocab_size, where)
        ends = () if received.finished else sampling.ends(model.info.eos_token_ids)
        if any(token_id in ends for token_id in ids[:-1]):
            raise InvalidRequestError("goes on after a token that ends it", where)
        most = 0 if sampling.prompt_logprobs is None else prompt_len - 1
        where = f"resume[{index}].prompt_logprobs"
        checks.integer(received.num_prompt_logprobs, where, 0, most)
        most = prompt_len if routed is not None and routed.returned else 0
        where = f"resume[{index}].routed_experts"
        checks.integer(received.num_routed, where, 0, most)
        if received.is_begun and not received.identity:
            raise InvalidRequestError(
                "is missing; tokens are gone on from only by the model that gave them, whose "
                "identity came with the first of them",
                f"resume[{index}].identity",
            )
    return tuple(raw.resume)


def _check_salt(raw: RawRequest) -> str:
    if "cache_salt" not in raw.options:
        return ""
    salt = checks.text(raw.options["cache_salt"], "cache_salt")
    if not 1 <= len(salt) <= MAX_SALT_CHARS:
        allowed = f"a text of 1 to {MAX_SALT_CHARS} characters"
        raise InvalidRequestError(checks.wrong(salt, allowed), "cache_salt")
    return salt


def _check_stops(raw: RawRequest) -> tuple[str, ...]:
    given = raw.sampling.get("stop", ())
    where = raw.path("stop")
    stops = (given,) if isinstance(given, str) else given
    if not isinstance(stops, Sequence) or isinstance(stops, bytes):
        raise InvalidRequestError(checks.wrong(given, "a text or a list of texts"), where)
    if len(stops) > MAX_STOPS:
        raise InvalidRequestError(f"has {len(stops)} texts; at most {MAX_STOPS}", where)
    for place, stop in enumerate(stops):
        path = where if isinstance(given, str) else f"{where}[{place}]"
        if not checks.text(stop, path) or len(stop) > MAX_STOP_CHARS:
            allowed = f"a text of 1 to {MAX_STOP_CHARS} characters"
            raise InvalidRequestError(checks.wrong(stop, allowed), path)
    return tuple(stops)
