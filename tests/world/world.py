"""One world: a deployment on a few nodes, its clients, and all that happens to them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from cluster.controller.controller import Controller
from cluster.controller.ledger import LedgerStore, RayStore
from cluster.controller.pool import ExpertPool
from cluster.spec import ActorSpec, ModelExperts, ModelSource, PoolSpec, model_key
from experts.remote import RemoteExpertActor
from router.config import RouterConfig
from router.control.client import ControllerClient
from router.engine.replica import RouterReplica
from router.expert_config import ExpertsConfig
from router.gateway.deployment import Deployment
from router.gateway.ray_upstream import RayUpstream
from router.served import ServedModel
from tests.world.kernel import current_process, running
from tests.world.model import (
    DTYPE,
    KERNEL_CLASS,
    LAYERS,
    NUM_EXPERTS,
    TOP_K,
    VOCAB,
    ExactExpert,
    ExactModel,
    ExactWeights,
)
from tests.world.network import Network
from tests.world.patches import replaced
from tests.world.ray_api import HEAD, RayCluster
from tests.world.serve_api import Serve, Version
from tests.world.streams import StreamLoop

APP = "world"
MODEL = "exact"
SLOTS = 6
"""The actors that fit on a node."""
ATTENTION_S = 0.004
PRODUCT_S = 0.006
ROW_S = 0.0005


@dataclass(frozen=True)
class Setting:
    """A deployment of a world."""

    num_nodes: int = 3
    num_actors: int = 6
    num_routers: int = 2
    num_gateways: int = 2
    num_clients: int = 8
    min_copies: int = 2
    rebalance_period_s: float | None = None
    transport: str = "auto"
    redeploy_drain_s: float = 6.0
    on_expert_loss: str = "strict"


class Gateway:
    """A gateway's part of its process: upstream of its HTTP and gRPC."""

    def __init__(self, world: World, setting: Setting) -> None:
        serve = world.serve
        self.deployment = Deployment(
            serve.handle("controller"),
            [MODEL],
            setting.on_expert_loss,
            lambda: serve.app_is_wanted(APP),
            lambda: None,
        )
        self.upstream = RayUpstream(self.deployment, {MODEL: serve.handle("router")}, 64)


@dataclass
class Device:
    """How the experts of an actor compute: ``slow`` times as long, raising, or NaN."""

    slow: float = 1.0
    fault: str = ""


class World:
    """A deployment and its faults; :meth:`run` lets time pass."""

    def __init__(self, seed: int, setting: Setting | None = None) -> None:
        self.seed = seed
        self.setting = setting or Setting()
        self.kernel = StreamLoop(seed)
        hosts = [HEAD, *(f"node-{i}" for i in range(self.setting.num_nodes))]
        self.network = self.kernel.network = Network(self.kernel, [*hosts, "clients"])
        self.cluster = RayCluster(self.kernel, self.network, {h: SLOTS for h in hosts[1:]})
        self.serve = Serve(self.cluster)
        self.random = random.Random(f"world-{seed}")
        self.devices: dict[str, Device] = {}
        """By the name of a node or of an actor's process."""
        self.identity = ""
        self._stack = ExitStack()
        self._stack.enter_context(running(self.kernel))
        self._stack.enter_context(
            replaced(self.kernel, self.cluster, self.serve, self._load_dense, self._expert)
        )

    # What processes load.

    def _load_dense(
        self, model: ServedModel, config: RouterConfig, layers: Any, device: Any
    ) -> tuple[Any, str]:
        cache_tokens = config.cache_tokens_for(model.max_model_len)
        dense = ExactModel(model.identity, cache_tokens, layers, lambda: ATTENTION_S)
        return dense, KERNEL_CLASS

    def _expert(self, weights: ExactWeights, activation: str, threads: int) -> ExactExpert:
        process = current_process()
        assert process is not None

        def compute(num_rows: int) -> Exception | float:
            slow = 1.0
            for name in (process.node, process.name):
                device = self.devices.get(name)
                if device is not None:
                    if device.fault == "raises":
                        return RuntimeError("the device fails")
                    if device.fault == "nan":
                        return -1.0
                    slow *= device.slow
            return slow * (PRODUCT_S + ROW_S * num_rows)

        return ExactExpert(weights, compute)

    # Deployments.

    def deploy(self, identity: str, setting: Setting | None = None) -> None:
        """Deploy weights of this identity, with the world's setting or another."""
        self.identity = identity
        self.setting = setting = setting or self.setting
        model = self._served(identity)
        experts = ExpertsConfig(
            actors=setting.num_actors,
            min_copies=setting.min_copies,
            transport=setting.transport,
            call_timeout_s=2.0,
            rebalance_period_s=setting.rebalance_period_s,
            redeploy_drain_s=setting.redeploy_drain_s,
        )
        routers = RouterConfig(cache_tokens=256, max_batch_size=8, max_batch_tokens=16)
        actor = ActorSpec(APP, (model.source,), 1.0, 0.0, 1, experts.max_queue_rows)
        pools = (PoolSpec("expert", setting.num_actors, None, actor),)

        async def controller() -> Controller:
            made = Controller(
                APP,
                pools,
                ExpertPool(APP, RemoteExpertActor),
                LedgerStore(APP, RayStore()),
                setting.min_copies,
                setting.rebalance_period_s,
                setting.redeploy_drain_s,
            )
            await made.start()
            made.deletion = self.kernel.create_task(made.look_for_deletion())  # type: ignore[attr-defined]
            return made

        def router() -> RouterReplica:
            client = ControllerClient(self.serve.handle("controller"))
            return RouterReplica(APP, model, routers, experts, client)

        self.serve.deploy("controller", Version(controller, 1, close=lambda made: made.close()))
        self.serve.deploy(
            "router",
            Version(
                router,
                setting.num_routers,
                lambda made: made.is_its_turn(),
                lambda made: made.close(),
            ),
        )
        self.serve.deploy("gateway", Version(lambda: Gateway(self, setting), setting.num_gateways))

    def _served(self, identity: str) -> ServedModel:
        experts = ModelExperts(model_key(MODEL, identity, DTYPE), LAYERS, NUM_EXPERTS, 1000)
        return ServedModel(
            source=ModelSource(f"/models/{identity}", DTYPE, experts, identity),
            family="exact",
            vocab_size=VOCAB,
            max_model_len=64,
            num_experts_per_tok=TOP_K,
            eos_token_ids=(),
            identity=identity,
        )

    # Time.

    def run(self, until_s: float, is_done: Callable[[], bool] = lambda: False) -> None:
        """Let time pass."""
        self.kernel.run(until_s, is_done)

    def close(self) -> None:
        """End all that runs; what it says of its end is nobody's."""
        logging.disable(logging.CRITICAL)
        try:
            self.kernel.close()
        finally:
            logging.disable(logging.NOTSET)
            self._stack.close()
