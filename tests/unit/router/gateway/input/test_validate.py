"""What the one validation below HTTP and gRPC takes, refuses and fills in."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from cluster.errors import InvalidRequestError, UnknownModelError
from cluster.spec import OnExpertLoss
from router.config.deployment import GatewayConfig
from router.gateway.input.request.model import ChatRequest, GrpcRequest
from router.gateway.input.validate import CheckedRequest, Validator
from router.messages.request import Received
from tests.unit.gateway_fakes import CONTEXT, EOS, served, tokenizer, vocab_size

LIMITS = GatewayConfig(max_choices=4, max_logprobs=5, default_timeout_s=20, max_timeout_s=60)
HUGE = 10**400


def check(
    prompt: Any = "in the", model: Any = "tiny", options: Any = None, **sampling: Any
) -> CheckedRequest:
    return checked({"model": model, **sampling, **(options or {})}, prompt)


def checked(
    given: dict[str, Any], prompt: Any, resume: Any = (), limits: GatewayConfig = LIMITS
) -> CheckedRequest:
    validator = Validator({"tiny": served()}, limits)
    asked = validator.read(GrpcRequest, {"model": "tiny", **given})
    return validator.check(asked, prompt, resume=resume)


def test_defaults_are_filled_in() -> None:
    before = time.monotonic()
    filled = check()
    sampling = filled.request.sampling
    assert filled.request.prompt_token_ids == tuple(tokenizer().encode("in the"))
    assert (sampling.max_tokens, sampling.temperature, sampling.n) == (16, 1.0, 1)
    assert (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1.0, 0.0)
    assert sampling.logprobs is None
    assert filled.stops == ()
    assert before + 20 <= filled.request.deadline_s <= time.monotonic() + 20


def test_a_missing_seed_is_drawn_anew_each_time() -> None:
    seeds = {check().request.sampling.seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_request_ids_differ() -> None:
    assert check().request.request_id != check().request.request_id


def test_what_is_given_is_taken() -> None:
    taken = check(
        [5, vocab_size() - 1],
        max_tokens=CONTEXT - 2,
        temperature=0,
        top_k=-1,
        top_p=0.5,
        min_p=1,
        seed=-(2**63),
        stop="end",
        ignore_eos=True,
        logprobs=5,
        n=4,
        options={"timeout_s": 60, "on_expert_loss": "drop", "priority": -(2**63)},
    )
    assert taken.request.on_expert_loss == "drop"
    assert taken.request.priority == -(2**63)
    sampling = taken.request.sampling
    assert taken.request.prompt_token_ids == (5, vocab_size() - 1)
    assert sampling.max_tokens == CONTEXT - 2
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 0, 0.5)
    assert (sampling.min_p, sampling.seed, sampling.ignore_eos) == (1.0, -(2**63), True)
    assert (sampling.logprobs, sampling.n, taken.stops) == (5, 4, ("end",))


def test_default_max_tokens_is_what_is_left_of_the_context() -> None:
    assert check([5] * (CONTEXT - 3)).request.sampling.max_tokens == 3


def test_the_answer_in_a_conversation_may_fill_the_context() -> None:
    validator = Validator({"tiny": served()}, LIMITS)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    asked = validator.read(ChatRequest, body)
    request = validator.check(asked, asked.messages, "messages").request
    rendered = tokenizer().encode("user: hi\nassistant:", add_special_tokens=False)
    assert request.prompt_token_ids == tuple(rendered)
    assert request.sampling.max_tokens == CONTEXT - len(rendered)


def test_top_k_beyond_the_vocabulary_is_the_vocabulary() -> None:
    assert check(top_k=2**31 - 1).request.sampling.top_k == vocab_size()


BAD_SAMPLING: list[tuple[str, Any]] = [
    *(("max_tokens", bad) for bad in (0, -1, 2**31, CONTEXT + 1, True, 1.0, "5", HUGE)),
    *(("temperature", bad) for bad in (-0.1, 100.1, math.nan, math.inf, True, "1", HUGE, [])),
    *(("top_p", bad) for bad in (0, -0.5, 1.01, math.nan, False, HUGE)),
    *(("min_p", bad) for bad in (-0.1, 1.1, math.nan, "0")),
    *(("top_k", bad) for bad in (-2, 2**31, 1.5, True)),
    *(("seed", bad) for bad in (2**63, -(2**63) - 1, 1.0, True, "1")),
    *(("n", bad) for bad in (0, 5, -1, True, HUGE)),
    *(("logprobs", bad) for bad in (-1, 6, True, 1.0)),
    *(("ignore_eos", bad) for bad in (1, "true")),
    *(("stop", bad) for bad in ("", 5, {"a": 1}, ["a"] * 17, b"a")),
]


@pytest.mark.parametrize(("field", "bad"), BAD_SAMPLING)
def test_bad_sampling_names_its_field(field: str, bad: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(**{field: bad})
    assert caught.value.field == field
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("bad", ["", 5, None, "x" * 257, "\ud800"])
def test_a_bad_stop_in_a_list_names_its_place(bad: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(stop=["fine", bad])
    assert caught.value.field == "stop[1]"


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"),
        ([], "prompt"),
        (None, "prompt"),
        (7, "prompt"),
        ({"a": 1}, "prompt"),
        (b"bytes", "prompt"),
        ("half \ud83d", "prompt"),
        ([3, -1], "prompt[1]"),
        ([vocab_size()], "prompt[0]"),
        ([3, 4, True], "prompt[2]"),
        ([1.0], "prompt[0]"),
        ([HUGE], "prompt[0]"),
        ([5] * CONTEXT, "prompt"),
        ("\x00" * CONTEXT, "prompt"),
        ("x" * 1_000_000, "prompt"),
    ],
)
def test_bad_prompts(prompt: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(prompt)
    assert caught.value.field == field
    assert len(caught.value.message) < 300


def test_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_encode(*args: Any, **kwargs: Any) -> list[int]:
        raise AssertionError("tokenised a prompt that cannot fit")

    monkeypatch.setattr(type(tokenizer()), "encode", no_encode)
    with pytest.raises(InvalidRequestError, match="characters"):
        check("x" * 1_000_000)


def test_prompt_and_max_tokens_together_must_fit() -> None:
    assert check([5] * (CONTEXT - 2), max_tokens=2).request.sampling.max_tokens == 2
    with pytest.raises(InvalidRequestError, match="use at most 2") as caught:
        check([5] * (CONTEXT - 2), max_tokens=3)
    assert caught.value.field == "max_tokens"


@pytest.mark.parametrize(("logprobs", "each"), [(None, 3 + 4), (0, 3 + 4), (5, 3 + 4 * 6)])
def test_what_a_request_takes_of_memory_has_a_limit(logprobs: int | None, each: int) -> None:
    sampling: dict[str, Any] = {"max_tokens": 4, "n": 10}
    if logprobs is not None:
        sampling["logprobs"] = logprobs
    checked(sampling, [5, 6, 7], limits=GatewayConfig(max_request_tokens=10 * each))
    with pytest.raises(InvalidRequestError, match=f"add up to {10 * each} tokens") as caught:
        checked(sampling, [5, 6, 7], limits=GatewayConfig(max_request_tokens=10 * each - 1))
    assert caught.value.field == "max_tokens"


def test_one_choice_may_always_fill_the_context() -> None:
    checked({"max_tokens": CONTEXT - 1}, [5], limits=GatewayConfig(max_request_tokens=1))


@pytest.mark.parametrize("bad", [0, -1, 61, math.nan, math.inf, True, "5", HUGE])
def test_bad_timeouts(bad: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(options={"timeout_s": bad})
    assert caught.value.field == "timeout_s"


PRIORITIES = (
    f"(less than or equal to {2**63 - 1}|greater than or equal to {-(2**63)}|be a valid integer)"
)


@pytest.mark.parametrize("bad", [2**63, -(2**63) - 1, 1.0, True, "1", [], HUGE])
def test_bad_priorities(bad: Any) -> None:
    with pytest.raises(InvalidRequestError, match=PRIORITIES) as caught:
        check(options={"priority": bad})
    assert caught.value.field == "priority"


@pytest.mark.parametrize("bad", ["", "x" * 257, 5, "\ud800"])
def test_a_bad_cache_salt_is_refused(bad: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(options={"cache_salt": bad})
    assert caught.value.field == "cache_salt"


def test_a_cache_salt_goes_with_the_request() -> None:
    assert check().request.cache_salt == ""
    assert check(options={"cache_salt": "é" * 256}).request.cache_salt == "é" * 256


def test_a_request_has_priority_0_where_it_names_none() -> None:
    assert check().request.priority == 0
    assert check(options={"priority": 2**63 - 1}).request.priority == 2**63 - 1


@pytest.mark.parametrize("given", [None, "strict", "next_expert", "drop"])
@pytest.mark.parametrize("default", ["strict", "next_expert", "drop"])
def test_a_requests_on_expert_loss_overrides_the_deployments(
    given: str | None, default: OnExpertLoss
) -> None:
    limits = GatewayConfig(on_expert_loss=default)
    taken = checked({"on_expert_loss": given}, [5], limits=limits)
    assert taken.request.on_expert_loss == (given or default)
    assert check().request.on_expert_loss == "strict"


@pytest.mark.parametrize("bad", ["guess", "", 1, ["strict"]])
def test_unknown_on_expert_loss(bad: Any) -> None:
    with pytest.raises(
        InvalidRequestError, match="must be 'strict', 'next_expert' or 'drop'"
    ) as caught:
        check(options={"on_expert_loss": bad})
    assert caught.value.field == "on_expert_loss"


@pytest.mark.parametrize("bad", ["nope", "tiny ", "\ud800"])
def test_an_unknown_model_is_told_which_are_served(bad: str) -> None:
    with pytest.raises(UnknownModelError, match="served: tiny") as caught:
        check(model=bad)
    str(caught.value).encode()


@pytest.mark.parametrize("bad", ["", None, 5, ["tiny"], {}])
def test_a_model_must_be_a_text(bad: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(model=bad)
    assert caught.value.field == "model"


def test_messages_do_not_repeat_the_prompt() -> None:
    secret = "word " * 200
    with pytest.raises(InvalidRequestError) as caught:
        check(secret)
    assert "word" not in str(caught.value)


def check_resume(resume: Any, **sampling: Any) -> CheckedRequest:
    received = [Received(tuple(ids), finished, True, "one") for ids, finished in resume]
    return checked({"seed": 1, **sampling}, "in the", received)


def test_what_a_client_has_of_each_choice_is_taken() -> None:
    request = check_resume([([5, 6], False), ([7, EOS, 8], True)], n=2, max_tokens=3).request
    assert request.received == (
        Received((5, 6), identity="one"),
        Received((7, EOS, 8), True, identity="one"),
    )
    assert check_resume([([], False)]).request.received[0].token_ids == ()
    assert check_resume([([5, EOS], False)]).request.received[0].token_ids == (5, EOS)
    assert check_resume([([EOS, 5], False)], ignore_eos=True).request.received
    assert check().request.received == ()


@pytest.mark.parametrize(
    ("resume", "sampling", "field"),
    [
        ([([5], False)], {"n": 2}, "resume"),
        ([([5], False)] * 3, {"n": 2}, "resume"),
        ([([5], True)] * 2, {"n": 2}, "resume"),
        ([([5] * 17, False)], {}, "resume[0].token_ids"),
        ([([5] * 3, True), ([], False)], {"n": 2, "max_tokens": 2}, "resume[0].token_ids"),
        ([([5, vocab_size()], False)], {}, "resume[0].token_ids[1]"),
        ([([-1], False)], {}, "resume[0].token_ids[0]"),
        ([([EOS, 5], False)], {}, "resume[0].token_ids"),
    ],
)
def test_what_no_client_can_have_is_refused(
    resume: Any, sampling: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_resume(resume, **sampling)
    assert caught.value.field == field


def test_a_request_goes_on_only_with_its_seed() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        checked({}, "in the", [Received((5,))])
    assert caught.value.field == "seed"


def test_tokens_without_the_identity_of_their_model_are_not_gone_on_from() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        checked({"seed": 1, "n": 2}, "in the", [Received(), Received((5,))])
    assert caught.value.field == "resume[1].identity"


@pytest.mark.parametrize(
    ("count", "sampling", "is_taken"),
    [
        (0, {}, True),
        (1, {}, False),
        (2, {"prompt_logprobs": 0}, True),
        (-1, {"prompt_logprobs": 0}, False),
        (99, {"prompt_logprobs": 0}, False),
    ],
)
def test_log_probabilities_of_a_prompt_that_a_client_can_have_are_taken(
    count: int, sampling: dict[str, Any], is_taken: bool
) -> None:
    received = Received((), identity="one", num_prompt_logprobs=count)
    given = {"seed": 1, **sampling}
    if is_taken:
        assert checked(given, "in the begin", [received]).request.received == (received,)
        return
    with pytest.raises(InvalidRequestError) as caught:
        checked(given, "in the begin", [received])
    assert caught.value.field == "resume[0].prompt_logprobs"


def test_a_prompt_alone_needs_no_room_for_a_token() -> None:
    whole = [5] * CONTEXT
    for asked in ({"echo": True}, {"prompt_logprobs": 0}):
        request = check(whole, max_tokens=0, **asked).request
        assert len(request.prompt_token_ids) == CONTEXT
        assert request.sampling.max_tokens == 0
        with pytest.raises(InvalidRequestError, match=r"the context of \d+ holds no more"):
            check([*whole, 5], max_tokens=0, **asked)
        with pytest.raises(InvalidRequestError, match="must leave room for a new one"):
            check(whole, max_tokens=1, **asked)
    with pytest.raises(InvalidRequestError):
        check([5], max_tokens=0)


@pytest.mark.parametrize(
    ("asked", "number"),
    [
        ({}, None),
        ({"logprobs": 3}, None),
        ({"echo": True}, None),
        ({"echo": False, "logprobs": 3}, None),
        ({"echo": True, "logprobs": 3}, 3),
        ({"prompt_logprobs": 0}, 0),
        ({"prompt_logprobs": 2, "logprobs": 3}, 2),
        ({"prompt_logprobs": 2, "logprobs": 3, "echo": True}, 3),
    ],
)
def test_an_echo_with_log_probabilities_has_those_of_the_prompt(
    asked: dict[str, Any], number: int | None
) -> None:
    assert check(**asked).request.sampling.prompt_logprobs == number
