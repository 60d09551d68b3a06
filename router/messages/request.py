"""The messages between gateway and router: a request, and the tokens of a step.

Both are plain data that msgpack can carry, with token ids alone: text is the gateway's part.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from router.messages.routed import RoutedExperts
from router.messages.rules import TokenRules


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn; ``router/gateway/input/validate.py`` has checked it.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``seed`` is
    always set (the gateway draws a missing seed); the draws of choice ``i`` of ``n`` are a function
    of (seed, i, position). ``logprobs`` is the number of likeliest tokens reported beside the
    sampled token, or ``None`` for no log probabilities at all. ``prompt_logprobs`` is the same for
    each token of the prompt but the first. A ``max_tokens`` of 0 computes only the prompt.
    ``rules`` are those for single tokens, or ``None`` where there are none. ``grammar`` is the one
    that an answer fits, as llguidance writes it, or empty. ``grammar_marks`` are the special tokens
    that it may ask for; no other is in an answer that has a grammar.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    prompt_logprobs: int | None = None
    rules: TokenRules | None = None
    grammar: str = ""
    grammar_marks: tuple[int, ...] = ()

    def ends(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """Return the tokens that end a choice of a model with these end-of-sequence tokens."""
        own = () if self.rules is None else self.rules.stop_token_ids
        return frozenset(own if self.ignore_eos else (*eos_token_ids, *own))


@dataclass(frozen=True, slots=True)
class Received:
    """The tokens that have come of one choice; a finished choice is not computed again.

    The tokens of an unfinished choice are forced: computed like a prompt's where that changes no
    bit, and else one to a step, as they were the first time, so that the same tokens follow. They
    are not emitted again. ``exact`` is false if any of
    them was flagged as not exact; then all later tokens are flagged too.
    """

    token_ids: tuple[int, ...] = ()
    finished: bool = False
    exact: bool = True
    identity: str = ""
    """The identity of the model that generated the tokens; no other model resumes them."""
    num_prompt_logprobs: int = 0
    """The prompt tokens whose log probabilities have come; all of them before the first token."""
    num_routed: int = 0
    """The rows of routed experts that have come; with tokens, they have come for all but one."""

    @property
    def is_begun(self) -> bool:
        """Whether anything of the choice has come."""
        return bool(self.token_ids or self.num_prompt_logprobs or self.num_routed)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One accepted request: ids in, ``sampling.n`` choices of ids out.

    ``deadline_s`` is the time of this process's monotonic clock after which the answer is of no
    use; the message has the time left instead. If ``streamed`` is false, only the first tokens of
    each choice are sent early; the others come with the reply. ``on_expert_loss`` is one of
    :data:`cluster.spec.ON_EXPERT_LOSS`. ``received`` has an entry for every choice of a request
    that goes on after a failure, and is empty for a new request; its tokens count towards
    ``max_tokens``. A request of a lower ``priority`` is handled earlier.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float
    on_expert_loss: str = "strict"
    streamed: bool = True
    received: tuple[Received, ...] = ()
    text_identity: str = ""
    """That of the files by which the gateway makes ids of text; empty where it does not matter."""
    alone: bool = False
    """Whether routers have died under the request, so that it is computed in steps of its own."""
    priority: int = 0
    tenant: str = ""
    """The name of the caller's keys; empty where there are no keys."""
    cache_salt: str = ""
    """Requests share pages of the key/value cache only with those of the same salt."""
    routed: RoutedExperts | None = None
    """What it asks of its tokens' experts; ``None`` where that is nothing."""

    def received_of(self, index: int) -> Received:
        """Return the tokens that have come of choice ``index``."""
        return self.received[index] if self.received else Received()

    @property
    def num_prompt_logprobs(self) -> int:
        """The prompt tokens whose log probabilities are asked for; the first token has none."""
        return 0 if self.sampling.prompt_logprobs is None else len(self.prompt_token_ids) - 1

    def prompt_logprobs_of(self, index: int) -> int:
        """Return how many of :attr:`num_prompt_logprobs` have come of choice ``index``."""
        received = self.received_of(index)
        if received.token_ids or received.finished:
            return self.num_prompt_logprobs
        return received.num_prompt_logprobs

    def num_routed_of(self, index: int) -> int:
        """Return how many rows of routed experts have come of choice ``index``."""
        received = self.received_of(index)
        if self.routed is None or not self.routed.returned:
            return 0
        if not received.token_ids:
            return received.num_routed
        return len(self.prompt_token_ids) + len(received.token_ids) - 1

    def remaining_s(self) -> float:
        """Return the seconds left until the deadline; negative when it has passed."""
        return self.deadline_s - time.monotonic()

    def to_wire(self) -> dict[str, Any]:
        """Return the request as a msgpack-able dictionary, which shares the request's tuples."""
        wire = _fields_of(self)
        del wire["deadline_s"]
        wire["sampling"] = _fields_of(self.sampling)
        if self.sampling.rules is not None:
            wire["sampling"]["rules"] = self.sampling.rules.to_wire()
        wire["routed"] = self.routed and self.routed.to_wire()
        wire["received"] = [_fields_of(choice) for choice in self.received]
        return {**wire, "time_left_s": self.remaining_s()}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> GenerationRequest:
        """Rebuild a request from :meth:`to_wire`."""
        fields = dict(wire)
        deadline_s = time.monotonic() + fields.pop("time_left_s")
        rules, marks = wire["sampling"]["rules"], wire["sampling"]["grammar_marks"]
        own = {"rules": rules and TokenRules.from_wire(rules), "grammar_marks": tuple(marks)}
        sampling = SamplingParams(**{**wire["sampling"], **own})
        ids = tuple(wire["prompt_token_ids"])
        received = tuple(
            Received(**{**choice, "token_ids": tuple(choice["token_ids"])})
            for choice in wire["received"]
        )
        routed = wire["routed"] and RoutedExperts.from_wire(wire["routed"])
        fields |= {"sampling": sampling, "prompt_token_ids": ids, "received": received}
        fields["routed"] = routed
        return cls(**fields, deadline_s=deadline_s)


