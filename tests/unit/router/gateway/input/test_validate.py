"""What the one validation below HTTP and gRPC takes, refuses and fills in."""

from __future__ import annotations

import math
import time
from dataclasses import fields
from typing import Any

import pytest

from cluster.errors import InvalidRequestError, UnknownModelError
from cluster.spec import OnExpertLoss
from router.config.deployment import GatewayConfig
from router.gateway.input.request.model import ChatRequest, Generation, GrpcRequest
from router.gateway.input.validate import CheckedRequest, Validator
from router.messages.request import GenerationRequest, Received, SamplingParams
from router.messages.rules import TokenRules
from tests.unit.gateway_fakes import CONTEXT, EOS, served, tokenizer, vocab_size

LIMITS = GatewayConfig(max_choices=4, max_logprobs=5, default_timeout_s=20, max_timeout_s=60)
HUGE = 10**400


def checked(
    given: dict[str, Any], prompt: Any, resume: Any = (), limits: GatewayConfig = LIMITS
) -> CheckedRequest:
    validator = Validator({"tiny": served()}, limits)
    asked = validator.read(GrpcRequest, {"model": "tiny", **given})
    return validator.check(asked, prompt, resume=resume)


def request_of(prompt: Any = "in the", resume: Any = (), **given: Any) -> GenerationRequest:
    return checked(given, prompt, resume).request


def refused(prompt: Any = "in the", resume: Any = (), **given: Any) -> InvalidRequestError:
    """Return a refusal, whose message is short however long the value is."""
    with pytest.raises(InvalidRequestError) as caught:
        checked(given, prompt, resume)
    assert len(caught.value.message) < 300
    return caught.value


def test_defaults_are_filled_in() -> None:
    before = time.monotonic()
    filled = checked({}, "in the")
    request, sampling = filled.request, filled.request.sampling
    assert request.prompt_token_ids == tuple(tokenizer().encode("in the"))
    assert (sampling.max_tokens, sampling.temperature, sampling.n) == (16, 1.0, 1)
    assert (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1.0, 0.0)
    assert (sampling.logprobs, filled.stops, request.received) == (None, (), ())
    assert (request.priority, request.cache_salt, request.on_expert_loss) == (0, "", "strict")
    assert before + 20 <= request.deadline_s <= time.monotonic() + 20


def test_ids_and_missing_seeds_are_drawn_anew_each_time() -> None:
    requests = [request_of() for _ in range(8)]
    seeds = {request.sampling.seed for request in requests}
    assert len(seeds) == len({request.request_id for request in requests}) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_is_given_is_taken() -> None:
    given = {
        "max_tokens": CONTEXT - 2, "temperature": 0, "top_k": -1, "top_p": 0.5, "min_p": 1,
        "seed": -(2**63), "stop": "end", "ignore_eos": True, "logprobs": 5, "n": 4,
        "timeout_s": 60, "on_expert_loss": "drop", "priority": -(2**63), "cache_salt": "é" * 256,
    }  # fmt: skip
    taken = checked(given, [5, vocab_size() - 1])
    request, sampling = taken.request, taken.request.sampling
    assert request.prompt_token_ids == (5, vocab_size() - 1)
    assert (request.on_expert_loss, request.priority) == ("drop", -(2**63))
    assert request.cache_salt == "é" * 256
    assert sampling.max_tokens == CONTEXT - 2
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 0, 0.5)
    assert (sampling.min_p, sampling.seed, sampling.ignore_eos) == (1.0, -(2**63), True)
    assert (sampling.logprobs, sampling.n, taken.stops) == (5, 4, ("end",))
    assert request_of(top_k=2**31 - 1).sampling.top_k == vocab_size()
    assert request_of(priority=2**63 - 1).priority == 2**63 - 1


def test_default_max_tokens_is_what_is_left_of_the_context() -> None:
    assert request_of([5] * (CONTEXT - 3)).sampling.max_tokens == 3


def test_the_answer_in_a_conversation_may_fill_the_context() -> None:
    validator = Validator({"tiny": served()}, LIMITS)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    asked = validator.read(ChatRequest, body)
    request = validator.check(asked, asked.messages, "messages").request
    rendered = tokenizer().encode("user: hi\nassistant:", add_special_tokens=False)
    assert request.prompt_token_ids == tuple(rendered)
    assert request.sampling.max_tokens == CONTEXT - len(rendered)


