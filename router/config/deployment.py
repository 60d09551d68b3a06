"""The ``args:`` of a deployment file, validated; every error names its YAML path.

A deployment file is a Ray Serve config whose ``import_path`` is ``router.app:build``. Its ``args:``
are an :class:`AppConfig`. The error of an unknown key lists the allowed keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from cluster.errors import ConfigError
from cluster.spec import OnExpertLoss
from cluster.transport.stream.sockets import PORTS_VARIABLE, ports_of
from router.config.capacity import CapacityConfig
from router.config.experts import SINGLE_POOL_KEYS, ExpertsConfig, starts_within_bounds
from router.config.listen import ListenConfig
from router.config.local_paths import localized
from router.config.models import ModelConfig
from router.section import Section, models_in, unknown_key
from router.security.config import SecurityConfig, with_open_word

IMPORT_PATH = "router.app:build"
MAX_DEFAULT_CACHE_TOKENS = 65_536
BODIES_AT_ONCE = 16
EACH_NODE, MAX_GATEWAYS = "each_node", 1000
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9])?")
_ORIGIN = re.compile(r"https?://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


class ReplicaScalingConfig(Section):
    """Lets Serve's autoscaler change the number of replicas with their use.

    A router's use is that of its cache or of its batch, whichever is larger, waiting requests
    included. A gateway's use is its requests in progress over ``max_ongoing_requests``.
    """

    min_replicas: int = Field(ge=1, le=1000, description="Fewest replicas.")
    max_replicas: int = Field(ge=1, le=1000, description="Most replicas.")
    target_use: float = Field(
        default=0.7, gt=0, le=1, description="Average use above which replicas are added."
    )
    upscale_delay_s: float = Field(
        default=10.0,
        ge=0,
        le=86_400,
        description="How long more replicas must be wanted before they start.",
    )
    downscale_delay_s: float = Field(
        default=300.0,
        ge=0,
        le=86_400,
        description="How long fewer replicas must be enough before some are drained.",
    )


ReplicaScaling = Annotated[
    ReplicaScalingConfig | None,
    starts_within_bounds("replicas"),
    Field(description="Lets the number of replicas follow their use."),
]


class RouterConfig(Section):
    """The router replicas of each model. All limits are those of one replica."""

    replicas: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Routers of each model. With `autoscaling`, their number at the start.",
    )
    autoscaling: ReplicaScaling = None
    num_cpus: float = Field(default=0.1, ge=0, description="CPUs that one router reserves in Ray.")
    num_gpus: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="GPUs that one router of a language model reserves; routers and actors may "
        "share one by fractions. This was never run on a GPU; `benchmarks/gpu.sh` would prove it.",
    )
    device: Literal["auto", "cpu", "accelerator"] = Field(
        default="auto",
        description="Where the dense part of a language model computes and has its cache. `auto` "
        "is the accelerator that Ray gives for `num_gpus`, or the CPU where that is 0. "
        "`accelerator` is any that torch finds there, also one that is not reserved. "
        "This was never run on a GPU; `benchmarks/gpu.sh` would prove it.",
    )
    threads: int = Field(default=1, ge=1, le=256, description="Compute threads of one router.")
    prefill_threads: int = Field(
        default=4,
        ge=1,
        le=256,
        description="Threads for attention and its products in the steps of long prompts, on a "
        "CPU: of 64 tokens and more that attend to 256 others on average. No more than the "
        "processors that the router may use, no fewer than `threads`.",
    )
    max_batch_size: int = Field(
        default=32,
        ge=1,
        le=4096,
        description="Sequences that decode together in one step; for a mixture, "
        "requests that are computed together.",
    )
    max_batch_tokens: int = Field(
        default=512,
        ge=1,
        description="Tokens that one step computes, and so the size of a prefill chunk; a "
        "mixture's step computes twice as many rows. At least `max_batch_size`.",
    )
    max_queue_requests: int = Field(
        default=256,
        ge=1,
        description="Requests that may wait; each choice of a request counts as one. One more is "
        "refused. A request that waits alone, or as the only one of its key's name, may have "
        "more choices.",
    )
    max_queue_tokens: int = Field(
        default=1_048_576,
        ge=1,
        description="The most that prompt tokens and `max_tokens` of all waiting choices add up "
        "to, or the rows of all requests for a mixture. A request that waits alone, or as "
        "the only one of its key's name, may have more.",
    )
    cache_tokens: int | None = Field(
        default=None,
        ge=16,
        description="Tokens in the key/value cache. Without it, room for `max_batch_size` "
        "sequences of full length, but no more than 65,536 tokens or one sequence, whichever is "
        "more.",
    )
    prefix_cache: bool = Field(
        default=True,
        description="Whether requests of a language model share the cache of what they begin with. "
        "Never on accelerators, without native code, or with `expert_capacity`.",
    )
    expert_capacity: CapacityConfig | None = Field(
        default=None,
        description="Bounds the tokens of a step that one expert of a language model takes. "
        "Without it nothing does.",
    )

    def cache_tokens_for(self, max_model_len: int) -> int:
        """Return the size in tokens of one replica's cache, for a model of this context."""
        if self.cache_tokens is not None:
            return self.cache_tokens
        wanted = self.max_batch_size * max_model_len
        return max(max_model_len, min(wanted, MAX_DEFAULT_CACHE_TOKENS))

    @model_validator(mode="after")
    def _fits_together(self) -> RouterConfig:
        if self.device == "cpu" and self.num_gpus > 0:
            raise ValueError(f"device cpu leaves the GPU unused (given: num_gpus {self.num_gpus})")
        if self.max_batch_tokens < self.max_batch_size:  # decodes would leave no room for prefill
            raise ValueError(
                f"max_batch_tokens must be at least max_batch_size, {self.max_batch_size} "
                f"(given: {self.max_batch_tokens})"
            )
        return self