def _fields_of(record: GenerationRequest | SamplingParams | Received) -> dict[str, Any]:
    """Return a record's fields; ``asdict`` copies each token of a prompt on its own."""
    return {name: getattr(record, name) for name in record.__slots__}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, of the untempered, unfiltered distribution.

    ``logprob`` is the sampled token's; ``top_ids`` and ``top_logprobs`` are those of the likeliest
    tokens, in descending order.
    """

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs(TokenLogprobs):
    """Log probabilities of one token of a prompt after those before it, and of the likeliest.

    ``rank`` is 1 for the likeliest token.
    """

    rank: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a whole request: its prompt once, and the output of all choices.

    ``cached_tokens`` of the prompt were computed for none of the choices, but found in the cache.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(slots=True)  # a frozen one takes four times as long to make, and each token has one
class TokenEvent:
    """New tokens of one choice; nothing changes it once it is made.

    ``finish_reason`` is ``None`` while the choice goes on, else ``stop`` (the last id is an
    end-of-sequence token) or ``length``. ``exact`` is false if an expert's share was replaced or
    dropped for these tokens or any before them. ``start`` is the number of the choice's tokens
    before these. ``identity`` is the model's, and is set on the first tokens of a choice.

    ``prompt_logprobs`` are those of prompt tokens, ``prompt_start`` of which came before these. All
    of them come before the choice's first token, or with it.

    ``cached_tokens``, of the prompt, were found in the router's cache. The first event with tokens
    that a router sends of a choice tells them.

    ``routed`` are packed rows of the experts of the choice's next tokens, ``routed_start`` of which
    came before these (:mod:`router.messages.routed`). Tokens come with all rows but their last's.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    exact: bool = True
    start: int = 0
    identity: str = ""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    prompt_start: int = 0
    cached_tokens: int = 0
    routed: bytes = b""
    routed_start: int = 0

    @property
    def is_first_token(self) -> bool:
        """Whether no token of the choice came before, and this is not of the prompt."""
        is_of_prompt = self.prompt_logprobs or (self.routed and not self.token_ids)
        return self.start == 0 and not is_of_prompt

    def to_wire(self) -> list[Any]:
        """Return the event as a msgpack-able list."""
        logprobs = [[p.logprob, p.top_ids, p.top_logprobs] for p in self.logprobs]
        wire = [
            self.index,
            self.token_ids,
            logprobs,
            self.finish_reason,
            self.exact,
            self.start,
            self.identity,
        ]
        if self.prompt_logprobs or self.cached_tokens or self.routed:
            rows = [[p.logprob, p.top_ids, p.top_logprobs, p.rank] for p in self.prompt_logprobs]
            wire += [rows, self.prompt_start]
        if self.cached_tokens or self.routed:
            wire.append(self.cached_tokens)
        if self.routed:
            wire += [self.routed, self.routed_start]
        return wire

    @classmethod
    def from_wire(cls, wire: list[Any]) -> TokenEvent:
        """Rebuild an event from :meth:`to_wire`."""
        index, token_ids, logprobs, finish_reason, exact, start, identity, *prompt = wire
        rows: tuple[TokenLogprobs, ...] = ()
        if logprobs:
            rows = tuple(TokenLogprobs(p[0], tuple(p[1]), tuple(p[2])) for p in logprobs)
        event = cls(index, tuple(token_ids), rows, finish_reason, exact, start, identity)
        if not prompt:
            return event
        of_prompt = tuple(PromptLogprobs(p[0], tuple(p[1]), tuple(p[2]), p[3]) for p in prompt[0])
        cached_tokens = prompt[2] if len(prompt) > 2 else 0
        routed, routed_start = prompt[3:] or (b"", 0)
        return replace(
            event,
            prompt_logprobs=of_prompt,
            prompt_start=prompt[1],
            cached_tokens=cached_tokens,
            routed=routed,
            routed_start=routed_start,
        )
