"""The clients of a world: each sends requests to gateways, and keeps what comes of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cluster.errors import ExpertMeshError
from router.messages.request import GenerationRequest, Received, TokenEvent
from tests.world.forms import sampling_of
from tests.world.kernel import Process
from tests.world.model import VOCAB, tokens_of

if TYPE_CHECKING:
    from tests.world.serve_api import Replica
    from tests.world.world import World

MODEL, MIXTURE = "exact", "mixture"
BEGINNINGS = (tuple(range(100, 109)), (*range(100, 105), *range(200, 208)))
"""What many prompts begin with: pages of the cache that the first has are shared with the second,
since their first page is the same."""


@dataclass
class Plan:
    """A request to be sent: when, by whom, and with what."""

    at_s: float
    client: int
    prompt: tuple[int, ...]
    max_tokens: int
    timeout_s: float
    n: int = 1
    is_streamed: bool = True
    on_expert_loss: str = "strict"
    cancel_after: int | None = None
    """The number of tokens after which the client cancels."""
    priority: int = 0
    tenant: str = ""
    """The name of the client's key; empty where there are no keys."""
    model: str = MODEL
    form: str = ""
    """What an answer fits (:mod:`tests.world.forms`)."""
    received: tuple[int, ...] = ()
    """How many tokens of each choice the client has from before; empty where it has none."""
    is_inexact: bool = False
    """Whether some of these were not exact."""


@dataclass
class Choice:
    token_ids: list[int] = field(default_factory=list)
    identity: str = ""
    is_exact: bool = True
    """As the latest event said."""
    finish_reason: str | None = None
    forgot_exact: bool = False
    """Whether an event said exact after one that did not."""


@dataclass
class Answer:
    """What came of a request: ``error`` is the class of an error's name.

    ``lost_gateways`` counts the gateways that ended under it; after each the client goes on at
    another with the tokens that it has.
    """

    plan: Plan
    choices: list[Choice]
    begun_at_s: float
    ended_at_s: float | None = None
    error: str = ""
    message: str = ""
    is_cancelled: bool = False
    first_at_s: float | None = None
    lost_gateways: int = 0


