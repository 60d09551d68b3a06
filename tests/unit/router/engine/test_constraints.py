"""Choices that fit a grammar: whole, in a crowd, gone on with, and refused beside mates."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits

from cluster.errors import InternalError, InvalidRequestError
from router.engine import constrained_rows, constraints
from router.engine.constrained_rows import forbidden_of
from router.engine.constraints import MAX_KEPT, Constraint, Grammars
from router.engine.sequence import Sequence as Choice
from router.engine.token_masks import Mask, flags_of
from router.gateway.input.grammar import check_grammar
from router.gateway.input.request.model import Generation
from router.gateway.input.tokenizer import Tokenizer
from router.messages.request import Received
from router.messages.rules import TokenRules
from tests.checkpoints import VOCAB_SIZE
from tests.emulated_device import emulated_device
from tests.emulated_steps import Steps
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.conftest import OpenCluster
from tests.unit.router.engine.test_engine import prompt_of

EOS, LENGTH = 0, 120
PROMPT = prompt_of(10, 7)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def of_schema(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


def of_regex(regex: str) -> str:
    return LLMatcher.grammar_from_regex(regex)


OpenGrammars = Callable[..., Grammars]


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(str(folder), (EOS,))


def grammars_of(
    tokenizer: Tokenizer, vocab_size: int = VOCAB_SIZE, ends: tuple[int, ...] = (EOS,)
) -> Grammars:
    return Grammars(lambda: tokenizer.vocabulary(vocab_size, ends), vocab_size)


@pytest.fixture
def open_grammars(tokenizer: Tokenizer) -> Iterator[OpenGrammars]:
    opened: list[Grammars] = []

    def opening(*given: Any) -> Grammars:
        opened.append(grammars_of(tokenizer, *given))
        return opened[-1]

    yield opening
    for grammars in opened:
        grammars.close()


@pytest.fixture
def grammars(open_grammars: OpenGrammars, monkeypatch: pytest.MonkeyPatch) -> Grammars:
    """Grammars that have time: a busy machine ends no turn early and makes no matcher slow."""
    monkeypatch.setattr(constraints, "AT_ONCE_S", 30.0)
    monkeypatch.setattr(constraints, "QUICK_S", 0.1)
    return open_grammars()


@pytest.fixture(scope="module")
def cluster(folder: Path, tokenizer: Tokenizer) -> Iterator[LocalCluster]:
    grammars = grammars_of(tokenizer)
    made = LocalCluster(folder, grammars=grammars)
    yield made
    made.close()
    grammars.close()


def flags_after(constraint: Constraint) -> np.ndarray:
    """Return what may come next, bool [V]."""
    mask = constraint.allowed(30)
    assert mask is not None
    return flags_of(mask, constraint.vocab_size)


def asked(name: str, grammar: str, **sampling: Any) -> Any:
    given = {"ignore_eos": False, "grammar": grammar, **sampling}
    return greedy_request(name, PROMPT, LENGTH, **given)


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_fits_its_schema(cluster: LocalCluster, tokenizer: Tokenizer, seed: int) -> None:
    request = asked(f"json{seed}", of_schema(PERSON), temperature=float(seed), seed=seed)
    [[event]] = cluster.generate(request)
    assert event.finish_reason == "stop"
    assert event.token_ids[-1] == EOS
    jsonschema.validate(json.loads(tokenizer.decode(event.token_ids)), PERSON)


def test_an_answer_fits_its_regex_and_one_of_its_texts(
    cluster: LocalCluster, tokenizer: Tokenizer
) -> None:
    for seed in range(5):
        dated = asked(f"r{seed}", of_regex("[0-9]{4}-[01][0-9]"), temperature=1.5, seed=seed)
        [[event]] = cluster.generate(dated)
        assert re.fullmatch("[0-9]{4}-[01][0-9]", tokenizer.decode(event.token_ids))
        chosen = asked(f"c{seed}", 'start: "über" | "the 🚀" | "the"', temperature=2.0, seed=seed)
        [[event]] = cluster.generate(chosen)
        assert tokenizer.decode(event.token_ids) in ("über", "the 🚀", "the")


def test_a_crowd_with_and_without_grammars_has_the_tokens_of_each_alone(
    cluster: LocalCluster,
) -> None:
    grammars = ["", of_schema(PERSON), of_regex("(ab|cd)+e"), 'start: "the fox"']
    requests = [
        replace_tokens(asked(f"{number}-{seed}", grammar, temperature=1.0, seed=seed), 40)
        for seed in range(3)
        for number, grammar in enumerate(grammars)
    ]
    alone = [cluster.generate(replace(r, request_id=f"{r.request_id}-alone"))[0] for r in requests]
    assert cluster.generate(*requests) == alone


def replace_tokens(request: Any, max_tokens: int) -> Any:
    return replace(request, sampling=replace(request.sampling, max_tokens=max_tokens))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_choice_goes_on_elsewhere_with_the_same_tokens(
    cluster: LocalCluster, temperature: float
) -> None:
    request = asked(f"whole{temperature}", of_schema(PERSON), temperature=temperature, seed=9)
    [[whole]] = cluster.generate(request)
    for count in (0, 1, 5, len(whole.token_ids) - 1):
        received = (Received(whole.token_ids[:count]),)
        name = f"{request.request_id}-{count}"
        before = cluster.engine.replayed.copy()
        [[rest]] = cluster.generate(replace(request, request_id=name, received=received))
        assert set(cluster.engine.replayed - before) <= {"equal"}  # those that were not found
        assert rest.token_ids == whole.token_ids[count:]
        assert rest.finish_reason == "stop"


def test_a_grammar_costs_a_device_one_more_copy_to_it_a_step(
    cluster: LocalCluster, open_cluster: OpenCluster, open_grammars: OpenGrammars
) -> None:
    """What it forbids is known after the step has begun."""
    request = greedy_request("r", PROMPT, 20, grammar=of_schema(PERSON))
    [[expected]] = cluster.generate(request)
    with emulated_device() as device:
        there = open_cluster(grammars=open_grammars(), device=device.device)
        steps = Steps(there, device)
        [[event]] = there.generate(request)
        there.close()
    assert event.token_ids == expected.token_ids
    num_layers = len(there.checkpoint.shape.layers)
    for copies in steps.copies:
        assert len(copies.to_host) == num_layers + 1
        assert len(copies.to_device) <= num_layers + 2
        assert not copies.host_reads
        assert not copies.mixed
    assert max(len(copies.to_device) for copies in steps.copies) == num_layers + 2


def test_tokens_that_do_not_fit_their_grammar_end_their_request_alone(
    cluster: LocalCluster,
) -> None:
    good = asked("good", of_regex("[ab]{20}"))
    bad = replace(asked("bad", of_regex("[ab]{20}")), received=(Received((7, 8)),))
    for request in (good, bad):
        cluster.engine.submit(request)
    with pytest.raises(InvalidRequestError, match="can no longer match its grammar"):
        cluster.result(bad)
    [event] = cluster.result(good)
    assert event.finish_reason == "stop"


def test_a_grammar_that_takes_too_much_ends_its_request_alone(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = LLParserLimits(step_lexer_fuel=50, verbose_errors=False)
    monkeypatch.setattr(constraints, "parser_limits", lambda: limits)
    bad = asked("explodes", of_regex("([ab]*a[ab]{30}c)+"), temperature=1.0, seed=1)
    good = replace_tokens(asked("beside", "", temperature=1.0, seed=1, ignore_eos=True), 30)
    expected = cluster.generate(replace(good, request_id="before"))
    cluster.engine.submit(bad)
    assert cluster.generate(good) == expected
    with pytest.raises(InvalidRequestError, match="can no longer match its grammar"):
        cluster.result(bad)


@pytest.mark.parametrize(
    ("grammar", "is_barred"), [(of_regex("a"), True), ('start: "x<eos>y"', False)]
)
def test_a_grammar_that_leaves_no_token_is_an_error(
    cluster: LocalCluster, tokenizer: Tokenizer, grammar: str, is_barred: bool
) -> None:
    """Since rules forbid all that it allows, or since a special token is no text of an answer."""
    assert tokenizer.token_text(EOS) == "<eos>"
    [a] = tokenizer.encode("a")
    request = asked(grammar, grammar, rules=TokenRules(bad_words=((a,),) * is_barred))
    with pytest.raises(InvalidRequestError, match="exclude every token that the grammar allows"):
        cluster.generate(request)


def test_without_a_vocabulary_a_grammar_is_refused(open_cluster: OpenCluster) -> None:
    with pytest.raises(InvalidRequestError, match="no vocabulary"):
        open_cluster().generate(asked("r", of_regex("a")))


def test_a_slow_grammar_holds_up_nobody(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its choice is computed again until the grammar is done; its prompt is scored only once."""
    scored = {"temperature": 1.0, "seed": 4, "prompt_logprobs": 2}
    request = asked("quick", of_regex("[ab]{6}"), **scored)
    expected = cluster.generate(request)
    plain = replace_tokens(asked("plain", "", temperature=1.0, seed=4, ignore_eos=True), 60)
    tokens = cluster.generate(plain)
    held = Held(monkeypatch)
    monkeypatch.setattr(Constraint, "is_slow", True)
    monkeypatch.setattr(constrained_rows, "MAX_WAIT_S", 0.001)
    cluster.engine.submit(replace(request, request_id="slow"))
    held.wait_begun()
    assert cluster.generate(replace(plain, request_id="beside a slow one")) == tokens
    held.permits.release(100)
    assert cluster.result(replace(request, request_id="slow")) == expected[0]


