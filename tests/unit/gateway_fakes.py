"""A gateway without a cluster: a small real tokenizer, an upstream that plays a script, and a
controller's handle."""

from __future__ import annotations

import asyncio
import functools
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Protocol

import grpc
from fastapi import FastAPI
from ray.exceptions import RayActorError
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.shipped import free_ports
from cluster.errors import DeadlineExceededError, ExpertMeshError
from cluster.reports import (
    ActorStatus,
    ChangeReport,
    ClusterStatus,
    DeviceStatus,
    ExpertLoad,
    FailingActor,
    KernelCount,
    KernelStatus,
    LoadingStatus,
    LoadStatus,
    Measurements,
    Move,
    ProcessSamples,
    ProcessStatus,
    RebalanceReport,
)
from cluster.spec import ActorReport, ExpertKey, ModelExperts, ModelKernel, ModelSource
from router.config.deployment import GatewayConfig
from router.control.readiness import Readiness
from router.gateway.admin import Admin
from router.gateway.grpc.methods import GrpcMethods
from router.gateway.http.app import create_app
from router.gateway.http_io import FROM_ANYWHERE, BrowserRules
from router.gateway.input.tokenizer import GatewayModel, Tokenizer
from router.gateway.limits.charges import Charges
from router.gateway.limits.room import Room
from router.gateway.listen.grpc import Door
from router.gateway.metrics import Metrics
from router.gateway.predict.service import PredictionService
from router.gateway.predict.v2_grpc import PredictionHandlers
from router.gateway.service import GenerationService
from router.messages.request import GenerationRequest, TokenEvent, TokenLogprobs
from router.security.access import Access
from router.served import ServedModel
from tests.unit.prediction_fakes import MIXTURES, FakePredictions, prediction_service

EOS = 1
CONTEXT = 64
TEXT = ["in the beginning was the word", "häuser ünter — 中文字 🙂🙂 end", "stop here, stop there"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@functools.cache
def tokenizer(chat_template: str | None = TEMPLATE) -> Tokenizer:
    """A byte-level BPE that AutoTokenizer has loaded from a folder; it knows every byte."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    raw.train_from_iterator(TEXT * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        return Tokenizer.load(folder, (EOS,))


def vocab_size() -> int:
    """Ids of the tokenizer, and a few more that it does not know, as padded checkpoints have."""
    return 330


def served(model_id: str = "tiny", chat_template: str | None = TEMPLATE) -> GatewayModel:
    """A model of which only the tokenizer is real."""
    source = ModelSource("unused", "float32", ModelExperts(model_id, (0, 1), 8, 0), "unused")
    info = ServedModel(source, "mixtral", vocab_size(), CONTEXT, 2, (EOS,))
    return GatewayModel(info, tokenizer(chat_template))


IDENTITY = "6d0de1"
"""Of the model whose tokens the fakes send."""
STATUS = ClusterStatus(
    models=("tiny",),
    epoch=3,
    placement_version=7,
    controller_pid=41,
    missing_experts=0,
    routers=(ProcessStatus(42, "n1", (ModelKernel("tiny", "torch-avx2"),)),),
    gateways=(ProcessStatus(43, "n1", (), "keys.yaml: is no file"),),
    actors=(
        ActorStatus(
            actor_id="a0",
            pid=44,
            node="n1",
            device="cpu",
            generation=2,
            experts=(("tiny", 0, 1), ("tiny", 1, 5)),
            tokens=99,
            weight_bytes=640,
            kernels=(ModelKernel("tiny", "paired"),),
            silence="has answered no heartbeat for 4 s: routers hear it",
        ),
    ),
    min_copies=2,
    live_copies=1,
    loading=(LoadingStatus("a1", 3, 12, 1_500_000_000),),
    kernels=(
        KernelStatus(
            "tiny",
            (KernelCount("fused", 2), KernelCount("paired", 1)),
            (KernelCount("torch-avx2", 1),),
            "fused on 2 actors, paired on 1",
        ),
    ),
    failing=(FailingActor("a2", 3, "n1 lacks 5 bytes", "n1", "cuda:0", 12.5, 0, 9, 5),),
    nodes_without_gateway=("n4",),
)
REBALANCED = RebalanceReport(
    outcome="committed",
    moves=(Move("a1", "tiny", 0, 1, True), Move("a0", "tiny", 0, 1, False)),
    moved_bytes=2_500_000,
    layers_before=1.5,
    layers_after=1.0,
    devices_before=1.25,
    devices_after=0.0,
    at_s=1000.0,
    took_s=0.5,
    epoch=3,
    version=8,
)
CHANGED = ChangeReport(
    what="expert: 1 -> 2 actors",
    reason="asked for",
    outcome="committed",
    added=("a1",),
    removed=(),
    moves=REBALANCED.moves,
    moved_bytes=2_500_000,
    at_s=1000.0,
    took_s=0.5,
    epoch=3,
    version=9,
)
LOAD = LoadStatus(
    window_s=30.0,
    layers_balance=1.5,
    devices_balance=1.25,
    devices=(
        DeviceStatus("a0", "n1", 2, 120.0, 0.25, 0.002),
        DeviceStatus("a1", "n1", 3, 0.0, 0.0, 0.0),
    ),
    experts=(
        ExpertLoad("tiny", 0, 0, 20.0, ("a0", "a1")),
        ExpertLoad("tiny", 0, 1, 90.0, ("a0",)),
        ExpertLoad("tiny", 0, 2, 0.0, ("a1",)),
        ExpertLoad("tiny", 0, 3, 0.0, ("a1",)),
        ExpertLoad("tiny", 1, 0, 10.0, ()),
    ),
    rebalances=(REBALANCED,),
    changes=(CHANGED,),
)
REPORT = ActorReport(
    actor_id="a0",
    generation=2,
    digest="d",
    epoch=3,
    pid=44,
    node="n1",
    device="cpu",
    experts=(ExpertKey("tiny", 0, 1), ExpertKey("tiny", 1, 5)),
    weight_bytes=640,
    tokens={ExpertKey("tiny", 0, 1): 90, ExpertKey("tiny", 1, 5): 9},
    queued_rows=4,
    steps=6,
    frames=8,
    busy_s=1.5,
    waited_s=0.25,
)
Script = Callable[[GenerationRequest], Iterable[TokenEvent | Exception]]


class FakeController:
    """The controller behind its handle: keeps the calls, and answers each with plain data.

    With a ``refusal`` it refuses every change; a controller that ``is_away`` answers nothing.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.refusal: ExpertMeshError | None = None
        self.is_away = False
        self.rebalanced = REBALANCED
        self.changed = CHANGED

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=functools.partial(self._answer, name))

    async def _answer(self, name: str, *args: object) -> object:
        self.calls.append((name, *args))
        if self.is_away:
            raise RayActorError
        if name == "status":
            return STATUS
        if name == "load":
            return LOAD
        if name == "measurements":
            return Measurements(STATUS, (REPORT,), args)
        if self.refusal is not None:
            return {"error": self.refusal.to_wire()}
        report = self.rebalanced if name == "rebalance" else self.changed
        return {"report": report}


