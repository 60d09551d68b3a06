"""A tiny exact mixture, which some worlds serve beside the language model, and its law.

Its experts are those of :mod:`tests.world.model`; its gate is the product's own, as are its engine,
its routers and the gateways' calls. :func:`prediction_of` computes the same in plain numpy.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import yaml
from safetensors.numpy import save

import experts.actor
import experts.backends.load
import router.mixture.replica
from cluster.errors import DeadlineExceededError, ExpertMeshError
from cluster.spec import ModelExperts, ModelSource, model_key
from experts.checkpoint.mixture import Mixture, mixture_of
from experts.mixture.spec import interface_of
from router.config.deployment import ExpertsConfig, RouterConfig
from router.control.client import ControllerClient
from router.gateway.limits.room import GRACE_S
from router.gateway.predict.upstream import Predictions
from router.gateway.upstream.affinity import no_keys
from router.gateway.upstream.deployment import Deployment
from router.gateway.upstream.router_links import RouterCalls
from router.messages.prediction import PredictionReply, PredictionRequest
from router.mixture.replica import MixtureReplica
from router.served import ServedMixture
from tests.world.clients import MIXTURE, Answer, Client, Plan
from tests.world.law_of_queues import MAX_HELD, MIXTURE_LANES
from tests.world.model import DTYPE, NUM_EXPERTS, TOP_K, VOCAB, ExactCheckpoint, key_of, output_of
from tests.world.serve_api import Version

if TYPE_CHECKING:
    from tests.world.serve_api import Replica
    from tests.world.weather import Event, Scenario, Setting
    from tests.world.world import World

SHARE = 0.08
"""The share of the seeds without a rarity or keys that serve a mixture too."""
NUM_REQUESTS, MAX_ROWS = 30, 6
FAULTS = ("dies", "crashes soon", "hangs")
"""What happens to a mixture's router; the other events hit the parts that it shares."""
_PREFIX = "mixture-"
_EXPERTS = [f"e{number}" for number in range(NUM_EXPERTS)]
_SPEC = {
    "format": 1, "dtype": DTYPE, "gate": "root",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}],
    "gates": {
        "root": {"kind": "linear", "file": "root", "choices": _EXPERTS, "top_k": TOP_K}
    },
    "experts": {name: {"kind": "linear", "file": name} for name in _EXPERTS},
    "combine": {"kind": "mean", "shape": [2]},
    "outputs": [{"name": "y", "datatype": "FP32", "from": "value"}],
}  # fmt: skip


class ExactMixture(Mixture):
    """A mixture of exact experts; it is its identity."""

    identity: str

    def __init__(self, identity: str) -> None:
        made = mixture_of(Path("/mixtures"), _text(), lambda names: dict.fromkeys(names, 1))
        for one in fields(made):
            object.__setattr__(self, one.name, getattr(made, one.name))
        object.__setattr__(self, "identity", identity)

    def file(self, name: str) -> bytes:
        return bytes(save({"weight": _gate_of(self.identity)}))


@cache
def _text() -> bytes:
    return yaml.safe_dump(_SPEC, sort_keys=False).encode()


@cache
def _gate_of(identity: str) -> np.ndarray:
    """Return the gate's weights; the values of a row are up to 2 ** 16."""
    source = np.random.default_rng(key_of(identity, "root"))
    return (source.normal(size=(NUM_EXPERTS, 2)) / (1 << 15)).astype(np.float32)


def _served(identity: str) -> ServedMixture:
    spec = ExactMixture(identity).spec
    found = ModelExperts(model_key(MIXTURE, identity, DTYPE), (0,), NUM_EXPERTS, 1000)
    source = ModelSource(f"/mixtures/{identity}", DTYPE, found, identity)
    return ServedMixture(source, spec, interface_of(spec), identity)


def identity_of(identity: str) -> str:
    """Return the identity of the mixture that is deployed beside a model's."""
    return _PREFIX + identity


def rows_of(plan: Plan) -> np.ndarray:
    """Return the rows [P, 2] of a request, one for each token of its prompt."""
    states = [key_of("row", token) for token in plan.prompt[:MAX_ROWS]]
    return np.array([(s & 0xFFFF, s >> 16 & 0xFFFF) for s in states], np.float32)


def prediction_of(identity: str, rows: np.ndarray) -> np.ndarray:
    """Return the means [P, 2] of the experts that a mixture's gate chooses."""
    found = []
    for row in rows.astype(np.float64):
        scores = _gate_of(identity).astype(np.float64) @ row
        chosen = np.argsort(-scores)[:TOP_K]
        shares = np.exp(scores[chosen] - scores.max())
        outputs = [output_of(identity, 0, int(e), int(row[0]), int(row[1])) for e in chosen]
        found.append(shares @ np.array(outputs, np.float64) / shares.sum())
    return np.array(found)


# What takes the place of files, and what a deployment has more.


def mixture_table(world: World) -> list[tuple[Any, str, Any]]:
    """Return what replaces a mixture's files, as :mod:`tests.world.patches` does."""

    def opened(path: str, identity: str, neighbours: object) -> Any:
        is_mixture = path.startswith("/mixtures/")
        return ExactMixture(identity) if is_mixture else ExactCheckpoint(identity)

    def load_expert(mixture: Any, expert: int, threads: int) -> Any:
        return world.make_expert(world.load_expert(mixture, 0, expert, DTYPE), "", threads)

    return [
        (experts.actor, "open_model", opened),
        (experts.backends.load, "load_mixture_expert", load_expert),
        (router.mixture.replica, "open_model", opened),
        (router.mixture.replica, "app_is_wanted", world.serve.app_is_wanted),
        (router.mixture.replica, "LANES", MIXTURE_LANES),
    ]


