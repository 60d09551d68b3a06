"""The ``args:`` of a deployment file, validated; every error names its YAML path.

A deployment file is a Ray Serve config whose ``import_path`` is ``router.app:build``; what stands
under ``args:`` is :class:`AppConfig`. Unknown keys are errors that list the allowed ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cluster.errors import ConfigError
from cluster.spec import Emulation, OnExpertLoss, ScalingTargets
from cluster.tls import TlsFiles
from cluster.transport.open import TransportKind

IMPORT_PATH = "router.app:build"
MAX_DEFAULT_CACHE_TOKENS = 65_536
DEFAULT_POOL = "expert"
BODIES_AT_ONCE = 16
ONE_POOLS_KEYS = (
    "actors",
    "num_cpus",
    "num_gpus",
    "threads",
    "memory_budget_bytes",
    "emulate",
    "autoscaling",
)
RAYS_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(_Section):
    """One model to serve.

    ``path`` is a folder (absolute, relative to the working directory, or inside the installed
    ``deploy`` package) or a Hugging Face hub id. ``dtype`` auto takes the checkpoint's own.
    ``max_model_len`` bounds prompt plus output, in tokens; by default the model's own context.
    """

    id: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    path: str = Field(min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = Field(default=None, ge=2)


class TlsConfig(_Section):
    """PEM files, at the same paths on every node; see :mod:`cluster.tls`.

    ``certificate`` and ``key`` are the node's own, signed by ``authority``.
    """

    certificate: str = Field(min_length=1)
    key: str = Field(min_length=1)
    authority: str = Field(min_length=1)

    def files(self) -> TlsFiles:
        """Return the paths as the streams take them."""
        return TlsFiles(self.certificate, self.key, self.authority)


class EmulateConfig(_Section):
    """A device that computes nothing, in an accelerator's time; for measuring, not for serving.

    One expert's product takes ``batch_s`` and for each of its rows ``row_s`` more, in which the
    actor sleeps. Its answers are zeros, and every reply is flagged as not exact.
    """

    batch_s: float = Field(default=0.0, ge=0, le=10)
    row_s: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _takes_time(self) -> EmulateConfig:
        if self.batch_s + self.row_s == 0:
            raise ValueError("needs batch_s or row_s above 0")
        return self

    def emulation(self) -> Emulation:
        """Return what an actor is told."""
        return Emulation(self.batch_s, self.row_s)


def _without_gpu(emulate: EmulateConfig | None, info: ValidationInfo) -> EmulateConfig | None:
    if emulate is not None and info.data.get("num_gpus"):
        raise ValueError("an emulated device computes nothing; leave out num_gpus")
    return emulate


class ActorScalingConfig(_Section):
    """How a pool's number of actors follows its load, from ``min_actors`` to ``max_actors``.

    One more comes when devices were busy for more than ``target_busy`` of the time, or frames
    waited longer than ``target_queue_s``, for ``upscale_delay_s``; those that were not needed
    go some three seconds before ``downscale_delay_s`` is over, so that they are gone by then where
    others hold their experts; where those must be loaded first it takes longer. Copies that are
    hardly asked for go within that delay too. ``standby_actors`` beyond them, as far as
    ``max_actors`` allows, are started and hold nothing, so that the next ones need no start: they
    keep their devices. With ``dry_run`` what would be is only logged and told.
    """

    min_actors: int = Field(ge=1, le=1000)
    max_actors: int = Field(ge=1, le=1000)
    target_busy: float = Field(default=0.6, gt=0, le=1)
    target_queue_s: float = Field(default=0.02, gt=0, le=60)
    upscale_delay_s: float = Field(default=5.0, ge=0, le=86_400)
    downscale_delay_s: float = Field(default=120.0, ge=0, le=86_400)
    standby_actors: int = Field(default=0, ge=0, le=1000)
    dry_run: bool = False

    @field_validator("max_actors")
    @classmethod
    def _most_is_not_least(cls, max_actors: int, info: ValidationInfo) -> int:
        least = info.data.get("min_actors")  # absent when wrong
        if least is not None and max_actors < least:
            raise ValueError(f"must be at least min_actors, {least}")
        return max_actors

    def targets(self) -> ScalingTargets:
        """Return what the controller goes by."""
        return ScalingTargets(**self.model_dump())


def _around_actors(
    autoscaling: ActorScalingConfig | None, info: ValidationInfo
) -> ActorScalingConfig | None:
    actors = info.data.get("actors")  # absent when wrong
    if autoscaling is not None and actors is not None:
        least, most = autoscaling.min_actors, autoscaling.max_actors
        if not least <= actors <= most:
            raise ValueError(f"actors, {actors}, must be from min_actors to max_actors")
    return autoscaling


def _fewest(actors: int, autoscaling: ActorScalingConfig | None) -> int:
    return actors if autoscaling is None else autoscaling.min_actors


class PoolConfig(_Section):
    """Alike expert actors, each on a device of its own.

    ``num_cpus``, ``num_gpus`` and ``resources`` (names of one's own, given to ``ray start``) are
    what one actor reserves, and so decide which machines it may be on; with ``num_gpus`` it
    computes on the GPU that Ray gives it. ``threads`` are its compute threads.
    ``memory_budget_bytes`` bounds the expert weights that it holds. With ``emulate`` no expert is
    computed (:class:`EmulateConfig`). With ``autoscaling`` their number follows the load, from
    ``actors`` on (:class:`ActorScalingConfig`).
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$", max_length=32)
    actors: int = Field(ge=1, le=1000)
    num_cpus: float = Field(default=0.1, ge=0)
    num_gpus: float = Field(default=0.0, ge=0, le=1)
    resources: dict[str, float] = Field(default={}, max_length=16)
    threads: int = Field(default=1, ge=1, le=256)
    memory_budget_bytes: int | None = Field(default=None, gt=0)
    emulate: Annotated[EmulateConfig | None, AfterValidator(_without_gpu)] = None
    autoscaling: Annotated[ActorScalingConfig | None, AfterValidator(_around_actors)] = None

    @field_validator("resources")
    @classmethod
    def _resources_are_rays(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if not name or name in RAYS_RESOURCES:
                raise ValueError(f"{name!r} is Ray's own; use num_cpus, num_gpus")
            if amount <= 0 or (amount > 1 and amount % 1):
                raise ValueError(f"{name} must be a whole number or a part of 1")
        return resources


class ExpertsConfig(_Section):
    """The expert actors, one to a device.

    ``pools`` lists kinds of them, such as one for GPUs and one for CPUs; where all actors are
    alike, the keys of the one pool stand here instead (see :class:`PoolConfig`). With several
    pools all have a ``memory_budget_bytes`` or none has; an actor's share of the experts is in
    proportion to it.

    ``min_copies`` is how many actors hold each expert, on different nodes where there are several;
    with two or more, a router goes on with another copy at once when an actor dies or hangs.
    ``max_queue_rows`` bounds the token rows that wait in an actor; a frame beyond it is refused and
    tried again. ``call_timeout_s`` is how long a router waits for one answer before it reports the
    actor and tries again. ``transport`` is how frames travel: ``stream`` over connections held open
    to the actors, ``ray`` by Ray calls, ``auto`` over streams and by Ray calls where and while
    there is none. ``tls`` encrypts the streams between hosts. ``rebalance_period_s`` is how often
    copies follow the load by themselves; without it only when ``expertmesh rebalance`` says so,
    since every move reads weights while requests run. Copies go at the first such moment after
    their expert was hardly asked for during nine tenths of the shortest ``downscale_delay_s`` of
    all pools (ten seconds at least; two minutes without any).
    """

    pools: tuple[PoolConfig, ...] | None = Field(default=None, min_length=1, max_length=32)
    actors: int = Field(default=2, ge=1, le=1000)
    num_cpus: float = Field(default=0.1, ge=0)
    num_gpus: float = Field(default=0.0, ge=0, le=1)
    threads: int = Field(default=1, ge=1, le=256)
    memory_budget_bytes: int | None = Field(default=None, gt=0)
    emulate: Annotated[EmulateConfig | None, AfterValidator(_without_gpu)] = None
    autoscaling: Annotated[ActorScalingConfig | None, AfterValidator(_around_actors)] = None
    min_copies: int = Field(default=1, ge=1)
    max_queue_rows: int = Field(default=65_536, ge=1)
    call_timeout_s: float = Field(default=10.0, gt=0)
    transport: TransportKind = "auto"
    tls: TlsConfig | None = None
    rebalance_period_s: float | None = Field(default=None, ge=0.1, le=86_400)

    @field_validator("pools")
    @classmethod
    def _pools_differ(cls, pools: tuple[PoolConfig, ...] | None) -> tuple[PoolConfig, ...] | None:
        names = [pool.name for pool in pools or ()]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"names must differ; given more than once: {', '.join(doubled)}")
        budgets = [pool.memory_budget_bytes for pool in pools or ()]
        if None in budgets and any(budget is not None for budget in budgets):
            raise ValueError("all pools need memory_budget_bytes, or none")
        return pools

    @field_validator(*ONE_POOLS_KEYS)
    @classmethod
    def _stands_in_one_place(cls, value: Any, info: ValidationInfo) -> Any:
        # Not called for defaults, so this was given beside the pools.
        if info.data.get("pools") is not None:
            raise ValueError("with pools it stands in each of them")
        return value

    @field_validator("min_copies")
    @classmethod
    def _copies_need_actors(cls, min_copies: int, info: ValidationInfo) -> int:
        pools, actors = info.data.get("pools"), info.data.get("actors")  # absent when wrong
        if pools is not None:
            actors = sum(_fewest(pool.actors, pool.autoscaling) for pool in pools)
        elif actors is not None:
            actors = _fewest(actors, info.data.get("autoscaling"))
        if actors is not None and min_copies > actors:
            raise ValueError(f"must be at most the number of actors, {actors}")
        return min_copies

    def all_pools(self) -> tuple[PoolConfig, ...]:
        """Return the pools, of which there is one where none is listed."""
        if self.pools is not None:
            return self.pools
        given = {key: getattr(self, key) for key in ONE_POOLS_KEYS}
        return (PoolConfig(name=DEFAULT_POOL, **given),)

    @property
    def emulated_pools(self) -> tuple[str, ...]:
        """Names of the pools that compute nothing."""
        return tuple(pool.name for pool in self.all_pools() if pool.emulate is not None)

    @property
    def num_actors(self) -> int:
        """Actors of all pools."""
        return sum(pool.actors for pool in self.all_pools())


class CapacityConfig(_Section):
    """How many of a step's tokens one expert takes at most; exactly one of both is given.

    ``factor`` is a multiple of what each expert would take were all loads equal, ``tokens`` a
    number. What an expert has no room for goes to the token's next expert in line, and the answer
    is flagged as not exact (GShard, Lepikhin et al. 2020, section 2.2).
    """

    factor: float | None = Field(default=None, gt=0, le=1e6)
    tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _is_one_of_both(self) -> CapacityConfig:
        if (self.factor is None) == (self.tokens is None):
            raise ValueError(
                "needs exactly one of factor and tokens "
                f"(given: factor {self.factor}, tokens {self.tokens})"
            )
        return self


class ReplicaScalingConfig(_Section):
    """How the number of replicas follows their use, by Serve's own autoscaler.

    Replicas are added when all were used for more than ``target_use`` on average for
    ``upscale_delay_s``, and drained when fewer would have been enough for ``downscale_delay_s``.
    A router's use is that of its cache or of its batch, waiting requests counted too, whichever is
    larger; a gateway's is its requests under way by ``max_ongoing_requests``.
    """

    min_replicas: int = Field(ge=1, le=1000)
    max_replicas: int = Field(ge=1, le=1000)
    target_use: float = Field(default=0.7, gt=0, le=1)
    upscale_delay_s: float = Field(default=10.0, ge=0, le=86_400)
    downscale_delay_s: float = Field(default=300.0, ge=0, le=86_400)


def _around_replicas(
    autoscaling: ReplicaScalingConfig | None, info: ValidationInfo
) -> ReplicaScalingConfig | None:
    replicas = info.data.get("replicas")  # absent when wrong
    if autoscaling is not None and replicas is not None:
        least, most = autoscaling.min_replicas, autoscaling.max_replicas
        if not least <= replicas <= most:
            raise ValueError(f"replicas, {replicas}, must be from min_replicas to max_replicas")
    return autoscaling


ReplicaScaling = Annotated[ReplicaScalingConfig | None, AfterValidator(_around_replicas)]


class RouterConfig(_Section):
    """Router replicas of each model: batch, queue and cache limits of one replica.

    With ``autoscaling`` their number follows their use, from ``replicas`` on
    (:class:`ReplicaScalingConfig`).
    ``max_batch_size`` is how many sequences decode together, ``max_batch_tokens`` how many tokens
    one step computes (so it is the prefill chunk), ``max_queue_requests`` how many requests wait;
    one more is refused. ``max_queue_tokens`` is what all that wait may come to together, prompt and
    ``max_tokens`` of each choice; one request alone may be more. ``cache_tokens`` is the size of
    the key/value cache; by default enough for ``max_batch_size`` sequences of full length, at most
    65,536 tokens. ``expert_capacity`` bounds what one expert computes in a
    step; by default nothing does, and all answers are exact.
    """

    replicas: int = Field(default=1, ge=1, le=1000)
    autoscaling: ReplicaScaling = None
    num_cpus: float = Field(default=0.1, ge=0)
    threads: int = Field(default=1, ge=1, le=256)
    max_batch_size: int = Field(default=32, ge=1, le=4096)
    max_batch_tokens: int = Field(default=512, ge=1)
    max_queue_requests: int = Field(default=256, ge=1)
    max_queue_tokens: int = Field(default=1_048_576, ge=1)
    cache_tokens: int | None = Field(default=None, ge=16)
    expert_capacity: CapacityConfig | None = None

    def cache_tokens_for(self, max_model_len: int) -> int:
        """Return the tokens that one replica's cache holds, for a model of this context."""
        if self.cache_tokens is not None:
            return self.cache_tokens
        wanted = self.max_batch_size * max_model_len
        return max(max_model_len, min(wanted, MAX_DEFAULT_CACHE_TOKENS))

    @model_validator(mode="after")
    def _a_step_holds_the_batch(self) -> RouterConfig:
        if self.max_batch_tokens < self.max_batch_size:  # decodes alone would leave no prefill
            raise ValueError(
                f"max_batch_tokens must be at least max_batch_size, {self.max_batch_size} "
                f"(given: {self.max_batch_tokens})"
            )
        return self


class GatewayConfig(_Section):
    """Gateway replicas and the limits that requests are checked against.

    With ``autoscaling`` their number follows their use, from ``replicas`` on
    (:class:`ReplicaScalingConfig`).
    ``max_ongoing_requests`` may be under way in one gateway; one more is refused.
    ``max_body_bytes`` bounds an HTTP body and a gRPC message; the HTTP bodies that are being read
    at one time may come to :data:`BODIES_AT_ONCE` times as much together. ``max_request_tokens``
    bounds what one request can take of memory: prompt and ``max_tokens`` of every choice of every
    prompt, where a token with log probabilities counts once more for each of its ``logprobs``; one
    choice without them that fits the model's context is always taken. ``reader_timeout_s`` is how
    long a client may leave a piece of its stream unread before the work for it is ended.
    ``default_timeout_s`` is the deadline of a request that names none. ``on_expert_loss`` is what
    becomes of one that names nothing else when an expert has no live copy: ``strict`` waits for it,
    ``next_expert`` and ``drop`` go on with an answer that is flagged as not exact.
    """

    replicas: int = Field(default=1, ge=1, le=1000)
    autoscaling: ReplicaScaling = None
    num_cpus: float = Field(default=0.1, ge=0)
    max_ongoing_requests: int = Field(default=1024, ge=1)
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    max_request_tokens: int = Field(default=524_288, ge=1)
    reader_timeout_s: float = Field(default=30.0, gt=0)
    default_timeout_s: float = Field(default=120.0, gt=0)
    max_timeout_s: float = Field(default=3600.0, gt=0)
    max_choices: int = Field(default=16, ge=1, le=128)
    max_logprobs: int = Field(default=20, ge=0, le=100)
    on_expert_loss: OnExpertLoss = "strict"


class AppConfig(_Section):
    """Everything under ``args:`` of a deployment file."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    gateway: GatewayConfig = GatewayConfig()

    @field_validator("models")
    @classmethod
    def _ids_are_unique(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        ids = [model.id for model in models]
        doubled = sorted({name for name in ids if ids.count(name) > 1})
        if doubled:
            raise ValueError(f"model ids must differ; given more than once: {', '.join(doubled)}")
        return models

    def effective(self) -> dict[str, Any]:
        """Return the args with every default, which :func:`parse_args` reads as the same again."""
        args = self.model_dump(mode="json")
        if self.experts.pools is not None:  # the keys of the one pool stand in each of them then
            for key in ONE_POOLS_KEYS:
                del args["experts"][key]
        return args


def _yaml_path(loc: tuple[int | str, ...], root: str) -> str:
    return root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)


def _allowed_keys(loc: tuple[int | str, ...]) -> list[str]:
    section: Any = AppConfig
    for part in loc[:-1]:
        if part == "autoscaling":
            section = ActorScalingConfig if "experts" in loc else ReplicaScalingConfig
        elif isinstance(part, str):
            section = {
                "models": ModelConfig,
                "experts": ExpertsConfig,
                "router": RouterConfig,
                "gateway": GatewayConfig,
                "tls": TlsConfig,
                "emulate": EmulateConfig,
                "pools": PoolConfig,
            }[part]
    return sorted(section.model_fields)


def parse_args(args: dict[str, Any], root: str = "args") -> AppConfig:
    """Validate ``args:`` of a deployment file.

    Raises :class:`ConfigError` with the YAML path of the first thing that is wrong, what was given
    and what is allowed.
    """
    try:
        return AppConfig.model_validate(args)
    except ValidationError as error:
        first = error.errors()[0]
        path = _yaml_path(first["loc"], root)
        if first["type"] == "extra_forbidden":
            keys = ", ".join(_allowed_keys(first["loc"]))
            raise ConfigError(f"unknown key; allowed keys: {keys}", path) from None
        given = "" if first["type"] == "missing" else f" (given: {first['input']!r:.80})"
        raise ConfigError(f"{first['msg']}{given}", path) from None


def load_deployment(file: Path) -> list[tuple[str, AppConfig]]:
    """Read a deployment file and validate each application's args; returns (name, config) pairs.

    Raises :class:`ConfigError` naming the file and YAML path.
    """
    return parse_deployment(read_document(file), file)


def read_document(file: Path) -> Any:
    """Return a file's YAML as plain data; raises :class:`ConfigError`."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(file)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}", str(file)) from None


def parse_deployment(document: Any, file: Path) -> list[tuple[str, AppConfig]]:
    """Validate the args of each application of ``file``'s document; see :func:`load_deployment`."""
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or not applications:
        raise ConfigError("needs a list 'applications' with at least one entry", str(file))
    return [_parse_application(file, i, app) for i, app in enumerate(applications)]


def _parse_application(file: Path, index: int, app: Any) -> tuple[str, AppConfig]:
    where = f"{file}: applications[{index}]"
    if not isinstance(app, dict):
        raise ConfigError("must be a mapping with name, import_path and args", where)
    if app.get("import_path") != IMPORT_PATH:
        given = app.get("import_path")
        raise ConfigError(f"must be {IMPORT_PATH} (given: {given!r})", f"{where}.import_path")
    args = app.get("args")
    if not isinstance(args, dict):
        raise ConfigError("must be a mapping with at least 'models'", f"{where}.args")
    return str(app.get("name", "default")), parse_args(args, f"{where}.args")