BAD: dict[str, list[Any]] = {
    "max_tokens": [True, 1.0, "5", HUGE],
    "temperature": [True, "1", HUGE, []],
    "top_p": [False, HUGE],
    "min_p": ["0"],
    "top_k": [1.5, True],
    "seed": [2**63, -(2**63) - 1, 1.0, True, "1"],
    "n": [5, True, HUGE],
    "logprobs": [6, True, 1.0],
    "ignore_eos": [1, "true"],
    "stop": ["", 5, {"a": 1}, b"a"],
    "timeout_s": [0, -1, 61, math.nan, math.inf, True, "5", HUGE],
    "priority": [2**63, -(2**63) - 1, 1.0, True, "1", [], HUGE],
    "cache_salt": ["", "x" * 257, 5, "\ud800"],
    "on_expert_loss": ["guess", "", 1, ["strict"]],
    "model": ["", None, 5, ["tiny"], {}],
}
"""By field; test_same_refusals has more numbers out of bounds, which gRPC can send too."""


@pytest.mark.parametrize(("field", "bad"), [(name, bad) for name in BAD for bad in BAD[name]])
def test_a_bad_value_names_its_field(field: str, bad: Any) -> None:
    assert refused(**{field: bad}).field == field


@pytest.mark.parametrize("bad", ["", 5, None, "x" * 257, "\ud800"])
def test_a_bad_stop_in_a_list_names_its_place(bad: Any) -> None:
    assert refused(stop=["fine", bad]).field == "stop[1]"


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"), ([], "prompt"), (None, "prompt"), (7, "prompt"), ({"a": 1}, "prompt"),
        (b"bytes", "prompt"), ("half \ud83d", "prompt"), ([3, -1], "prompt[1]"),
        ([vocab_size()], "prompt[0]"), ([3, 4, True], "prompt[2]"), ([1.0], "prompt[0]"),
        ([HUGE], "prompt[0]"), ([5] * CONTEXT, "prompt"), ("\x00" * CONTEXT, "prompt"),
        ("word " * 200, "prompt"),
    ],
)  # fmt: skip
def test_bad_prompts_are_refused_and_not_repeated(prompt: Any, field: str) -> None:
    error = refused(prompt)
    assert error.field == field
    assert "word" not in str(error)


def test_text_that_cannot_fit_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_encode(*args: Any, **kwargs: Any) -> list[int]:
        raise AssertionError("tokenised a prompt that cannot fit")

    monkeypatch.setattr(type(tokenizer()), "encode", no_encode)
    assert "characters" in refused("x" * 1_000_000).message


def test_prompt_and_max_tokens_together_must_fit() -> None:
    assert request_of([5] * (CONTEXT - 2), max_tokens=2).sampling.max_tokens == 2
    error = refused([5] * (CONTEXT - 2), max_tokens=3)
    assert (error.field, "use at most 2" in error.message) == ("max_tokens", True)


@pytest.mark.parametrize(
    ("given", "each"),
    [
        ({}, 3 + 4),
        ({"logprobs": 0}, 3 + 4),
        ({"logprobs": 5}, 3 + 4 * 6),
        ({"prompt_logprobs": 3}, 3 * (2 + 3) + 4),
    ],
)
def test_what_a_request_takes_of_memory_has_a_limit(given: dict[str, Any], each: int) -> None:
    sampling = {"max_tokens": 4, "n": 10, **given}
    checked(sampling, [5, 6, 7], limits=GatewayConfig(max_request_tokens=10 * each))
    with pytest.raises(InvalidRequestError, match=f"add up to {10 * each} tokens") as caught:
        checked(sampling, [5, 6, 7], limits=GatewayConfig(max_request_tokens=10 * each - 1))
    assert caught.value.field == "max_tokens"


def test_one_choice_may_always_fill_the_context() -> None:
    checked({"max_tokens": CONTEXT - 1}, [5], limits=GatewayConfig(max_request_tokens=1))


@pytest.mark.parametrize("given", [None, "strict", "next_expert", "drop"])
@pytest.mark.parametrize("default", ["strict", "next_expert", "drop"])
def test_on_expert_loss_overrides_the_deployments(given: str | None, default: OnExpertLoss) -> None:
    limits = GatewayConfig(on_expert_loss=default)
    taken = checked({"on_expert_loss": given}, [5], limits=limits)
    assert taken.request.on_expert_loss == (given or default)