def test_a_step_does_not_wait_again_for_a_choice_that_was_late_unless_all_were(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constrained_rows, "MAX_WAIT_S", 0.2)
    waits_s: list[float] = []

    class Late:
        def allowed(self, timeout_s: float) -> None:
            waits_s.append(timeout_s)

    late = Choice(asked("late", of_regex("a")), 0, list(PROMPT), constraint=cast(Any, Late()))
    plain = Choice(asked("plain", ""), 0, list(PROMPT))
    for sampled in ([late, plain], [late, plain], [late]):
        assert forbidden_of(sampled, lambda *tensors: tensors) is None
        assert late.deferred
        assert not plain.deferred
    assert [wait_s > 0.1 for wait_s in waits_s] == [True, False, True]


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_matcher_that_panics_ends_its_request_alone(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, is_slow: bool
) -> None:
    class PanicError(BaseException):
        """As pyo3's, which is no Exception."""

    def panics(*given: Any) -> Any:
        raise PanicError

    beside = replace_tokens(asked(f"beside{is_slow}", "", seed=3, ignore_eos=True), 30)
    cluster.generate(asked(f"compiled{is_slow}", of_regex("[ab]{6}")))
    monkeypatch.setattr(Constraint, "is_slow", is_slow)
    monkeypatch.setattr(Constraint, "_mask_after", panics)
    cluster.engine.submit(beside)
    with pytest.raises(InternalError, match="PanicError"):
        cluster.generate(asked(f"panics{is_slow}", of_regex("[ab]{6}")))
    assert cluster.result(beside)[0].finish_reason == "length"
    monkeypatch.undo()
    [[event]] = cluster.generate(asked(f"after a panic{is_slow}", of_regex("[ab]{6}")))
    assert event.finish_reason == "stop"