class GatewayConfig(Section):
    """The gateway replicas, and the limits that requests are checked against."""

    replicas: Annotated[int, Field(ge=1, le=MAX_GATEWAYS)] | Literal["each_node"] = Field(
        default=1,
        description="Gateways. With `autoscaling`, their number at the start. `each_node` is one "
        "on each node that has `num_cpus`.",
    )
    autoscaling: ReplicaScaling = None
    num_cpus: float = Field(default=0.1, ge=0, description="CPUs that one gateway reserves in Ray.")
    listen: ListenConfig = ListenConfig()
    max_ongoing_requests: int = Field(
        default=1024,
        ge=1,
        description="Requests in progress in one gateway. One more is refused. Where it serves "
        "several models, half of an even share is kept for each.",
    )
    access_log: bool = Field(
        default=False,
        description="Whether each request has a line in the log when it ends: its id, model, key's "
        "name, outcome and time.",
    )
    hosts: tuple[str, ...] = Field(
        default=(),
        description="Names that a request's `Host` may have where `listen.host` is loopback, "
        "beside `localhost` and addresses: those that a proxy on this machine passes on.",
    )
    origins: tuple[str, ...] = Field(
        default=(),
        description="Origins of web pages that may use the HTTP APIs from a browser, as "
        "`https://chat.example.com`. Without any, pages of other sites are refused.",
    )
    max_body_bytes: int = Field(
        default=4 * 1024 * 1024,
        ge=1024,
        description="Largest HTTP body and gRPC message. All HTTP bodies that are read at one time "
        "may add up to 16 times as much.",
    )
    max_request_tokens: int = Field(
        default=524_288,
        ge=1,
        description="The most that prompt tokens and `max_tokens` of all choices of all prompts of "
        "one request add up to. With `logprobs: k` an output token counts 1 + k times, and with "
        "`prompt_logprobs: k` a prompt token 2 + k times; 32 bytes of `routed_experts` count as a "
        "token. One choice without any of these that fits the model's context is always taken.",
    )
    reader_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="How long a client may leave its stream unread before the work for it ends.",
    )
    default_timeout_s: float = Field(
        default=120.0, gt=0, description="Deadline of a request that names none."
    )
    max_timeout_s: float = Field(
        default=3600.0, gt=0, description="Longest deadline that a request may name."
    )
    max_choices: int = Field(default=16, ge=1, le=128, description="Largest `n`.")
    max_logprobs: int = Field(
        default=20, ge=0, le=100, description="Largest `logprobs` and `prompt_logprobs`."
    )
    on_expert_loss: OnExpertLoss = Field(
        default="strict",
        description="For requests that name nothing else, while an expert has no live copy. "
        "`strict` waits; `next_expert` and `drop` go on with a reply that is not `exact`.",
    )

    @property
    def on_one_node(self) -> int:
        """The number of gateways at the start where there is one node."""
        return self.replicas if isinstance(self.replicas, int) else 1

    @model_validator(mode="after")
    def _number_has_one_source(self) -> GatewayConfig:
        if self.replicas == EACH_NODE and self.autoscaling is not None:
            raise ValueError(f"replicas: {EACH_NODE} cannot be given together with autoscaling")
        return self

    @field_validator("hosts")
    @classmethod
    def _hosts_are_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _HOST_NAME.fullmatch(host):
                raise ValueError(f"{host!r} must be a lower-case host name without a port")
        return hosts

    @field_validator("origins")
    @classmethod
    def _origins_are_whole(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} must be an origin, such as https://chat.example.com:8443"
                )
        return origins