class FakeUpstream:
    """Plays a script of events per request; an exception in it is raised.

    With ``endless`` the stream stays open after the script, until the deadline. Keeps the requests.
    ``controller`` is the same deployment's.
    """

    def __init__(self, script: Script, endless: bool = False) -> None:
        self.script = script
        self.endless = endless
        self.requests: list[GenerationRequest] = []
        self.stopped: list[tuple[str, int]] = []
        self.closed = threading.Event()
        self.readiness = Readiness("", (3, 7), 0.25)
        self.controller = FakeController()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        try:
            for event in self.script(request):
                if isinstance(event, Exception):
                    raise event
                yield event
            if self.endless:
                await asyncio.sleep(request.remaining_s())
                raise DeadlineExceededError("nothing came")
        finally:
            self.closed.set()

    def stop(self, request_id: str, index: int) -> None:
        self.stopped.append((request_id, index))

    def ready(self) -> Readiness:
        return self.readiness


def says(text: str, finish_reason: str | None = "length", exact: bool = True) -> Script:
    """A script in which every choice says ``text``, one token per event."""

    def script(request: GenerationRequest) -> Iterable[TokenEvent]:
        ids = tokenizer().encode(text)
        for place, token_id in enumerate(ids):
            last = place == len(ids) - 1
            for index in range(request.sampling.n):
                rows = _logprobs(token_id, request.sampling.logprobs)
                reason = finish_reason if last else None
                yield TokenEvent(index, (token_id,), rows, reason, exact)

    return script


def goes_on(*texts: str, upto: int | None = None) -> Script:
    """A script that says a text per choice, each from where the request has it.

    With ``upto`` it breaks off before any choice's token of that number.
    """

    def script(request: GenerationRequest) -> Iterable[TokenEvent]:
        for index, text in enumerate(texts):
            received = request.received_of(index)
            ids = tokenizer().encode(text)
            assert received.finished or received.token_ids == tuple(ids[: len(received.token_ids)])
            for place in range(len(received.token_ids), len(ids)):
                if received.finished or place == upto:
                    break
                reason = "length" if place == len(ids) - 1 else None
                rows = _logprobs(ids[place], request.sampling.logprobs)
                identity = "" if place else IDENTITY
                yield TokenEvent(index, (ids[place],), rows, reason, True, place, identity)

    return script


