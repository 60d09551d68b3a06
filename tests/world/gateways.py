"""The gateways of a world, and those of some worlds that ask for keys and count quotas.

There clients send gRPC's bytes through the product's own door: keys, roles, quotas, validation and
text. Only grpcio itself is left out, whose context :class:`GrpcContext` stands for.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
import yaml

from cluster.errors import ExpertMeshError
from cluster.reports import Samples
from router.config.deployment import GatewayConfig
from router.gateway.grpc.methods import GrpcMethods
from router.gateway.input.tokenizer import GatewayModel, Tokenizer
from router.gateway.limits.charges import Charges
from router.gateway.limits.room import Room
from router.gateway.listen.grpc import Door
from router.gateway.metrics import Metrics
from router.gateway.service import GenerationService
from router.gateway.upstream.affinity import keys_of_call
from router.gateway.upstream.deployment import Deployment
from router.gateway.upstream.ray_upstream import RayUpstream
from router.gateway.upstream.router_links import RouterCalls
from router.messages.request import TokenEvent
from router.protos import inference_pb2
from router.protos.errors import DETAILS_KEY, error_from_grpc
from router.security.access import FIELD, Access
from router.security.keyring import Keyring
from router.served import ServedModel
from tests.world.clients import MODEL, Answer, Client, Plan
from tests.world.law_of_queues import MAX_HELD
from tests.world.mixtures import PredictingClient, predictions_of
from tests.world.model import VOCAB

if TYPE_CHECKING:
    from tests.world.serve_api import Replica
    from tests.world.weather import Scenario
    from tests.world.world import World

SHARE = 0.12
"""The share of the seeds without a rarity whose gateways ask for keys."""
ANYBODY = "client"
STRANGER, MONITOR, SMALL, NARROW = "stranger", "monitor", "small", "narrow"
LIMITS: dict[str, dict[str, int]] = {
    ANYBODY: {},
    MONITOR: {},
    SMALL: {"tokens_per_min": 60, "requests_per_s": 2},
    NARROW: {"concurrent_tokens": 24},
}
"""The names of the keys in force; :data:`STRANGER` has a key that nobody has made."""
LEAST_WAIT_S = 0.001
NUM_SMALL, NUM_NARROW, NUM_REFUSED = 14, 8, 2
MAX_PROMPT = 40
"""The longest prompt here: the gateway refuses what is longer than the context."""
_PATH = "/expertmesh.v1.Inference/"
_SEED = 1


class Gateway:
    """A gateway's part of its process; ``service`` and ``door`` are set where it asks for keys."""

    def __init__(self, world: World, model: ServedModel) -> None:
        serve = world.serve
        self.charges: Charges | None = None
        metrics = Metrics() if world.setting.keys else None
        self.charges = charges = None if metrics is None else Charges(metrics)

        def samples() -> Samples | None:
            if metrics is None or charges is None:
                return None
            return replace(metrics.samples(), uses=charges.uses())

        self.deployment = Deployment(
            serve.handle("controller"), [MODEL], "strict", lambda: serve.app_is_wanted("world"),
            lambda: False, samples, (lambda uses: None) if charges is None else charges.hear,
        )  # type: ignore[arg-type]  # fmt: skip
        node = ray.get_runtime_context().get_node_id()
        calls = RouterCalls(
            serve.handle("router"), model.key, node, "generate", None, lambda transport: None,
            keys_of_call,
        )  # fmt: skip
        self.upstream = RayUpstream(self.deployment, {MODEL: calls}, MAX_HELD)
        self.predictions = predictions_of(world, model.identity, self.deployment)
        if metrics is not None and charges is not None:
            limits = GatewayConfig()
            self.room = Room(limits, [MODEL])
            self.service = GenerationService(
                {MODEL: GatewayModel(model, Letters())}, limits, self.upstream, metrics, self.room,
                charges,
            )  # fmt: skip
            nobody: Any = None  # neither operators nor predictions are asked here
            methods = GrpcMethods(self.service, nobody, nobody).for_clients()
            access = Access(world.keys.ring, metrics.refused_caller)
            self.door = Door(access, methods, limits.max_body_bytes)

    def kept(self) -> dict[str, int]:
        """Return what is kept for callers under way."""
        found = {} if self.predictions is None else {"answers": len(self.predictions._answers)}
        if self.charges is None:
            return found
        return found | {
            "held tokens": sum(one.held_tokens for one in self.charges._accounts.values()),
            "places": self.room.places.taken,
            "bytes of bodies": self.room.bodies.taken,
        }