@pytest.mark.parametrize("vocab_size", [200, 4 * VOCAB_SIZE])
def test_a_model_may_have_fewer_or_more_tokens_than_its_tokenizer(
    open_grammars: OpenGrammars, tokenizer: Tokenizer, vocab_size: int
) -> None:
    ends = (EOS, vocab_size - 1)
    flags = flags_after(open_grammars(vocab_size, ends).begin(of_regex("[ab]*")))
    assert flags.shape == (vocab_size,)
    assert flags[EOS]
    texts = {tokenizer.token_text(i) for i in flags.nonzero()[0].tolist()} - {
        tokenizer.token_text(end) for end in ends
    }
    assert {"a", "b"} <= texts
    assert all(re.fullmatch("[ab]+", text) for text in texts)


def test_what_others_have_asked_of_a_grammar_fails_nobody(
    open_grammars: OpenGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of a matcher share a lexer, whose states are limited; each answer needs new ones."""
    limits = LLParserLimits(max_lexer_states=3_000, verbose_errors=False)
    monkeypatch.setattr(constraints, "parser_limits", lambda: limits)

    def walk(seed: int, grammars: Grammars) -> list[int]:
        random, token_ids = Random(seed), list[int]()
        constraint = grammars.begin(of_regex("([a-z ]*a[a-z ]{60}c)+"))
        for _ in range(60):
            flags = flags_after(constraint)
            token_id = random.choice([i for i in flags.nonzero()[0].tolist() if i != EOS])
            constraint.read(token_id)
            token_ids.append(token_id)
        return token_ids

    common = open_grammars()
    for seed in range(8):
        assert walk(seed, common) == walk(seed, open_grammars())


def test_only_what_fits_may_follow_and_every_text_can_come(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    """Against a plain search over a small language. Of forced letters one spelling is allowed."""
    words = ["the", "then", "other", "fox!"]
    known = ((token_id, tokenizer.token_text(token_id)) for token_id in range(1, VOCAB_SIZE))
    texts = {token_id: text for token_id, text in known if text}  # the model has more ids
    whole: set[str] = set()

    def fitting(so_far: str) -> set[int]:
        found = {t for t, text in texts.items() if any(w.startswith(so_far + text) for w in words)}
        return found | ({EOS} if so_far in words else set())

    def search(ids: Sequence[int]) -> None:
        constraint = grammars.begin("start: " + " | ".join(map(json.dumps, words)))
        flags = flags_after(constraint)
        for token_id in ids:
            constraint.read(token_id)
            flags = flags_after(constraint)
        so_far = "".join(texts[token_id] for token_id in ids)
        allowed = set(flags.nonzero()[0].tolist())
        assert allowed <= fitting(so_far)
        assert (EOS in allowed) == (so_far in words)
        if EOS in allowed:
            whole.add(so_far)
        for token_id in sorted(allowed - {EOS}):
            search([*ids, token_id])

    search([])
    assert whole == set(words)


class Held:
    """Slow matchers: each call of :meth:`Constraint._next` waits for a permit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.permits, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self.calls: list[tuple[Constraint, int]] = []
        first = Constraint._next

        def slow(constraint: Constraint, token_ids: Sequence[int]) -> Mask:
            self.calls.append((constraint, len(token_ids)))
            self.begun.release()
            assert self.permits.acquire(timeout=300)
            return first(constraint, token_ids)

        monkeypatch.setattr(Constraint, "_next", slow)

    def wait_begun(self) -> None:
        assert self.begun.acquire(timeout=300)


def make_slow(*choices: Constraint) -> None:
    """Give each choice a compiled grammar of its own, which is slow."""
    for choice in choices:
        assert choice._compiled is not None
        lock = threading.Lock()
        choice._compiled = replace(choice._compiled, slow_until_s=math.inf, lock=lock)


def begun_choices(grammars: Grammars, num: int) -> tuple[list[Constraint], int]:
    """Return choices of ``a{9}`` whose first answers are known, and a token that may follow."""
    choices = [grammars.begin(of_regex("a{9}")) for _ in range(num)]
    flags = [flags_after(choice) for choice in choices]
    return choices, int(flags[0].nonzero()[0][0])


def three_are_late(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Constraint], Constraint, int, Held]:
    """Return three choices whose slow matchers have a token to read, and a quick choice."""
    (*late, quick), token_id = begun_choices(grammars, 4)
    make_slow(*late)
    held = Held(monkeypatch)
    for choice in late:
        choice.read(token_id)
    held.wait_begun()
    return late, quick, token_id, held