def sources_of(identity: str, setting: Setting) -> tuple[ModelSource, ...]:
    """Return the mixture that actors have experts of beside those of a model, if any."""
    return (_served(identity_of(identity)).source,) if setting.mixture else ()


def deploy_mixture(world: World, config: RouterConfig, settings: ExpertsConfig) -> None:
    """Deploy a mixture's routers beside those of the model, if the world serves one."""
    if not world.setting.mixture:
        return
    served = _served(identity_of(world.identity))

    def make() -> MixtureReplica:
        client = ControllerClient(world.serve.handle("controller"))
        return MixtureReplica("world", served, config, settings, client)

    async def close(made: MixtureReplica) -> None:
        await made.finish()
        await world.kernel.run_in_executor(None, made.close)

    number = world.setting.num_routers
    world.serve.deploy("mixture", Version(make, number, lambda made: made.is_its_turn(), close))


def predictions_of(world: World, identity: str, deployment: Deployment) -> Predictions | None:
    """Return a gateway's calls to a mixture's routers, if the world serves one."""
    if not world.setting.mixture:
        return None
    served = _served(identity_of(identity))
    calls = RouterCalls(
        world.serve.handle("mixture"), served.key, ray.get_runtime_context().get_node_id(),
        "predict", None, lambda transport: None, no_keys,
    )  # fmt: skip
    return Predictions(deployment, {MIXTURE: calls}, MAX_HELD)


# Clients.


class PredictingClient(Client):
    """Asks for predictions too; a gateway's end is followed by the same request at another."""

    async def _within(self, replica: Replica, answer: Answer, left_s: float) -> None:
        if answer.plan.model != MIXTURE:
            await super()._within(replica, answer, left_s)
            return
        kernel = self._world.kernel
        spec = ExactMixture("").spec
        request = PredictionRequest(
            f"p{kernel.random.getrandbits(64):016x}", MIXTURE, {"x": rows_of(answer.plan)}, ("y",),
            time.monotonic() + left_s, answer.plan.on_expert_loss,
            interface_of(spec),
        )  # fmt: skip
        try:
            async with asyncio.timeout(left_s + GRACE_S):  # as the gateway's service does
                reply = await replica.handle.instance.predictions.predict(request)
        except TimeoutError:
            answer.error = DeadlineExceededError.__name__
        except ExpertMeshError as error:
            answer.error, answer.message = type(error).__name__, str(error)
        except Exception as error:
            answer.error, answer.message = f"untyped {type(error).__name__}", str(error)
        else:
            look_at_reply(self._world, answer.plan, reply)
            choice = answer.choices[0]
            choice.finish_reason, choice.is_exact = "predicted", reply.exact
            choice.identity = reply.identity.removeprefix(_PREFIX)


def look_at_reply(world: World, plan: Plan, reply: PredictionReply) -> None:
    """A prediction is that of a mixture that was deployed, or says that it is not exact."""
    if reply.identity not in map(identity_of, world.identities):
        world.law.broken("an answer names its model", f"{reply.identity!r} at {plan.at_s:.3f}")
    elif not reply.exact:
        if plan.on_expert_loss == "strict":
            world.law.broken("strict is exact", f"the prediction at {plan.at_s:.3f}")
    else:
        got, right = reply.outputs["y"], prediction_of(reply.identity, rows_of(plan))
        if got.shape != right.shape or not np.allclose(got, right, rtol=1e-3, atol=0.5):
            text = f"the request at {plan.at_s:.3f}: {got.tolist()}, not {right.tolist()}"
            world.law.broken("predictions are one mixture's", text)


def kept_by_mixtures(world: World) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield what a mixture's routers keep for requests."""
    if world.setting.mixture:
        for replica in world.serve.deployments["mixture"].running():
            made = replica.handle.instance
            jobs = len(made._queue.jobs)
            yield replica.process.name, {"requests": len(made._requests), "jobs": jobs}


# The draw.


def with_mixture(scenario: Scenario, make: type[Event], begin_s: float) -> Scenario:
    """Return a scenario that serves a mixture too, or the same; few do.

    It is drawn apart, so that the rest of a seed stays as it is.
    """
    source = random.Random(f"mixture-{scenario.seed}")
    if scenario.setting.keys or source.random() >= SHARE:
        return scenario
    until_s = scenario.setting.calm_s - 2.0
    found = [_plan(source, source.uniform(begin_s, until_s)) for _ in range(NUM_REQUESTS)]
    at_s, kind = source.uniform(begin_s, until_s - 2.0), source.choice(FAULTS)
    fault = make(at_s, kind, source.randrange(100), 1.0, source.randrange(1, 400), (), "mixture")
    return replace(
        scenario,
        setting=replace(scenario.setting, mixture=True),
        plans=tuple(sorted((*scenario.plans, *found), key=lambda plan: plan.at_s)),
        events=tuple(sorted((*scenario.events, fault), key=lambda event: event.at_s)),
    )


def _plan(source: random.Random, at_s: float) -> Plan:
    prompt = tuple(source.randrange(VOCAB) for _ in range(source.randrange(1, MAX_ROWS)))
    return Plan(
        at_s, 0, prompt, 1, source.choice((2.0, 5.0, 10.0)), model=MIXTURE,
        on_expert_loss=source.choice(("strict", "strict", "next_expert", "drop")),
    )  # fmt: skip