class Letters(Tokenizer):
    """A tokenizer in which each token is a letter."""

    def __init__(self) -> None:
        self.skipped_ids = frozenset()
        self.max_token_bytes = 3

    def decode_kept(self, ids: Sequence[int]) -> str:
        return "".join(chr(0x100 + token_id) for token_id in ids)


class AbortedError(Exception):
    """A call ended with a status; ``error`` is what its client makes of it."""

    def __init__(self, error: ExpertMeshError) -> None:
        super().__init__(str(error))
        self.error = error


class GrpcContext:
    """Stands for grpcio's context of a call, and hands its replies to a client."""

    def __init__(self, message: bytes, client: KeyedClient, answer: Answer) -> None:
        self._message, self._client, self._answer = message, client, answer
        self.was_read = False
        """Whether the call was taken at its head."""

    async def read(self) -> Any:
        self.was_read = True
        return self._message

    async def write(self, reply: Any) -> None:
        self._client.take_reply(reply, self._answer)
        if self._answer.is_cancelled:
            raise asyncio.CancelledError  # as grpcio cancels the call's task

    async def abort(self, code: Any, words: str, metadata: Any) -> None:
        raise AbortedError(error_from_grpc(code, words, dict(metadata)[DETAILS_KEY]))

    def set_trailing_metadata(self, metadata: Any) -> None:
        """The replies say the same."""


@dataclass(eq=False)
class Call:
    """One call of a client, as its history tells it; the times are those of the world.

    ``most`` are the tokens that it may have, ``received`` those that came, without the prompt.
    """

    name: str
    gateway: str
    at_s: float
    prompt: int
    most: int
    is_streamed: bool
    received: int = 0
    ended_at_s: float = float("inf")
    was_read: bool = False
    is_cancelled: bool = False
    error: ExpertMeshError | None = None
    before: Call | None = None
    """The call whose refusal said when to come back: now."""

    def is_refused(self, limit: str = "this key's") -> bool:
        """Return whether a quota has refused it, or this one."""
        return self.error is not None and _OF_KEY in str(self.error) and limit in str(self.error)


_OF_KEY = "this key's"


class KeyedClient(Client):
    """Shows the key of each plan's tenant, and comes back when a quota says so."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._latest: dict[int, Call] = {}

    async def _attempt(self, replica: Replica, answer: Answer, left_s: float) -> bool:
        kernel = self._world.kernel
        until_s = kernel.now_s + left_s
        self._latest.pop(id(answer), None)
        while True:
            is_over = await super()._attempt(replica, answer, until_s - kernel.now_s)
            call = self._latest.get(id(answer))
            if not is_over or call is None or not call.is_refused():
                return is_over
            assert call.error is not None
            wait_s = call.error.retry_after_s
            if wait_s is None or kernel.now_s + wait_s >= until_s:
                return True
            answer.error = answer.message = ""
            await asyncio.sleep(max(wait_s, LEAST_WAIT_S))

    async def _within(self, replica: Replica, answer: Answer, left_s: float) -> None:
        plan, kernel = answer.plan, self._world.kernel
        name = plan.tenant or ANYBODY
        call = Call(
            name, replica.process.name, kernel.now_s, len(plan.prompt), plan.n * plan.max_tokens,
            plan.is_streamed, before=self._latest.get(id(answer)),
        )  # fmt: skip
        self._latest[id(answer)] = call
        self._world.keys.calls.append(call)
        context = GrpcContext(_message(answer, left_s), self, answer)
        details: Any = SimpleNamespace(
            method=_PATH + ("GenerateStream" if plan.is_streamed else "Generate"),
            invocation_metadata=((FIELD, f"Bearer {key_of(name)}"),),
        )
        had = _num_tokens(answer)
        try:
            handler = await replica.handle.instance.door.intercept_service(None, details)
            if handler.stream_stream is not None:
                await handler.stream_stream(None, context)
            else:
                self.take_reply(await handler.stream_unary(None, context), answer)
            if not all(choice.finish_reason for choice in answer.choices):
                answer.error = "the stream ended early"
        except AbortedError as aborted:
            call.error = aborted.error
            answer.error, answer.message = type(aborted.error).__name__, str(aborted.error)
        except asyncio.CancelledError:
            if not answer.is_cancelled:
                raise
        except Exception as error:
            answer.error, answer.message = f"untyped {type(error).__name__}", str(error)
        call.received, call.ended_at_s = _num_tokens(answer) - had, kernel.now_s
        call.was_read, call.is_cancelled = context.was_read, answer.is_cancelled

    def take_reply(self, reply: Any, answer: Answer) -> None:
        """Take a reply of a stream, or of a choice of an answer that comes whole."""
        for one in (reply, *reply.other_choices):
            start = len(answer.choices[one.index].token_ids)
            self._take(
                TokenEvent(
                    one.index, tuple(one.token_ids), finish_reason=one.finish_reason or None,
                    exact=one.exact, start=start, identity=one.identity,
                ),
                answer,
            )  # fmt: skip


def client_of(world: World) -> Client:
    """Return a new client of a world's gateways."""
    if world.setting.keys:
        return KeyedClient(world)
    return PredictingClient(world) if world.setting.mixture else Client(world)