class AppConfig(Section):
    """Everything under ``args:``."""

    models: tuple[ModelConfig, ...] = Field(min_length=1, description="The models to serve.")
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    gateway: GatewayConfig = GatewayConfig()
    security: SecurityConfig = Field(default=SecurityConfig(), json_schema_extra=with_open_word)
    ports: str | None = Field(
        default=None,
        pattern=r"^[0-9]{1,5}-[0-9]{1,5}$",
        description="The ports at which routers, gateways and expert actors listen for each other "
        "between machines, as `20000-20999`. Each process takes one. Without it, any free port.",
    )

    @field_validator("ports")
    @classmethod
    def _ports_are_a_range(cls, ports: str | None) -> str | None:
        if ports is not None:
            ports_of(ports)  # raises
        return ports

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that every process of the application needs."""
        return {} if self.ports is None else {PORTS_VARIABLE: self.ports}

    @field_validator("models")
    @classmethod
    def _ids_are_unique(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        ids = [model.id for model in models]
        doubled = sorted({name for name in ids if ids.count(name) > 1})
        if doubled:
            raise ValueError(f"model ids must differ; given more than once: {', '.join(doubled)}")
        return models

    def effective(self) -> dict[str, Any]:
        """Return the args with every default; :func:`parse_args` makes an equal config of them."""
        args = self.model_dump(mode="json")
        if self.experts.pools is not None:  # each pool has these keys itself
            for key in SINGLE_POOL_KEYS:
                del args["experts"][key]
        return args


def _yaml_path(loc: tuple[int | str, ...], root: str) -> str:
    return root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)


def _allowed_keys(loc: tuple[int | str, ...]) -> Iterable[str]:
    section: type[BaseModel] = AppConfig
    for part in loc[:-1]:
        if isinstance(part, str):
            [section] = models_in(section.model_fields[part].annotation)
    return section.model_fields


def parse_args(args: dict[str, Any], root: str = "args") -> AppConfig:
    """Validate ``args:`` of a deployment file.

    Raises :class:`ConfigError` for the first error, with its YAML path, the given value and the
    allowed values.
    """
    try:
        return AppConfig.model_validate(args)
    except ValidationError as error:
        errors = error.errors()  # a misspelt key makes its own missing: the first is the cause
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        path = _yaml_path(first["loc"], root)
        if first["type"] == "extra_forbidden":
            message = unknown_key(str(first["loc"][-1]), _allowed_keys(first["loc"]))
            raise ConfigError(message, path) from None
        given = "" if first["type"] == "missing" else f" (given: {first['input']!r:.80})"
        raise ConfigError(f"{first['msg']}{given}", path) from None


def load_deployment(file: Path) -> list[tuple[str, AppConfig]]:
    """Read a deployment file and validate each application's args; returns (name, config) pairs.

    Raises :class:`ConfigError` with the file and the YAML path.
    """
    return parse_deployment(read_file(file), file)


def read_file(file: Path) -> Any:
    """Return a deployment file's document, whose relative paths may lie beside it.

    See :func:`router.config.local_paths.localized`. Raises :class:`ConfigError`.
    """
    return localized(read_document(file), file.parent)


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