def test_what_waits_when_the_threads_end_is_not_waited_for(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, second), token_id = begun_choices(grammars, 2)
    make_slow(first, second)
    held = Held(monkeypatch)
    first.read(token_id)
    held.wait_begun()
    second.read(token_id)
    grammars.close()
    held.permits.release()
    with pytest.raises(InternalError, match="matcher has stopped"):
        second.allowed(0.1)
    assert [choice for choice, _ in held.calls] == [first]


def test_tokens_read_meanwhile_are_read_in_their_order_and_answered_once(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice's answers come neither twice nor from two threads, and are those of its tokens."""
    letters = [tokenizer.encode(letter)[0] for letter in "abcabc"]
    choice = grammars.begin(of_regex("(abc)+d"))
    flags_after(choice)
    make_slow(choice)
    held = Held(monkeypatch)
    choice.read(letters[0])
    held.wait_begun()
    for token_id in letters[1:]:
        choice.read(token_id)
        grammars.follow()
        assert choice.allowed(0.0) is None
    held.permits.release(2)
    allowed = set(flags_after(choice).nonzero()[0].tolist())
    assert held.calls == [(choice, 1), (choice, 6)]
    monkeypatch.undo()
    whole = grammars.begin(of_regex("(abc)+d"))
    for token_id in letters:
        whole.read(token_id)
        flags = flags_after(whole)
    assert allowed == set(flags.nonzero()[0].tolist())
    assert {tokenizer.token_text(token_id)[0] for token_id in allowed} == {"a", "d"}


def test_a_quick_choice_waits_for_no_slow_matcher(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, quick, token_id, held = three_are_late(grammars, monkeypatch)
    for _ in range(3):
        quick.read(token_id)
        grammars.follow()
        assert quick.known is not None
    assert all(choice.allowed(0.0) is None for choice in late)
    late[1].close()
    held.permits.release(2)
    for choice in (late[0], late[2]):
        assert flags_after(choice).any()
    assert [choice for choice, _ in held.calls] == [late[0], late[2]]  # none of what has ended
    with pytest.raises(InternalError, match="matcher has stopped"):
        flags_after(late[1])


def test_a_quick_choice_that_is_handed_over_waits_for_one_slow_matcher_and_not_for_all(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, quick, token_id, held = three_are_late(grammars, monkeypatch)
    quick.read(token_id)
    quick.read(token_id)  # two at once are for the thread
    assert quick.allowed(0.0) is None
    held.permits.release(2)
    assert flags_after(quick).any()
    assert late[2].allowed(0.0) is None
    assert [choice for choice, _ in held.calls[:2]] == [late[0], quick]
    held.permits.release(2)
    assert flags_after(late[2]).any()


def test_the_engine_follows_nothing_for_a_while_after_a_slow_matcher(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others' pause is shorter than that of the slow grammar."""
    clock = SimpleNamespace(now_s=0.0, spent_s=0.0, taken_s=0.0)

    def spend() -> float:
        clock.spent_s += clock.taken_s
        spent_s: float = clock.spent_s
        return spent_s

    monkeypatch.setattr(time, "monotonic", lambda: clock.now_s)
    monkeypatch.setattr(time, "thread_time", spend)
    (slow, mate, other), token_id = begun_choices(grammars, 3)
    assert not any(choice.is_handed_over for choice in (slow, mate, other))
    assert other._compiled is not None
    other._compiled = replace(other._compiled, lock=threading.Lock())  # a grammar of its own
    clock.taken_s = 1.0
    slow.read(token_id)
    grammars.follow()
    clock.taken_s = 0.0
    assert slow.known is not None
    assert (slow.is_slow, mate.is_slow, other.is_slow) == (True, True, False)
    for choice, pause in ((other, constraints.ALL_PAUSE), (mate, constraints.GRAMMAR_PAUSES)):
        for clock.now_s in (0.9 * pause, 1.1 * pause):
            choice.read(token_id)
            is_handed_over = choice.is_handed_over
            grammars.follow()
            is_at_once = not is_handed_over and choice.known is not None
            assert is_at_once == (clock.now_s > pause)
            flags_after(choice)


def test_the_engine_does_not_wait_for_a_matcher_of_the_same_grammar(grammars: Grammars) -> None:
    (first, second), token_id = begun_choices(grammars, 2)
    assert first._compiled is not None
    with first._compiled.lock:  # as the other thread holds it
        second.read(token_id)
        grammars.follow()
        assert second.is_handed_over
        assert second.allowed(0.0) is None
    assert flags_after(second).any()


def test_choices_are_answered_once_however_their_grammars_speed_changes(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads change it while the thread that follows sorts what waits."""
    choices, token_id = begun_choices(grammars, 6)
    random, calls, first = Random(0), list[Constraint](), Constraint.answer_all

    def counted(constraint: Constraint) -> None:
        calls.append(constraint)
        first(constraint)

    monkeypatch.setattr(Constraint, "answer_all", counted)
    monkeypatch.setattr(Constraint, "is_slow", property(lambda _: random.random() < 0.5))
    for _ in range(8):
        for choice in choices:
            choice.read(token_id)
        grammars.follow()
        assert all(flags_after(choice).any() for choice in choices)
    assert len(calls) <= 8 * len(choices)


def test_the_compiled_grammars_are_those_that_were_used_last(grammars: Grammars) -> None:
    flags_after(grammars.begin(of_regex("used")))
    kept = grammars._kept[of_regex("used")]
    for number in range(MAX_KEPT + 5):
        flags_after(grammars.begin(of_regex(f"a{{{number + 1}}}")))
        flags_after(grammars.begin(of_regex("used")))
    assert len(grammars._kept) == MAX_KEPT
    assert grammars._kept[of_regex("used")] is kept


GRAMMARS = ("[ab]{12}", "(ab|cd)+e", "[a-z ]{3,40}", "the (quick|slow) fox")


def walked(grammars: Grammars, num: int) -> list[list[list[int]]]:
    """Return the allowed tokens of choices that are followed side by side, by step."""
    choices = [grammars.begin(of_regex(GRAMMARS[i % len(GRAMMARS)])) for i in range(num)]
    random, found = Random(0), []
    for _ in range(8):
        allowed = [flags_after(choice).nonzero()[0].tolist() for choice in choices]
        found.append(allowed)
        for choice, ids in zip(choices, allowed, strict=True):
            choice.read(random.choice([i for i in ids if i != EOS] or ids))
        grammars.follow()
    return found


@pytest.mark.parametrize("num", [1, 5, 70])
def test_choices_have_the_same_answers_at_once_and_from_the_thread(
    open_grammars: OpenGrammars, monkeypatch: pytest.MonkeyPatch, num: int
) -> None:
    at_once = walked(open_grammars(), num)
    monkeypatch.setattr(constraints, "QUICK_S", -1.0)
    assert walked(open_grammars(), num) == at_once


EIGHT = [f"a.{{{place}}}b" for place in range(1, 9)]
AT_LIMITS: dict[str, dict[str, Any]] = {
    "patterns": {"json": {"allOf": [{"pattern": pattern} for pattern in EIGHT[:3]]}},
    "searches": {
        "grammar": "start: B\nB: " + " & ".join(rf"/(.|\n)*{each}(.|\n)*/" for each in EIGHT)
    },
    "many repeats": {"regex": "((a|b){1000}c){100}"},
    "a lookback": {"regex": "([ab]*a[ab]{60}c)+"},
    "multiples": {"json": {"allOf": [{"multipleOf": 97}, {"multipleOf": 101}]}},
    "many choices": {"choice": [f"{'ab' * (n % 50)}{n}" for n in range(1024)]},
}


@pytest.mark.parametrize("form", AT_LIMITS.values(), ids=AT_LIMITS)
def test_a_form_at_the_limits_is_answered_or_ended_soon(
    grammars: Grammars, form: dict[str, Any]
) -> None:
    asked = Generation.model_validate({"structured_outputs": form})
    grammar = check_grammar(asked, (EOS,))
    random, begun_at_s = Random(0), time.process_time()
    for _ in range(3):
        choice = grammars.begin(grammar)
        try:
            for _ in range(30):
                allowed = [i for i in flags_after(choice).nonzero()[0].tolist() if i != EOS]
                if not allowed:
                    break
                choice.read(random.choice(allowed))
                grammars.follow()
        except InvalidRequestError:  # llguidance's limits
            continue
    assert time.process_time() - begun_at_s < 5.0  # some 0.03 s a token in a bad case


FOLLOW = """
import sys, threading
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from router.gateway.input.grammar import check_grammar
from router.gateway.input.request.model import Generation
from router.config.grammar_limits import parser_limits

tokens = LLTokenizer(sys.argv[1])  # as transformers would read it, in a tenth of the time
names = "\\n".join(f'T{i}: "a" T{i + 1}? | "b" T{i + 1}' for i in range(1_500))
lark = f'start: T0\\n{names}\\nT1500: "c"\\n'
asked = Generation.model_validate({"structured_outputs": {"grammar": lark}})
grammar = check_grammar(asked, (0,))
matcher = LLMatcher(tokens, grammar, log_level=0, limits=parser_limits())

def follow():
    for step in range(40):
        words = np.zeros(-(-tokens.vocab_size // 32), np.uint32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        assert not matcher.is_error(), matcher.get_error()
        [allowed] = np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()
        matcher.consume_token(int(allowed[-1]))
    print("followed")

threading.stack_size(256 << 10)
thread = threading.Thread(target=follow)
thread.start()
thread.join()
"""


def test_to_follow_a_deep_grammar_takes_little_of_a_stack(folder: Path) -> None:
    """llguidance's executor has a stack of 2 MiB; a thread that overflows ends its process."""
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW, str(folder / "tokenizer.json")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "followed\n", done.stderr