def _logprobs(token_id: int, top: int | None) -> tuple[TokenLogprobs, ...]:
    if top is None:
        return ()
    ids = tuple((token_id + step) % vocab_size() for step in range(top))
    return (TokenLogprobs(-0.25, ids, tuple(-0.25 - step for step in range(top))),)


def services(
    upstream: FakeUpstream,
    limits: GatewayConfig | None = None,
    predictions: FakePredictions | None = None,
    clock: Callable[[], float] | None = None,
    models: Mapping[str, GatewayModel] | None = None,
) -> tuple[GenerationService, PredictionService]:
    """The services over ``tiny``, ``bare`` without a chat template, and mixtures; or over others.

    ``clock`` is that of the quotas.
    """
    limits = limits or GatewayConfig()
    both = models or {"tiny": served(), "bare": served("bare", None)}
    metrics, room = Metrics(), Room(limits, [*both, *MIXTURES])
    charges = Charges(metrics, clock)
    generation = GenerationService(both, limits, upstream, metrics, room, charges, tuple(MIXTURES))
    fake = predictions or FakePredictions()
    return generation, prediction_service(fake, limits, metrics, room, tuple(both), charges)


def service(upstream: FakeUpstream, limits: GatewayConfig | None = None) -> GenerationService:
    """The service of the language models alone."""
    return services(upstream, limits)[0]


def admin(upstream: FakeUpstream, metrics: Metrics) -> Admin:
    """The calls of the upstream's controller, from a gateway with these metrics."""
    process = ProcessStatus(43, "n1")
    return Admin(upstream.controller, lambda: ProcessSamples("gateway", process, metrics.samples()))


def http_app(
    upstream: FakeUpstream,
    limits: GatewayConfig | None = None,
    predictions: FakePredictions | None = None,
    browsers: BrowserRules = FROM_ANYWHERE,
    access: Access | None = None,
    clock: Callable[[], float] | None = None,
    models: Mapping[str, GatewayModel] | None = None,
) -> FastAPI:
    """The HTTP app over :func:`services`, by default for everybody."""
    generation, predicting = services(upstream, limits, predictions, clock, models)
    operators = admin(upstream, generation.metrics)
    return create_app(generation, predicting, operators, access or everybody(), browsers=browsers)


def everybody() -> Access:
    """The access of a deployment without keys."""
    return Access(None, Metrics().refused_caller)


class Servicer:
    """The gRPC methods of a gateway, without Serve."""

    def __init__(
        self,
        upstream: FakeUpstream,
        limits: GatewayConfig | None = None,
        predictions: FakePredictions | None = None,
        access: Access | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.access = access or everybody()
        generation, predicting = services(upstream, limits, predictions, clock)
        operators = admin(upstream, generation.metrics)
        self.methods = GrpcMethods(generation, operators, PredictionHandlers(predicting))


class HasMethods(Protocol):
    """The gRPC methods of a gateway, and who may call them."""

    access: Access
    methods: GrpcMethods


@contextmanager
def grpc_server(
    upstream: FakeUpstream,
    port: int = 0,
    limits: GatewayConfig | None = None,
    predictions: FakePredictions | None = None,
) -> Iterator[str]:
    """Run a real gRPC server over a scripted upstream; see :func:`serve_grpc`."""
    with serve_grpc(Servicer(upstream, limits, predictions), port) as address:
        yield address


@contextmanager
def serve_grpc(servicer: HasMethods, port: int = 0) -> Iterator[str]:
    """Run a real gRPC server of all services on a loopback port, in a thread; gives its address.

    It listens on the next port too, where clients look for operators' methods. Its end breaks the
    calls under way.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[grpc.aio.Server, int]:
        methods = servicer.methods.for_clients() | servicer.methods.for_operators()
        server = grpc.aio.server(interceptors=[Door(servicer.access, methods, 16 << 20)])
        bound = port or free_ports(1)[0]
        for number in (bound, bound + 1):
            server.add_insecure_port(f"127.0.0.1:{number}")
        await server.start()
        return server, bound

    async def stop() -> None:
        await server.stop(0)
        # A call that is left in the loop is told on stderr when a later test collects it.
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    server, bound = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()