class Client:
    """Sends requests from a host of its own."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.answers: list[Answer] = []
        self._process: Process = world.kernel.process("clients", "clients")
        self._choose = random.Random(f"clients-{world.seed}")

    def send(self, plan: Plan) -> None:
        kernel = self._world.kernel
        with kernel.within(self._process):
            kernel.call_at(plan.at_s, lambda: kernel.create_task(self._serve(plan)))

    def is_waiting(self) -> bool:
        return any(answer.ended_at_s is None for answer in self.answers)

    async def _serve(self, plan: Plan) -> None:
        kernel = self._world.kernel
        answer = Answer(plan, _begun(plan, self._world.identity), kernel.now_s)
        self.answers.append(answer)
        until_s = kernel.now_s + plan.timeout_s
        try:
            while True:
                replica = await self._gateway(until_s)
                if replica is None:
                    answer.error = "NoGateway"
                    return
                if await self._attempt(replica, answer, until_s - kernel.now_s):
                    return
                if all(choice.finish_reason for choice in answer.choices):
                    return  # nothing is missing
                answer.lost_gateways += 1
        finally:
            answer.ended_at_s = kernel.now_s

    async def _gateway(self, until_s: float) -> Replica | None:
        """Choose a gateway that runs, or wait for one until the deadline."""
        while self._world.kernel.now_s < until_s:
            found = [
                r
                for r in self._world.serve.deployments["gateway"].running()
                if r.handle.instance.deployment.ready().is_ready or self._choose.random() < 0.2
            ]
            if found:
                return self._choose.choice(found)
            await asyncio.sleep(0.1)
        return None

    async def _attempt(self, replica: Replica, answer: Answer, left_s: float) -> bool:
        """Have a gateway answer; returns false where it ended before the answer did."""
        done = self._world.kernel.create_future()
        process = replica.process

        def lost() -> None:
            if not done.done():
                done.set_result(False)

        process.on_end.append(lost)
        replica.num_requests += 1
        with self._world.kernel.within(process):
            task = self._world.kernel.create_task(self._within(replica, answer, left_s))

        def ended(_: object) -> None:
            if not done.done():
                done.set_result(True)

        task.add_done_callback(ended)
        try:
            return process.is_alive and bool(await done)
        finally:
            replica.num_requests -= 1

    async def _within(self, replica: Replica, answer: Answer, left_s: float) -> None:
        """Serve a request as the gateway's service does; runs in the gateway's process."""
        try:
            request = self._request(answer, left_s)
            upstream = replica.handle.instance.upstream
            async with aclosing(upstream.generate(request)) as events:
                await self._read(request, events, answer)
        except ExpertMeshError as error:
            answer.error, answer.message = type(error).__name__, str(error)
        except Exception as error:
            answer.error, answer.message = f"untyped {type(error).__name__}", str(error)

    def _request(self, answer: Answer, left_s: float) -> GenerationRequest:
        import time

        plan = answer.plan
        received: tuple[Received, ...] = ()
        if any(choice.token_ids for choice in answer.choices):
            received = tuple(
                Received(tuple(c.token_ids), c.finish_reason is not None, c.is_exact, c.identity)
                for c in answer.choices
            )
        sampling = sampling_of(plan.form, plan.max_tokens, plan.n, plan.prompt)
        return GenerationRequest(
            f"r{self._world.kernel.random.getrandbits(64):016x}", MODEL, plan.prompt, sampling,
            time.monotonic() + left_s, on_expert_loss=plan.on_expert_loss,
            streamed=plan.is_streamed, received=received, priority=plan.priority,
            tenant=plan.tenant,
        )  # fmt: skip

    async def _read(
        self, request: GenerationRequest, events: AsyncGenerator[TokenEvent, None], answer: Answer
    ) -> None:
        async for event in events:
            if self._take(event, answer):
                return
        answer.error = "the stream ended early"

    def _take(self, event: TokenEvent, answer: Answer) -> bool:
        """Take new tokens; returns whether the client wants no more."""
        plan, choice = answer.plan, answer.choices[event.index]
        if event.start != len(choice.token_ids):
            answer.error = f"tokens from {event.start} after {len(choice.token_ids)}"
            return True
        if answer.first_at_s is None:
            answer.first_at_s = self._world.kernel.now_s
        choice.token_ids += event.token_ids
        choice.identity = event.identity or choice.identity
        choice.forgot_exact |= event.exact and not choice.is_exact
        choice.is_exact = event.exact
        choice.finish_reason = event.finish_reason
        if all(c.finish_reason for c in answer.choices):
            return True
        got = sum(len(c.token_ids) for c in answer.choices)
        answer.is_cancelled = plan.cancel_after is not None and got >= plan.cancel_after
        return answer.is_cancelled


def _begun(plan: Plan, identity: str) -> list[Choice]:
    """Return the choices of a request with the tokens that its client has already."""
    right = tokens_of(identity, plan.prompt, plan.max_tokens, plan.form) if plan.received else ()
    return [
        Choice(
            list(right[:number]),
            identity if number else "",
            not (number and plan.is_inexact),
            "length" if number == plan.max_tokens else None,
        )
        for number in plan.received or (0,) * plan.n
    ]


def plans(source: random.Random, begin_s: float, end_s: float, num_clients: int) -> list[Plan]:
    found = []
    for client in range(num_clients):
        at_s = begin_s + source.random()
        while at_s < end_s:
            found.append(_plan(source, at_s, client))
            at_s += source.expovariate(0.7) + 0.3
    return sorted(found, key=lambda plan: plan.at_s)


def _plan(source: random.Random, at_s: float, client: int) -> Plan:
    plan = Plan(
        at_s,
        client,
        tuple(source.randrange(VOCAB) for _ in range(source.randrange(1, 8))),
        source.randrange(1, 12),
        source.choice((0.3, 2.0, 5.0, 5.0, 10.0, 10.0)),
    )
    if source.random() < 0.15:
        plan = replace(plan, n=2)
    if source.random() < 0.3:
        plan = replace(plan, is_streamed=False)
    if source.random() < 0.1:
        plan = replace(plan, cancel_after=source.randrange(0, 4))
    if source.random() < 0.25:
        plan = replace(plan, on_expert_loss=source.choice(("next_expert", "drop")))
    if source.random() < 0.1:
        plan = replace(plan, priority=source.randrange(-1, 2))
    if source.random() < 0.05:
        prompt = tuple(source.randrange(VOCAB) for _ in range(40))
        plan = replace(plan, prompt=prompt)
    return replace(plan, prompt=_with_beginning(plan.prompt))


def _with_beginning(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Let every second prompt begin as others do; which ones is a function of the prompt."""
    kind = sum(prompt) % 4
    return (*BEGINNINGS[kind], *prompt) if kind < len(BEGINNINGS) else prompt