def key_of(name: str) -> str:
    return f"em-{name}"


def keyring() -> Keyring:
    """Return the keys in force, read from a file as a gateway does."""
    entries = [
        {
            "sha256": sha256(key_of(name).encode()).hexdigest(),
            "name": name,
            "roles": ["metrics" if name == MONITOR else "inference"],
            "limits": limits,
        }
        for name, limits in LIMITS.items()
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"keys": entries}, file)
        file.flush()
        return Keyring(Path(file.name))


def _message(answer: Answer, left_s: float) -> bytes:
    plan = answer.plan
    request = inference_pb2.GenerateRequest(
        model=MODEL, timeout_s=max(left_s, 0.001), on_expert_loss=plan.on_expert_loss,
        priority=plan.priority,
    )  # fmt: skip
    request.prompt_token_ids.ids.extend(plan.prompt)
    sampling = request.sampling
    sampling.max_tokens, sampling.temperature = plan.max_tokens, 0.0
    sampling.n, sampling.seed = plan.n, _SEED
    if _num_tokens(answer):
        for choice in answer.choices:
            request.resume.add(
                token_ids=choice.token_ids, finished=choice.finish_reason is not None,
                inexact=not choice.is_exact, identity=choice.identity,
            )  # fmt: skip
    return bytes(request.SerializeToString())


def _num_tokens(answer: Answer) -> int:
    return sum(len(choice.token_ids) for choice in answer.choices)


def with_keys(scenario: Scenario, begin_s: float) -> Scenario:
    """Return a scenario whose gateways ask for keys, or the same; few have them.

    It is drawn apart, so that the rest of a seed stays as it is.
    """
    source = random.Random(f"keys-{scenario.seed}")
    if source.random() >= SHARE:
        return scenario
    until_s = scenario.setting.calm_s - 2.0
    names = [SMALL] * NUM_SMALL + [NARROW] * NUM_NARROW + [STRANGER, MONITOR] * NUM_REFUSED
    found = [_plan(source, source.uniform(begin_s, until_s), name) for name in names]
    others = [
        replace(plan, prompt=plan.prompt[:MAX_PROMPT], tenant=ANYBODY) for plan in scenario.plans
    ]
    return replace(
        scenario,
        setting=replace(scenario.setting, keys=True),
        plans=tuple(sorted((*others, *found), key=lambda plan: plan.at_s)),
    )


def _plan(source: random.Random, at_s: float, name: str) -> Plan:
    prompt = tuple(source.randrange(VOCAB) for _ in range(source.randrange(1, 6)))
    return Plan(
        at_s, 0, prompt, source.randrange(2, 12), source.choice((5.0, 10.0, 20.0)),
        is_streamed=source.random() < 0.8, tenant=name,
        cancel_after=source.randrange(1, 4) if source.random() < 0.15 else None,
    )  # fmt: skip