@pytest.mark.parametrize("bad", ["nope", "tiny ", "\ud800"])
def test_an_unknown_model_is_told_which_are_served(bad: str) -> None:
    with pytest.raises(UnknownModelError, match="served: tiny") as caught:
        checked({"model": bad}, "in the")
    str(caught.value).encode()


def has(*ids: int, finished: bool = False, scored: int = 0) -> Received:
    """What a client has of a choice, and of ``scored`` tokens of its prompt."""
    return Received(ids, finished, True, "one", num_prompt_logprobs=scored)


def test_what_a_client_has_of_each_choice_is_taken() -> None:
    two = [has(5, 6), has(7, EOS, 8, finished=True)]
    assert request_of(resume=two, seed=1, n=2, max_tokens=3).received == tuple(two)
    for received, more in (
        (has(), {}),
        (has(5, EOS), {}),
        (has(EOS, 5), {"ignore_eos": True}),
        (has(scored=2), {"prompt_logprobs": 0}),
    ):
        given = request_of("in the begin", resume=[received], seed=1, **more)
        assert given.received == (received,)


@pytest.mark.parametrize(
    ("resume", "given", "field"),
    [
        ([has(5)], {"n": 2}, "resume"),
        ([has(5)] * 3, {"n": 2}, "resume"),
        ([has(5, finished=True)] * 2, {"n": 2}, "resume"),
        ([has(*[5] * 17)], {}, "resume[0].token_ids"),
        ([has(5, 5, 5, finished=True), has()], {"n": 2, "max_tokens": 2}, "resume[0].token_ids"),
        ([has(5, vocab_size())], {}, "resume[0].token_ids[1]"),
        ([has(-1)], {}, "resume[0].token_ids[0]"),
        ([has(EOS, 5)], {}, "resume[0].token_ids"),
        ([has(5)], {"seed": None}, "seed"),
        ([Received(), Received((5,))], {"n": 2}, "resume[1].identity"),
        ([has(scored=1)], {}, "resume[0].prompt_logprobs"),
        ([has(scored=-1)], {"prompt_logprobs": 0}, "resume[0].prompt_logprobs"),
        ([has(scored=99)], {"prompt_logprobs": 0}, "resume[0].prompt_logprobs"),
    ],
)
def test_what_nobody_has_is_refused(
    resume: list[Received], given: dict[str, Any], field: str
) -> None:
    assert refused(resume=resume, **{"seed": 1, **given}).field == field


@pytest.mark.parametrize("asked", [{"echo": True}, {"prompt_logprobs": 0}])
def test_a_prompt_alone_needs_no_room_for_a_token(asked: dict[str, Any]) -> None:
    whole = [5] * CONTEXT
    request = request_of(whole, max_tokens=0, **asked)
    assert (len(request.prompt_token_ids), request.sampling.max_tokens) == (CONTEXT, 0)
    assert (
        f"the context of {CONTEXT} holds no more"
        in refused([*whole, 5], max_tokens=0, **asked).message
    )
    assert "must leave room for a new one" in refused(whole, max_tokens=1, **asked).message
    assert refused([5], max_tokens=0).field == "max_tokens"


@pytest.mark.parametrize(
    ("asked", "number"),
    [
        ({}, None), ({"logprobs": 3}, None), ({"echo": True}, None),
        ({"echo": False, "logprobs": 3}, None), ({"echo": True, "logprobs": 3}, 3),
        ({"prompt_logprobs": 0}, 0), ({"prompt_logprobs": 2, "logprobs": 3}, 2),
        ({"prompt_logprobs": 2, "logprobs": 3, "echo": True}, 3),
    ],
)  # fmt: skip
def test_an_echo_has_the_prompts_log_probabilities(
    asked: dict[str, Any], number: int | None
) -> None:
    assert request_of(**asked).sampling.prompt_logprobs == number


def test_a_field_reaches_the_router_by_its_name_or_the_gateway_uses_it() -> None:
    records = (GenerationRequest, SamplingParams, TokenRules)
    by_name = {field.name for record in records for field in fields(record)}
    used_here = {"stop", "timeout_s", "structured_outputs"}
    used_here |= {"routed_experts", "return_routed_experts"}  # both are the router's ``routed``
    assert Generation.model_fields.keys() - by_name == used_here
